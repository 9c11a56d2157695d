"""What nvcc and ptxas make of the kernels: no spills, registers under the stated cap, exact arithmetic."""

import re
import shutil
import time

import harness
import pytest

ARCHITECTURES = ("sm_80", "sm_90a", "sm_100", "sm_120")
SOURCES = sorted((harness.HERE / "nvcc").glob("*.cu"))
CUDA = harness.ROOT / "csrc" / "cuda"

pytestmark = pytest.mark.skipif(
    shutil.which("nvcc") is None,
    reason="nvcc is not on PATH; the CUDA toolkit brings it, and no GPU is needed",
)


def nvcc(source, *flags) -> str:
    """What the compiler writes, kept under build/simt until a source changes."""
    files = harness.files_of(source, CUDA.parent)
    version = harness.check_output(["nvcc", "--version"])
    log = harness.CACHE / f"{source.stem}-{harness.hash_of([version, *flags, *files])}.log"
    if not log.exists():
        command = ["nvcc", "-std=c++17", f"-I{CUDA.parent}", *flags, str(source)]
        begin = time.perf_counter()
        text = harness.check_output(command, stderr_too=True)
        harness.other_times.append((f"nvcc {source.name}", time.perf_counter() - begin))
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(text)
    return log.read_text()


def kernels_in(log: str):
    """(architecture, kernel, registers, bytes spilled) of each compiled kernel."""
    pattern = re.compile(
        r"Compiling entry function '(\w+)' for '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers",
        re.DOTALL,
    )
    for name, architecture, stores, loads, registers in pattern.findall(log):
        kernel = re.search(r"\d+([a-z_]+_kernel)", name).group(1)
        yield architecture, kernel, int(registers), int(stores) + int(loads)


def register_cap(kernel: str) -> int | None:
    """The last `kRegisterCap` that stands before the kernel in its file."""
    for path in CUDA.glob("*.cuh"):
        before, found, _ = path.read_text().partition(f" {kernel}(")
        caps = re.findall(r"kRegisterCap = (\d+)", before)
        if found and caps:
            return int(caps[-1])
    return None


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_registers_and_spills(source):
    targets = [f"-gencode=arch=compute_{a[3:]},code={a}" for a in ARCHITECTURES]
    log = nvcc(source, *targets, "-Xptxas=-v", "-fatbin", "-o", "/dev/null")
    assert "warning" not in log, log
    found = list(kernels_in(log))
    assert {architecture for architecture, *_ in found} == set(ARCHITECTURES)
    most: dict[str, int] = {}
    for architecture, kernel, registers, spilled in found:
        most[kernel] = max(most.get(kernel, 0), registers)
        cap = register_cap(kernel)
        assert spilled == 0, f"{kernel} on {architecture} spills {spilled} bytes"
        assert source.stem == "instructions" or cap is not None, f"{kernel} states no kRegisterCap"
        assert cap is None or registers <= cap, f"{kernel} on {architecture}: {registers} registers"
    print(f"registers at most: {most}")


@pytest.mark.parametrize("source", ["pool", "search", "decode_search"])
def test_canonical_arithmetic_is_exact(source):
    """Nothing approximate and nothing flushed, anywhere in these kernels."""
    ptx = nvcc(
        harness.HERE / "nvcc" / f"{source}.cu", "-arch=compute_80", "-ptx", "-o", "/dev/stdout"
    )
    assert "sqrt.rn.f64" in ptx and "div.rn.f64" in ptx
    assert not re.search(r"\.approx|\.ftz", ptx)


def test_every_instruction_is_assembled():
    text = (harness.HERE / "nvcc" / "instructions.cu").read_text()
    for path in (CUDA / "ptx").iterdir():
        for name in re.findall(r"inline__\s+[\w:]+\s+(\w+)\(", path.read_text()):
            assert f"ptx::{name}" in text, f"{name} of {path.name} is not in instructions.cu"
