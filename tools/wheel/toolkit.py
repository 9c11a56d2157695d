"""A CUDA compiler of the version that was asked for: one that is installed, or one from pip.

CUDA 13 comes as pip packages, whose versions the metapackage cuda-toolkit pins. CUDA 12 does not: its
nvidia-cuda-nvcc-cu12 holds the assembler alone.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from .errors import WheelError

# CUDA -> cuda-toolkit. A newer CUDA takes one line more.
RELEASES = {
    "13.0": "13.0.2",
    "13.1": "13.1.1",
    "13.2": "13.2.2",
    "13.3": "13.3.1",
    "13.4": "13.4.3",
    "13.5": "13.5.0",
}
# cccl holds headers that cuda_fp16.h and cuda_bf16.h include.
PARTS = "nvcc,crt,nvvm,cccl,cudart"
DISK_BYTES = 1 << 30  # 0.35 GB when unpacked (13.5), and pip's copy of the archives


def check_version(cuda: str) -> None:
    """Raises unless `cuda` is cpu or a version that some compiler could have."""
    if cuda != "cpu" and not re.fullmatch(r"1[2-9]\.\d+", cuda):
        raise WheelError(
            f"CUDA: expected cpu or a version such as {next(iter(RELEASES))}, got {cuda!r}. pip has the "
            f"compilers {', '.join(RELEASES)}."
        )


def version_of(nvcc: str) -> str | None:
    """Major and minor version of a compiler; None where it does not run."""
    try:
        done = subprocess.run([nvcc, "--version"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.search(r"release (\d+\.\d+)", done.stdout)
    return found[1] if found else None


def installed() -> dict[str, str]:
    """Compilers of this machine and their versions, those that the environment names first."""
    home = os.environ.get("CUDA_HOME")
    candidates = [
        os.environ.get("CUDACXX"),
        home and str(Path(home) / "bin" / "nvcc"),
        shutil.which("nvcc"),
    ]
    known = {path: version_of(path) for path in candidates if path}
    return {path: version for path, version in known.items() if version}


def find(cuda: str, folder: Path) -> str:
    """Path of an nvcc of version `cuda`; where none is installed, pip brings it into a folder in `folder`."""
    here = installed()
    for path, version in here.items():
        if version == cuda:
            return path
    if cuda in RELEASES:
        return bring(cuda, folder)
    found = ", ".join(f"{path} ({version})" for path, version in here.items()) or "no nvcc"
    raise WheelError(
        f"CUDA {cuda}: expected an installed compiler of that version, as pip has only "
        f"{', '.join(RELEASES)}; got {found}. Install the CUDA {cuda} toolkit and name it with CUDA_HOME, or "
        "choose one of pip's versions."
    )


def bring(cuda: str, toolkits: Path) -> str:
    """Install the packages of CUDA 13.x, whole or not at all, and return the path of nvcc."""
    if cuda not in RELEASES:
        raise WheelError(
            f"CUDA: expected one of {', '.join(RELEASES)}, which pip has, got {cuda!r}"
        )
    folder = toolkits / cuda
    nvcc = folder / "nvidia" / "cu13" / "bin" / "nvcc"
    wanted = f"cuda-toolkit[{PARTS}]=={RELEASES[cuda]}"
    stamp = folder / ".ready"
    if stamp.exists() and stamp.read_text() == wanted:
        return str(nvcc)
    folder.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder.parent).free
    if free < DISK_BYTES:
        raise WheelError(
            f"{folder}: expected {DISK_BYTES / 2**30:.0f} GB of free disk for the CUDA compiler, got "
            f"{free / 2**30:.1f} GB. Make room, or choose another folder with --build."
        )
    print(f"bringing {wanted} into {folder}", flush=True)
    unfinished = folder.with_name(folder.name + ".part")
    shutil.rmtree(unfinished, ignore_errors=True)
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--target",
        str(unfinished),
        wanted,
    ]
    if subprocess.run(command).returncode:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise WheelError(
            f"CUDA {cuda}: pip could not install {wanted} (its message is above). Check that a package "
            "index is within reach (PIP_INDEX_URL), or install the toolkit and name it with CUDA_HOME."
        )
    (unfinished / "nvidia" / "cu13" / "lib64").symlink_to(
        "lib"
    )  # where nvcc looks for its libraries
    (unfinished / ".ready").write_text(wanted)
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)
    return str(nvcc)


def check_compiles(nvcc: str, architectures: list[str], folder: Path) -> None:
    """Raises where the compiler knows not all architectures, or does not take the C++ compiler here."""
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / "probe.cu"
    source.write_text("#include <cuda_runtime_api.h>\n__global__ void probe() {}\n")
    codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures]
    command = [nvcc, "-std=c++17", *codes, "-c", str(source), "-o", str(folder / "probe.o")]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return
    lines = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()]
    reason = next((line for line in lines if "error" in line or "fatal" in line), lines[-1:] or "")
    raise WheelError(
        f"{nvcc} ({version_of(nvcc)}) cannot compile for {', '.join(architectures)}: {reason}. Set "
        "TORCH_CUDA_ARCH_LIST to GPUs that it knows (CUDA 12.8 is the first with 10.0 and 12.0), or "
        "NVCC_CCBIN to a C++ compiler that it takes."
    )
