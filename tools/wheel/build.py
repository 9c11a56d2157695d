"""From the sources to one wheel: compiler, link stubs, setup.py, tag, checks."""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path

from . import audit, old_glibc, toolkit, watch
from .errors import WheelError

ROOT = Path(__file__).resolve().parents[2]
# torch's own wheels have this tag, so nothing is won below it.
TAG = "manylinux_2_28"
DEFAULT_ARCHITECTURES = ["80", "90a", "100", "120"]
DISK_BYTES = 1 << 28  # objects and libraries of all architectures: 0.1 GB


@dataclass(frozen=True)
class Order:
    """What the user asked for."""

    cuda: str  # "cpu" or "13.0"
    pythons: tuple[str, ...]  # interpreters to build resona_ext._C for
    output: Path
    folder: Path  # everything in between, kept for the next run

    @property
    def label(self) -> str:
        """The local version label: cpu, cu130."""
        return self.cuda if self.cuda == "cpu" else "cu" + self.cuda.replace(".", "")


def build(order: Order) -> Path:
    """Build, check and record one wheel; return its path."""
    toolkit.check_version(order.cuda)
    _check_machine(order)
    work = order.folder / f"wheel-{order.label}"
    environment = _environment(order, work)
    tag = f"{TAG}_{platform.machine()}"
    record = _run_setup(order, work, environment, tag)
    wheel = _newest_wheel(work)
    honest = audit.platform_tag(wheel)
    if _glibc_of(honest) > _glibc_of(tag):
        print(f"{wheel.name} asks for more than {tag}: it is a {honest} wheel", flush=True)
        tag = honest
        _run_setup(order, work, environment, tag)
        wheel = _newest_wheel(work)
    promises = audit.check(wheel)
    order.output.mkdir(parents=True, exist_ok=True)
    finished = order.output / wheel.name
    unfinished = finished.with_suffix(".part")
    shutil.copyfile(wheel, unfinished)
    unfinished.replace(finished)
    _write_record(order, work / "record.json", record, finished)
    print(f"\n{finished}: {finished.stat().st_size / 1e6:.1f} MB")
    print("".join(f"  {promise}\n" for promise in promises), end="")
    print(
        f"  {record.seconds:.0f} s, {record.peak_bytes / 1e9:.2f} GB of memory; record: {work}/record.json"
    )
    return finished


def _check_machine(order: Order) -> None:
    if sys.platform != "linux":
        raise WheelError(f"make wheel: expected Linux, got {sys.platform}; use pip wheel . there")
    for program in ("cmake", "ninja", "g++", "readelf"):
        if shutil.which(program, path=_path()) is None:
            raise WheelError(
                f"make wheel: expected {program} on PATH, got none. pip install cmake ninja, and g++ and "
                "binutils from your system."
            )
    audit.check_tools()
    order.folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(order.folder).free
    if free < DISK_BYTES:
        raise WheelError(
            f"{order.folder}: expected {DISK_BYTES / 2**20:.0f} MB of free disk, got {free / 2**20:.0f} "
            "MB. Make room, or choose another folder with --build."
        )


def _path() -> str:
    """PATH, behind the programs that pip put beside this Python, activated or not."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])


def _environment(order: Order, work: Path) -> dict[str, str]:
    """What setup.py and CMake are told."""
    settings = {
        "PATH": _path(),
        "RESONA_WHEEL_LABEL": order.label,
        "RESONA_USE_CUDA": "0" if order.cuda == "cpu" else "1",
        "RESONA_BUILD_DIR": str(work / "cmake"),
        "RESONA_PYBIND": "1" if order.pythons else "0",
        "RESONA_PYTHONS": os.pathsep.join(order.pythons),
        "SOURCE_DATE_EPOCH": os.environ.get("SOURCE_DATE_EPOCH") or _date_of_sources(),
        # The order of a dictionary and of a zip's entries must not depend on the run.
        "PYTHONHASHSEED": "0",
    }
    if platform.machine() == "x86_64":
        settings["RESONA_LINK_STUBS"] = str(old_glibc.write_stubs(work / "stubs"))
    if order.cuda != "cpu":
        settings["CUDACXX"] = toolkit.find(order.cuda, order.folder / "cuda-toolkit")
        toolkit.check_compiles(settings["CUDACXX"], architectures(), work)
        print(f"CUDA {order.cuda}: {settings['CUDACXX']}", flush=True)
    return {**os.environ, **settings}


def architectures() -> list[str]:
    """What will be compiled for, without dots: CMakeLists.txt reads the same variable."""
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").replace(",", " ").split()
    return [entry.partition("+")[0].replace(".", "") for entry in listed] or DEFAULT_ARCHITECTURES


def _run_setup(order: Order, work: Path, environment: dict[str, str], tag: str) -> watch.Record:
    packed = work / "packed"  # what goes into the wheel; objects stay in work / "cmake"
    shutil.rmtree(packed, ignore_errors=True)
    shutil.rmtree(work / "wheel", ignore_errors=True)
    # Its own commands and not `pip wheel`, so that what was compiled stays for the next run.
    command = [sys.executable, "-W", "ignore", "setup.py", "--quiet"]
    command += ["egg_info", f"--egg-base={_made(work / 'egg')}"]
    command += ["build", f"--build-base={work / 'base'}", f"--build-lib={packed}"]
    command += ["bdist_wheel", f"--bdist-dir={work / 'bdist'}", f"--dist-dir={work / 'wheel'}"]
    command += [f"--plat-name={tag}"]
    record = watch.run(command, environment, ROOT)
    if record.status:
        raise WheelError(
            f"the build of {order.label} stopped with status {record.status}; its messages are above. What "
            "was compiled is kept, the same command goes on from there. If a compiler was killed, memory "
            "ran out: try MAX_JOBS=1 NVCC_THREADS=1."
        )
    return record


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _newest_wheel(work: Path) -> Path:
    (wheel,) = (work / "wheel").glob("*.whl")
    return wheel


def _glibc_of(tag: str) -> tuple[int, int]:
    """(2, 28) of manylinux_2_28_x86_64; a plain linux tag promises nothing and comes after all."""
    parts = tag.split("_")
    return (int(parts[1]), int(parts[2])) if parts[0] == "manylinux" else (1 << 30, 0)


def _date_of_sources() -> str:
    """The commit's time, so that a wheel built tomorrow has the same bytes; else the first that zip knows."""
    command = ["git", "log", "-1", "--format=%ct"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    except OSError:
        return "315532800"
    return done.stdout.strip() or "315532800"


def _write_record(order: Order, path: Path, record: watch.Record, wheel: Path) -> None:
    variables = ("TORCH_CUDA_ARCH_LIST", "MAX_JOBS", "NVCC_THREADS")
    command = [f"{v}={shlex.quote(os.environ[v])}" for v in variables if os.environ.get(v)]
    facts = {
        "command": " ".join([*command, "make", "wheel", f"CUDA={order.cuda}"]),
        "wheel": wheel.name,
        "wheel_bytes": wheel.stat().st_size,
        "modules": [name for name in zipfile.ZipFile(wheel).namelist() if "/_C." in name],
        "cores": os.cpu_count(),
        **asdict(record),
    }
    facts["compilations"] = dict(
        sorted(facts["compilations"].items(), key=lambda item: -item[1]["peak_bytes"])
    )
    path.write_text(json.dumps(facts, indent=1) + "\n")
