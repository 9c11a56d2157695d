"""Whether the CUDA operators can run here, why not, and what to do about it.

`verdict` is a pure function of `Facts`. Nothing here starts CUDA: a process may import resona_ext and fork.
"""

from __future__ import annotations

import ctypes
import re
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch

OLDEST_CAPABILITY = (8, 0)
# The oldest Linux driver of each CUDA. It runs the machine code of every minor version.
OLDEST_DRIVER = {12: "525.60.13", 13: "580.65.06"}


@dataclass(frozen=True)
class Gpu:
    name: str
    capability: tuple[int, int]


@dataclass(frozen=True)
class Facts:
    built_with: str  # "none", or nvcc's version such as "13.0.88"
    architectures: tuple[str, ...]  # as cuobjdump names them: sm_90a, compute_80
    torch_version: str
    torch_cuda: str | None
    driver: tuple[int, int] | None  # the newest CUDA that the driver knows
    gpus: tuple[Gpu, ...] | None = field(default=None)  # None: not asked for


@dataclass(frozen=True)
class Verdict:
    usable: bool
    reason: str
    remedy: str | None = None


def verdict(facts: Facts) -> Verdict:
    """The first thing that stands between the CUDA operators and a GPU."""
    if facts.built_with == "none":
        return Verdict(
            False,
            "this build of resona_ext has no CUDA kernels",
            "install a wheel with them (resona_ext-...+cu130-...), or build it where nvcc is on PATH, with "
            "RESONA_USE_CUDA=1",
        )
    if facts.driver is None:
        return Verdict(
            False,
            "no NVIDIA driver was found",
            "install one, and in a container start it with access to the GPU (docker run --gpus all)",
        )
    if facts.torch_cuda is None:
        return Verdict(
            False,
            f"torch {facts.torch_version} is a build without CUDA",
            "install a CUDA build of torch >= 2.11",
        )
    major, minor = map(int, facts.built_with.split(".")[:2])
    if facts.driver[0] < major:
        return Verdict(
            False,
            f"the driver knows CUDA up to {_dotted(facts.driver)}, resona_ext was built with CUDA "
            f"{major}.{minor}",
            f"install driver {OLDEST_DRIVER.get(major, f'for CUDA {major}')} or newer, or build resona_ext "
            f"with CUDA {facts.driver[0]}",
        )
    if facts.gpus is None:
        return Verdict(True, "driver and torch can run it")
    return _verdict_on_gpus(facts, (major, minor))


def _verdict_on_gpus(facts: Facts, built_with: tuple[int, int]) -> Verdict:
    if not facts.gpus:
        return Verdict(
            False,
            "torch sees no GPU",
            "compare with nvidia-smi, and look at CUDA_VISIBLE_DEVICES",
        )
    choices = []
    for gpu in facts.gpus:
        where = f"{gpu.name} (compute capability {_dotted(gpu.capability)})"
        if gpu.capability < OLDEST_CAPABILITY:
            needed = f"the kernels need {_dotted(OLDEST_CAPABILITY)} or newer"
            return Verdict(
                False, f"{where}: {needed}", "use another GPU, or the operators on the CPU"
            )
        image = image_for(gpu.capability, facts.architectures, facts.driver >= built_with)
        if image is None:
            listed = " ".join(facts.architectures)
            return Verdict(
                False,
                f"{where}: none of the images in the library runs there: {listed}"
                + _ptx_note(facts.architectures, facts.driver, built_with),
                f"build for it: TORCH_CUDA_ARCH_LIST={_dotted(gpu.capability)}",
            )
        how = "translated by the driver for" if image.startswith("compute_") else "runs on"
        choices.append(f"{image} {how} {where}")
    return Verdict(True, "; ".join(dict.fromkeys(choices)))


def image_for(
    capability: tuple[int, int], architectures: tuple[str, ...], ptx: bool = True
) -> str | None:
    """What CUDA takes from the library: machine code of the same major version, else PTX."""
    machine, portable = [], []
    for name in architectures:
        kind, major, minor, suffix = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", name).groups()
        built_for = (int(major), int(minor))
        if suffix == "a":
            fits = built_for == capability
        elif suffix == "f" or kind == "sm":
            fits = built_for[0] == capability[0] and built_for <= capability
        else:
            fits = built_for <= capability
        if fits and (kind == "sm" or ptx):
            # A suffix comes last: its image knows more of the GPU.
            (machine if kind == "sm" else portable).append((built_for, suffix != "", name))
    best = max(machine or portable, default=None)
    return best[-1] if best else None


def collect(built_with: str, architectures: list[str], gpus: bool) -> Facts:
    """What is known of this machine; with `gpus` torch is asked for them, which starts CUDA."""
    devices = None
    if gpus:
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        devices = tuple(
            Gpu(torch.cuda.get_device_name(i), torch.cuda.get_device_capability(i))
            for i in range(count)
        )
    return Facts(
        built_with,
        tuple(architectures),
        torch.__version__,
        torch.version.cuda,
        driver_cuda(),
        devices,
    )


def driver_cuda() -> tuple[int, int] | None:
    """The newest CUDA that the driver of this machine knows, None without a driver."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        version = ctypes.c_int(0)
        if driver.cuDriverGetVersion(ctypes.byref(version)) != 0:
            return None
    except (OSError, AttributeError):
        return None
    return version.value // 1000, version.value % 1000 // 10


def driver_release() -> str | None:
    """Such as 580.65.06, where the kernel module tells."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return None
    found = re.search(r"\b\d{3,}\.\d+(\.\d+)?\b", text)
    return found[0] if found else None


def warn_if_expected(facts: Facts) -> None:
    """One warning at import, where there is a driver and yet the operators cannot use the GPU."""
    if facts.driver is None:
        return
    found = verdict(facts)
    if not found.usable:
        warnings.warn(
            f"resona_ext: CUDA is not usable, the CPU operators are: {found.reason}. What to do: "
            f"{found.remedy}. `python -m resona_ext info` has the details.",
            stacklevel=2,
        )


def _ptx_note(
    architectures: tuple[str, ...], driver: tuple[int, int], built_with: tuple[int, int]
) -> str:
    has_ptx = any(name.startswith("compute_") for name in architectures)
    if not has_ptx or driver >= built_with:
        return ""
    return f" (PTX of CUDA {_dotted(built_with)} needs a driver newer than CUDA {_dotted(driver)})"


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"
