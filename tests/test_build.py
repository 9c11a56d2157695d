"""The house rules that a compiler does not enforce, and the binary that comes out."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

import resona_ext
from resona_ext import ops

ROOT = Path(__file__).parents[1]
CSRC = ROOT / "csrc"
# cmake and ninja come from the environment that runs the tests, activated or not.
BUILD_ENVIRONMENT = {
    **os.environ,
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
}


def sources(*folders):
    return [
        p
        for f in folders
        for p in (CSRC / f).rglob("*")
        if p.suffix in {".h", ".cpp", ".cu", ".cuh", ".inc"}
    ]


def test_torch_stops_at_ops():
    for path in sources("common", "cpu", "cuda", "python"):
        assert not re.search(r'#include\s*[<"](torch|ATen|c10)/', path.read_text()), path


def test_inline_assembly_lives_in_ptx():
    for path in sources("common", "cpu", "cuda", "ops", "python"):
        if "ptx" not in path.parts:
            assert not re.search(r"\basm\b\s*(volatile\s*)?\(", path.read_text()), path


def test_canonical_arithmetic_uses_nothing_approximate():
    text = (CSRC / "common" / "canonical.h").read_text()
    assert not re.search(r"rsqrt|__f\w+_r|fma\(|float\s+norm", text)


def test_contraction_is_off_in_every_host_compilation(tmp_path):
    command = ["cmake", f"-S{ROOT}", f"-B{tmp_path}", "-GNinja", "-DRESONA_USE_CUDA=0", "-DRESONA_PYBIND=0",
               f"-DPython3_EXECUTABLE={sys.executable}", "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON"]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, env=BUILD_ENVIRONMENT)
    compiled = json.loads((tmp_path / "compile_commands.json").read_text())
    assert {Path(c["file"]).name for c in compiled} >= {
        "search.cpp",
        "kernels_portable.cpp",
        "attend.cpp",
    }
    assert all("-ffp-contract=off" in c["command"].split() for c in compiled)


def test_cuda_is_refused_where_it_cannot_be_built(tmp_path):
    command = ["cmake", f"-S{ROOT}", f"-B{tmp_path}", "-GNinja", "-DRESONA_USE_CUDA=1",
               f"-DPython3_EXECUTABLE={sys.executable}", "-DCMAKE_CUDA_COMPILER=/nowhere/nvcc"]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, env=BUILD_ENVIRONMENT)
    assert result.returncode != 0 and "nvcc" in result.stderr


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
def test_cuda_compilation(tmp_path):
    """Exact arithmetic, hidden symbols, and the architectures that torch's variable asks for."""
    command = ["cmake", f"-S{ROOT}", f"-B{tmp_path}", "-GNinja", "-DRESONA_USE_CUDA=1", "-DRESONA_PYBIND=0",
               f"-DPython3_EXECUTABLE={sys.executable}", "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON"]  # fmt: skip
    environment = {**BUILD_ENVIRONMENT, "TORCH_CUDA_ARCH_LIST": "8.0 9.0a;12.0+PTX"}
    result = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    assert result.stdout.count("sm_80 sm_90a sm_120 compute_120") == 1
    compiled = json.loads((tmp_path / "compile_commands.json").read_text())
    kernels = [c["command"] for c in compiled if c["file"].endswith(".cu")]
    assert len(kernels) == len(list((CSRC / "cuda").glob("*.cu")))
    for text in kernels:
        assert re.search(r"-O3 .*-std=c\+\+17", text) and "visibility=hidden" in text
        assert not re.search(r"fast_math|ftz|fmad|prec-|rdc|-dc\b", text)
    hosts = [c["command"] for c in compiled if "csrc/ops" in c["file"]]
    assert hosts and all("-DRESONA_HAS_CUDA" in text for text in hosts)


@pytest.mark.parametrize("bad", ["Hopper", "90a", "8.0;9.0+ptx"])
def test_unknown_architectures_are_one_clear_error(bad, tmp_path):
    command = [
        "cmake",
        f"-S{ROOT}",
        f"-B{tmp_path}",
        "-GNinja",
        f"-DPython3_EXECUTABLE={sys.executable}",
    ]
    environment = {**BUILD_ENVIRONMENT, "TORCH_CUDA_ARCH_LIST": bad}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    message = " ".join(result.stderr.split())  # CMake breaks lines
    assert result.returncode != 0
    assert (
        "TORCH_CUDA_ARCH_LIST: expected compute capabilities such as 8.0;9.0a;12.0+PTX" in message
    )
    assert f"got {bad.split(';')[-1]}." in message


def setup_functions(monkeypatch, root: Path) -> dict:
    """What setup.py defines, for a checkout at `root`."""
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    functions = runpy.run_path(str(ROOT / "setup.py"))
    functions["find_nvcc"].__globals__["ROOT"] = root
    return functions


def test_which_nvcc_is_used(tmp_path, monkeypatch):
    """Each place of the list hides those after it."""
    places = {
        "CUDACXX": tmp_path / "named" / "nvcc",
        "CUDA_HOME": tmp_path / "home" / "bin" / "nvcc",
        "PATH": tmp_path / "path" / "nvcc",
        "toolkit": tmp_path / "build/cuda-toolkit/13.0/nvidia/cu13/bin/nvcc",
    }
    find_nvcc = setup_functions(monkeypatch, tmp_path)["find_nvcc"]
    for variable in ("CUDACXX", "CUDA_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    assert find_nvcc() is None
    for name, path in reversed(places.items()):
        path.parent.mkdir(parents=True)
        path.write_text("#!/bin/sh\n")
        path.chmod(0o755)
        if name == "CUDACXX":
            monkeypatch.setenv("CUDACXX", str(path))
        if name == "CUDA_HOME":
            monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
        assert find_nvcc() == str(path)


@pytest.mark.parametrize("known", ["/old/nvcc", "NOTFOUND"])
def test_another_nvcc_replaces_the_one_that_cmake_remembers(known, tmp_path, monkeypatch):
    forget = setup_functions(monkeypatch, tmp_path)["forget_other_compiler"]
    cache, kept = tmp_path / "CMakeCache.txt", tmp_path / "CMakeFiles" / "resona.dir" / "x.o"
    kept.parent.mkdir(parents=True)
    kept.touch()
    (tmp_path / "CMakeFiles" / "4.4.4").mkdir()
    cache.write_text(f"CMAKE_CUDA_COMPILER:FILEPATH={known}\n")
    forget(tmp_path, None if known == "NOTFOUND" else known)
    assert cache.exists()
    forget(tmp_path, "/new/nvcc")
    assert not cache.exists() and kept.exists() and not (tmp_path / "CMakeFiles" / "4.4.4").exists()


def test_files_stay_readable():
    for path in [*sources("common", "cpu", "ops", "python"), *(ROOT / "resona_ext").rglob("*.py")]:
        assert len(path.read_text().splitlines()) <= 400, path


def needed(library: Path) -> set[str]:
    text = subprocess.run(
        ["readelf", "-d", library], check=True, capture_output=True, text=True
    ).stdout
    return set(re.findall(r"\(NEEDED\).*\[(.*?)\]", text))


HAS_CUDA = json.loads(torch.ops.resona._build_info())["cuda"] != "none"
needs_readelf = pytest.mark.skipif(
    shutil.which("readelf") is None, reason="readelf (binutils) is not installed"
)
needs_cuda_build = pytest.mark.skipif(not HAS_CUDA, reason="libresona.so was built without CUDA")


@needs_readelf
def test_needed_libraries():
    """libtorch.so must be there: on a CUDA torch it brings libtorch_cuda into scope. libcudart must not."""
    found = {re.sub(r"\.so.*", "", name) for name in needed(ops.LIBRARY)}
    assert {"libtorch", "libtorch_cpu", "libc"} <= found
    assert found <= {
        "libtorch",
        "libtorch_cpu",
        "libstdc++",
        "libgcc_s",
        "libc",
        "libm",
        "ld-linux-x86-64",
    }


@needs_readelf
@needs_cuda_build
def test_symbols_of_the_cuda_build():
    """What only a CUDA torch has is weak, and nothing of the static CUDA runtime is visible to others."""
    command = ["readelf", "-W", "--dyn-syms", ops.LIBRARY]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    rows = [line.split()[3:8] for line in text.splitlines() if len(line.split()) >= 8]
    undefined = {name: bind for _, bind, _, section, name in rows if section == "UND"}
    assert undefined.get("aoti_torch_get_current_cuda_stream", "WEAK") == "WEAK"
    strong = [name for name, bind in undefined.items() if bind == "GLOBAL"]
    assert not [
        name for name in strong if re.match(r"_*cu(da)?[A-Z]|torch_c10_cuda|.*_cuda_", name)
    ]
    defined = [name for _, _, _, section, name in rows if section not in ("UND", "Ndx")]
    assert not [name for name in defined if re.search(r"cuda|resona", name)], "exported symbols"


def test_every_symbol_is_found_on_this_torch():
    result = run_python("import resona_ext", LD_BIND_NOW="1")
    assert result.returncode == 0, result.stderr


def cuobjdump() -> str | None:
    """From PATH, or from the pip package, which puts it where no PATH leads."""
    beside = sysconfig.get_path("purelib") + "/nvidia/cu13/bin"
    return shutil.which("cuobjdump") or shutil.which("cuobjdump", path=beside)


@needs_cuda_build
@pytest.mark.skipif(cuobjdump() is None, reason="cuobjdump is not installed")
def test_architectures_in_the_library():
    """Every .cu file was compiled for every architecture that build_info names."""
    text = subprocess.run(
        [cuobjdump(), "-lelf", "-lptx", ops.LIBRARY], check=True, capture_output=True, text=True
    ).stdout
    held: dict[str, set[str]] = {}
    for file, number, kind in re.findall(r": (\S+)\.sm_(\w+)\.(cubin|ptx)$", text, re.MULTILINE):
        held.setdefault(file, set()).add(("sm_" if kind == "cubin" else "compute_") + number)
    expected = set(json.loads(torch.ops.resona._build_info())["cuda_architectures"])
    assert held and all(found == expected for found in held.values()), (held, expected)
    if not os.environ.get("TORCH_CUDA_ARCH_LIST") and not os.environ.get("CMAKE_ARGS"):
        assert expected == {"sm_80", "sm_90a", "sm_100", "sm_120", "compute_80"}


@pytest.mark.skipif(sys.version_info < (3, 11), reason="torch-abi-audit needs Python 3.11")
def test_stable_abi():
    audit = Path(sys.executable).with_name("torch-abi-audit")
    command = [audit, "--check", "torch", str(ops.LIBRARY)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_build_info():
    info = json.loads(torch.ops.resona._build_info())
    assert info["version"] == resona_ext.__version__
    assert info["cpu_isa"] in info["cpu_isas"] and info["cpu_isas"][-1] == "portable"
    assert info["torch_target"] == "2.11"
    assert (info["cuda"] == "none") == (info["cuda_architectures"] == [])
    if os.environ.get("RESONA_USE_CUDA") == "1":
        assert info["cuda"] != "none"


def run_python(code: str, **environment) -> subprocess.CompletedProcess:
    variables = {**os.environ, **environment}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=variables, cwd=ROOT
    )


def test_setup_imports_no_torch_and_names_its_build_command():
    """Metadata must come out where there is no torch, and no plug-in may take over build_ext."""
    code = (
        "import sys; sys.modules['torch'] = None; sys.argv = ['setup.py', '--version'];"
        "import setuptools, runpy; keep = {}; real = setuptools.setup;"
        "setuptools.setup = lambda **k: keep.update(k) or real(**k);"
        "runpy.run_path('setup.py');"
        "assert keep['cmdclass']['build_ext'].__name__ == 'CMakeBuild'"
    )
    result = run_python(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip().splitlines()[-1] == resona_ext.__version__


def test_package_imports_without_the_pybind_module():
    code = "import sys; sys.modules['resona_ext._C'] = None; import resona_ext as r; r.Resona(8, num_heads=1)"
    result = run_python(code)
    assert result.returncode == 0, result.stderr


def test_unknown_instruction_set_is_one_clear_error():
    code = "import torch, resona_ext; torch.ops.resona.pool_chunks(torch.ones(1, 4, 1, 4), 2)"
    result = run_python(code, RESONA_CPU_ISA="mmx")
    assert result.returncode != 0
    assert re.search(
        r"resona: RESONA_CPU_ISA: expected one of .*portable on this processor, got mmx",
        result.stderr,
    )


@pytest.mark.parametrize("isa", ["avx512_bf16", "avx512", "avx2", "portable"])
def test_other_instruction_sets(isa):
    """The exactness and gradient tests again, on the narrower kernels that this processor also runs."""
    if isa not in json.loads(torch.ops.resona._build_info())["cpu_isas"]:
        pytest.skip(f"this processor does not run {isa}")
    tests = [str(ROOT / "tests" / name) for name in ("test_retrieval.py", "test_attention.py")]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    result = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "RESONA_CPU_ISA": isa}
    )
    assert result.returncode == 0, result.stdout[-3000:]


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
def test_canonical_arithmetic_compiles_for_the_device(tmp_path):
    """The same header for the GPU, with IEEE division and square root and nothing flushed."""
    source = tmp_path / "canonical.cu"
    source.write_text(
        '#include "common/canonical.h"\n'
        "__global__ void k(const float* q, const float* c, int n, float* out) {\n"
        "  using namespace resona::canonical;\n"
        "  const double length = norm(q, n);\n"
        "  out[0] = score<float>(dot(q, c, n), length);\n"
        "  out[1] = unit(c[0], length);\n"
        "}\n"
    )
    ptx = tmp_path / "canonical.ptx"
    subprocess.run(
        ["nvcc", "-std=c++17", "-arch=sm_80", "-ptx", f"-I{CSRC}", source, "-o", ptx], check=True
    )
    text = ptx.read_text()
    assert "div.rn.f64" in text and "sqrt.rn.f64" in text
    assert not re.search(r"\.approx|\.ftz", text)
