"""Drives CMake. Imports no torch and fetches nothing, so metadata and sdist need neither.

Environment: RESONA_USE_CUDA (auto, 0, 1), RESONA_PYBIND (auto, 0, 1), MAX_JOBS, CMAKE_ARGS; for CUDA also
TORCH_CUDA_ARCH_LIST, CUDACXX and CUDA_HOME.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
VERSION = (ROOT / "resona_ext" / "version.py").read_text().split('"')[1]
# A compiler peaks at 0.22 GB (g++ 12 on csrc/ops/register.cpp) or 0.25 GB (nvcc 13.0 on csrc/cuda/launch.cu),
# and nvcc runs two at a time.
BYTES_PER_JOB = 1 << 29


def jobs() -> int:
    if os.environ.get("MAX_JOBS"):
        return max(1, int(os.environ["MAX_JOBS"]))
    try:
        memory = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        memory = BYTES_PER_JOB
    return max(1, min(os.cpu_count() or 1, memory // BYTES_PER_JOB))


def find_nvcc() -> str | None:
    """The compiler that the environment names, else one on PATH, else what `make cuda-toolkit` brought."""
    home = os.environ.get("CUDA_HOME")
    brought = ROOT / "build" / "cuda-toolkit" / "nvidia" / "cu13" / "bin"
    return (
        os.environ.get("CUDACXX")
        or (home and shutil.which("nvcc", path=os.path.join(home, "bin")))
        or shutil.which("nvcc")
        or shutil.which("nvcc", path=str(brought))
    )


def forget_other_compiler(build: Path, nvcc: str | None) -> None:
    """CMake keeps the first compiler that it was told of, and also that it found none."""
    cache = build / "CMakeCache.txt"
    text = cache.read_text() if cache.exists() else ""
    known = re.search(r"^CMAKE_CUDA_COMPILER:\w+=(.*)$", text, re.MULTILINE)
    if known and known[1] != (nvcc or "NOTFOUND"):
        cache.unlink()
        for detected in build.glob("CMakeFiles/[0-9]*"):
            shutil.rmtree(detected)


class CMakeBuild(build_ext):
    """One CMake run builds the operator library and, where pybind11 is at hand, resona_ext._C."""

    def get_ext_filename(self, name: str) -> str:
        if name.endswith("libresona"):  # no Python symbols, so no Python tag
            return os.path.join(*name.split(".")[:-1], "libresona.so")
        return super().get_ext_filename(name)

    def build_extensions(self) -> None:
        target = Path(self.get_ext_fullpath("resona_ext.libresona")).resolve().parent
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        build.mkdir(parents=True, exist_ok=True)
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
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        subprocess.check_call(configure)
        subprocess.check_call(["cmake", "--build", str(build), "--parallel", str(jobs())])
        self.extensions = [
            e for e in self.extensions if Path(self.get_ext_fullpath(e.name)).exists()
        ]


setup(
    version=VERSION,
    # Named here, and not left to plug-ins: other build tools in the environment may register one that
    # would take over build_ext.
    cmdclass={"build_ext": CMakeBuild},
    ext_modules=[Extension("resona_ext.libresona", []), Extension("resona_ext._C", [])],
)
