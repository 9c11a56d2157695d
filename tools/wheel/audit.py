"""What a finished wheel promises, checked on the file itself."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from .errors import WheelError

# libtorch.so in name only: on a CUDA build of torch it brings libtorch_cuda into scope.
TORCH = {"libtorch.so", "libtorch_cpu.so"}
SYSTEM = {
    "libstdc++.so.6",
    "libgcc_s.so.1",
    "libm.so.6",
    "libc.so.6",
    # In libc.so.6 since glibc 2.34, and empty there.
    "libpthread.so.0",
    "libdl.so.2",
    "librt.so.1",
    "ld-linux-x86-64.so.2",
}


def platform_tag(wheel: Path) -> str:
    """The oldest manylinux whose C and C++ libraries hold every symbol that the wheel asks for."""
    from auditwheel.architecture import Architecture
    from auditwheel.libc import Libc
    from auditwheel.wheel_abi import analyze_wheel_abi

    result = analyze_wheel_abi(
        Libc.GLIBC,
        Architecture.detect(),
        wheel,
        frozenset(TORCH),
        disable_isa_ext_check=True,  # AVX kernels are chosen at run time
        allow_graft=False,
    )
    return result.overall_policy.name


def check(wheel: Path) -> list[str]:
    """Raises where a promise is broken; otherwise one line per promise that holds."""
    tag = "-".join(wheel.stem.split("-")[-3:])
    require(
        tag.startswith("py3-none-"), wheel, "tag py3-none, as no binary belongs to one Python", tag
    )
    with tempfile.TemporaryDirectory() as folder:
        zipfile.ZipFile(wheel).extractall(folder)
        package = Path(folder) / "resona_ext"
        library = package / "libresona.so"
        modules = sorted(package.glob("_C.*.so"))
        for binary in (library, *modules):
            _check_binary(wheel, binary, TORCH if binary == library else set())
        audit_stable_abi(library)
    return [
        f"tag {tag}",
        f"libresona.so needs {', '.join(sorted(TORCH))} and the C++ runtime, stripped, nothing exported",
        "torch's stable ABI, nothing newer than torch 2.11",
        f"resona_ext._C for {', '.join(m.name.split('.')[1] for m in modules) or 'no Python'}",
    ]


def check_tools() -> str:
    """Raises where the checks could not be made; otherwise returns the path of torch-abi-audit."""
    beside = str(Path(sys.executable).parent)
    audit = shutil.which("torch-abi-audit", path=beside) or shutil.which("torch-abi-audit")
    if audit is None or importlib.util.find_spec("auditwheel") is None:
        raise WheelError(
            "checking wheels: expected auditwheel and torch-abi-audit, got not both. Install them, with "
            "Python 3.11 or newer: pip install auditwheel torch-abi-audit"
        )
    return audit


def audit_stable_abi(library: Path) -> None:
    command = [check_tools(), "--check", "torch", str(library)]
    done = subprocess.run(command, capture_output=True, text=True)
    require(done.returncode == 0, library, "torch's stable ABI", done.stdout + done.stderr)


def _check_binary(wheel: Path, binary: Path, torch: set[str]) -> None:
    needed = needed_by(binary)
    require(
        torch <= needed <= torch | SYSTEM, wheel, f"{binary.name} to need {torch} of torch", needed
    )
    sections = _readelf("-S", binary)
    require(".symtab" not in sections and ".debug" not in sections, wheel, "stripped", binary.name)
    exports = set(exported_by(binary))
    require(
        exports == (set() if torch else {"PyInit__C"}),
        wheel,
        f"no more than Python's entry exported by {binary.name}",
        exports,
    )


def needed_by(binary: Path) -> set[str]:
    """Names of the libraries that the loader has to find for it."""
    return set(re.findall(r"\(NEEDED\).*\[(.*?)\]", _readelf("-d", binary)))


def exported_by(binary: Path) -> list[str]:
    rows = [line.split() for line in _readelf("--dyn-syms", binary).splitlines()]
    return [r[7] for r in rows if len(r) >= 8 and r[4] != "LOCAL" and r[6] not in ("UND", "Ndx")]


def _readelf(option: str, binary: Path) -> str:
    command = ["readelf", "-W", option, str(binary)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def require(condition: bool, where: Path, expected: str, got) -> None:
    if not condition:
        raise WheelError(f"{where.name}: expected {expected}, got {got}")
