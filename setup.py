"""Drives CMake. Imports no torch and fetches nothing, so metadata and sdist need neither.

Environment: RESONA_USE_CUDA (auto, 0, 1), RESONA_PYBIND (auto, 0, 1), MAX_JOBS, CMAKE_ARGS; for CUDA also
TORCH_CUDA_ARCH_LIST, CUDACXX, CUDA_HOME and NVCC_THREADS. tools/wheel sets RESONA_WHEEL_LABEL,
RESONA_PYTHONS, RESONA_LINK_STUBS and RESONA_BUILD_DIR too.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
VERSION = (ROOT / "resona_ext" / "version.py").read_text().split('"')[1]
# Of PEP 440's local labels (0.1.0+cu130), which never go to PyPI.
LABEL = os.environ.get("RESONA_WHEEL_LABEL")
# Peaks of one compilation: g++ 12 0.44 GB (csrc/python/module.cpp), nvcc 13.0 with two architectures at a
# time 0.30 GB (csrc/cuda/attend_chunk.cu); benchmarks/results/wheels.json has them all.
HOST_BYTES = 1 << 29
DEVICE_BYTES_PER_THREAD = 1 << 28


def count(variable: str, default: int) -> int:
    """A positive number from the environment."""
    text = os.environ.get(variable) or str(default)
    if not text.isdigit() or int(text) < 1:
        raise SystemExit(f"resona_ext: {variable}: expected a number from 1 on, got {text!r}")
    return int(text)


def nvcc_threads() -> int:
    """Architectures that one nvcc compiles at a time."""
    return count("NVCC_THREADS", 2)


def available_memory() -> int | None:
    """What the system can give without swapping, and the container too; None where nobody knows."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(
            int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")
        )
    except (OSError, StopIteration):
        return None
    try:
        most = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        held = int(Path("/sys/fs/cgroup/memory.current").read_text())
    except (OSError, ValueError):
        return free
    return free if most == "max" else min(free, int(most) - held)


def jobs(cuda: bool) -> int:
    """Compilers at a time: as many as there are cores, and as fit into memory."""
    each = max(HOST_BYTES, DEVICE_BYTES_PER_THREAD * nvcc_threads()) if cuda else HOST_BYTES
    memory = available_memory()
    fit = 1 if memory is None else memory // each
    return count("MAX_JOBS", max(1, min(os.cpu_count() or 1, fit)))


def find_nvcc() -> str | None:
    """The compiler that the environment names, else one on PATH, else what `make cuda-toolkit` brought."""
    home = os.environ.get("CUDA_HOME")
    brought = sorted((ROOT / "build" / "cuda-toolkit").glob("*/nvidia/cu13/bin"))
    return (
        os.environ.get("CUDACXX")
        or (home and shutil.which("nvcc", path=os.path.join(home, "bin")))
        or shutil.which("nvcc")
        # The oldest: every driver that runs CUDA 13 can translate the PTX that 13.0 writes.
        or (shutil.which("nvcc", path=str(brought[0])) if brought else None)
    )


def cmake_list(variable: str) -> str:
    """Paths from the environment, as CMake separates them."""
    return ";".join(filter(None, os.environ.get(variable, "").split(os.pathsep)))


def forget_other_compiler(build: Path, nvcc: str | None) -> None:
    """CMake keeps the first compiler that it was told of, and also that it found none."""
    cache = build / "CMakeCache.txt"
    text = cache.read_text() if cache.exists() else ""
    known = re.search(r"^CMAKE_CUDA_COMPILER:\w+=(.*)$", text, re.MULTILINE)
    if known and known[1] != (nvcc or "NOTFOUND"):
        cache.unlink()
        for detected in build.glob("CMakeFiles/[0-9]*"):
            shutil.rmtree(detected)


def compiler_cache() -> list[str]:
    """ccache where it is on PATH, unless the environment names a launcher of its own."""
    ccache = shutil.which("ccache")
    return [
        f"-DCMAKE_{language}_COMPILER_LAUNCHER={ccache}"
        for language in ("CXX", "CUDA")
        if ccache and f"CMAKE_{language}_COMPILER_LAUNCHER" not in os.environ
    ]


class CMakeBuild(build_ext):
    """One CMake run builds the operator library and, where pybind11 is at hand, resona_ext._C."""

    def get_ext_filename(self, name: str) -> str:
        if name.endswith("libresona"):  # no Python symbols, so no Python tag
            return os.path.join(*name.split(".")[:-1], "libresona.so")
        return super().get_ext_filename(name)

    def build_extensions(self) -> None:
        target = Path(self.get_ext_fullpath("resona_ext.libresona")).resolve().parent
        default = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        build = Path(os.environ.get("RESONA_BUILD_DIR") or default)
        try:
            build.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SystemExit(
                f"resona_ext: {build}: expected a folder to build in, got: {error.strerror}. Set "
                "RESONA_BUILD_DIR to one that can be written."
            ) from error
        ninja = shutil.which("ninja")
        if shutil.which("cmake") is None or ninja is None:
            raise SystemExit(
                "resona_ext: building needs cmake and ninja on PATH: pip install cmake ninja pybind11"
            )
        for stale in target.glob("_C.*.so"):  # else RESONA_PYBIND=0 would package the last one
            stale.unlink()
        cuda = os.environ.get("RESONA_USE_CUDA", "auto")
        nvcc = find_nvcc() if cuda != "0" else None
        forget_other_compiler(build, nvcc)
        configure = [
            "cmake",
            f"-S{ROOT}",
            f"-B{build}",
            "-GNinja",
            # The cache may name the ninja of a build environment that is gone.
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            f"-DPython3_EXECUTABLE={sys.executable}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}",
            f"-DRESONA_VERSION={VERSION}",
            f"-DRESONA_USE_CUDA={cuda}",
            *([f"-DCMAKE_CUDA_COMPILER={nvcc}"] if nvcc else []),
            f"-DRESONA_PYBIND={os.environ.get('RESONA_PYBIND', 'auto')}",
            f"-DRESONA_PYTHONS={cmake_list('RESONA_PYTHONS')}",
            f"-DRESONA_LINK_STUBS={os.environ.get('RESONA_LINK_STUBS', '')}",
            f"-DRESONA_NVCC_THREADS={nvcc_threads()}",
            *compiler_cache(),
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        parallel = str(jobs(cuda=nvcc is not None))
        for command in (configure, ["cmake", "--build", str(build), "--parallel", parallel]):
            if status := subprocess.call(command):
                raise SystemExit(
                    f"resona_ext: `{command[0]} {command[1]}` stopped with status {status}"
                )
        self.extensions = [
            e for e in self.extensions if Path(self.get_ext_fullpath(e.name)).exists()
        ]


class Wheel(bdist_wheel):
    """For every Python: the library has no symbols of Python, and resona_ext._C is optional at import."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    version=f"{VERSION}+{LABEL}" if LABEL else VERSION,
    # Named here, and not left to plug-ins: other build tools in the environment may register one that
    # would take over build_ext.
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": Wheel},
    ext_modules=[Extension("resona_ext.libresona", []), Extension("resona_ext._C", [])],
)
