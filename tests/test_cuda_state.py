"""Whether CUDA is usable, why not and what to do: a table of machines, and machines made up for a process."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from resona_ext import _cuda, cli
from resona_ext._cuda import Facts, Gpu

ROOT = Path(__file__).parents[1]
HAS_CUDA = json.loads(torch.ops.resona._build_info())["cuda"] != "none"

WHEEL = ("sm_80", "sm_90a", "sm_100", "sm_120", "compute_80")
H200 = Gpu("NVIDIA H200", (9, 0))
GOOD = Facts("13.0.88", WHEEL, "2.13.0", "13.0", (13, 0), (H200,))

# What differs from GOOD, then parts of the reason and of the remedy
UNUSABLE = {
    "cpu build": (
        {"built_with": "none", "architectures": ()},
        "has no CUDA kernels",
        "install a wheel with them",
    ),
    "no driver": ({"driver": None}, "no NVIDIA driver was found", "--gpus all"),
    "cpu torch": (
        {"torch_cuda": None, "torch_version": "2.13.0+cpu"},
        "torch 2.13.0+cpu is a build without CUDA",
        "CUDA build of torch >= 2.11",
    ),
    "old driver": (
        {"driver": (12, 8)},
        "the driver knows CUDA up to 12.8, resona_ext was built with CUDA 13.0",
        "driver 580.65.06 or newer, or build resona_ext with CUDA 12",
    ),
    "no gpu": ({"gpus": ()}, "torch sees no GPU", "CUDA_VISIBLE_DEVICES"),
    "old gpu": (
        {"gpus": (Gpu("Tesla T4", (7, 5)),)},
        "Tesla T4 (compute capability 7.5): the kernels need 8.0",
        "another GPU",
    ),
    "missing image": (
        {"architectures": ("sm_90a", "sm_120"), "gpus": (Gpu("A100", (8, 0)),)},
        "A100 (compute capability 8.0): none of the images in the library runs there: sm_90a sm_120",
        "TORCH_CUDA_ARCH_LIST=8.0",
    ),
    "second gpu": (
        {"architectures": ("sm_90a",), "gpus": (H200, Gpu("A100", (8, 0)))},
        "A100",
        "TORCH_CUDA_ARCH_LIST=8.0",
    ),
    "ptx of a newer compiler": (
        {"built_with": "13.5.37", "gpus": (Gpu("Future", (14, 0)),)},
        "PTX of CUDA 13.5 needs a driver newer than CUDA 13.0",
        "TORCH_CUDA_ARCH_LIST=14.0",
    ),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_why_it_is_not_usable(case):
    changes, reason, remedy = UNUSABLE[case]
    found = _cuda.verdict(replace(GOOD, **changes))
    assert not found.usable and reason in found.reason and remedy in found.remedy


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, "sm_90a runs on NVIDIA H200 (compute capability 9.0)"),
        # minor versions of one major serve each other, as far as machine code goes
        ({"built_with": "13.5.37"}, "sm_90a runs on"),
        ({"driver": (14, 0)}, "sm_90a runs on"),
        ({"gpus": (Gpu("Thor", (11, 0)),)}, "compute_80 translated by the driver for Thor"),
        ({"gpus": (H200, H200, Gpu("L4", (8, 9)))}, "sm_80 runs on L4"),
    ],
)
def test_why_it_is_usable(changes, reason):
    found = _cuda.verdict(replace(GOOD, **changes))
    assert found.usable and reason in found.reason and found.remedy is None


@pytest.mark.parametrize(
    ("capability", "architectures", "image"),
    [
        ((8, 0), WHEEL, "sm_80"),
        ((8, 9), WHEEL, "sm_80"),
        ((9, 0), WHEEL, "sm_90a"),
        ((10, 0), WHEEL, "sm_100"),
        ((10, 3), WHEEL, "sm_100"),
        ((12, 1), WHEEL, "sm_120"),
        ((11, 0), WHEEL, "compute_80"),
        ((13, 0), WHEEL, "compute_80"),
        ((8, 0), ("sm_86",), None),
        ((8, 9), ("sm_80", "sm_86", "sm_89"), "sm_89"),
        ((9, 0), ("sm_90", "sm_90a"), "sm_90a"),
        ((10, 3), ("sm_100a",), None),
        ((10, 3), ("sm_100f",), "sm_100f"),
        ((12, 0), ("sm_100f", "compute_90a"), None),
        ((12, 0), ("compute_80", "compute_90"), "compute_90"),
        ((9, 0), (), None),
    ],
)
def test_image_that_cuda_takes(capability, architectures, image):
    assert _cuda.image_for(capability, architectures) == image


def test_no_driver_no_warning(recwarn):
    """On a machine without a GPU the CPU operators are what is wanted."""
    _cuda.warn_if_expected(replace(GOOD, driver=None, gpus=None))
    _cuda.warn_if_expected(replace(GOOD, gpus=None))
    assert not recwarn.list


@pytest.fixture
def driver(tmp_path):
    """A libcuda.so.1 that knows CUDA 12.8, for processes that get its folder as LD_LIBRARY_PATH."""
    if shutil.which("gcc") is None or sys.platform != "linux":
        pytest.skip("needs gcc on Linux")
    source = tmp_path / "driver.c"
    source.write_text("int cuDriverGetVersion(int* v) { *v = 12080; return 0; }\n")
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", tmp_path / "libcuda.so.1", source], check=True)
    return tmp_path


@pytest.mark.parametrize("torch_cuda", ["None", "'12.8'"])
def test_import_says_once_why_cuda_is_not_usable_and_works_on_the_cpu(driver, torch_cuda):
    code = (
        f"import torch; torch.version.cuda = {torch_cuda}\n"
        "import warnings; warnings.simplefilter('always')\n"
        "import resona_ext\n"
        "for _ in range(3): print(resona_ext.pool_chunks(torch.ones(1, 4, 1, 4), 2).shape)\n"
        "import resona_ext.layer"
    )
    environment = {**os.environ, "LD_LIBRARY_PATH": str(driver)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("torch.Size([1, 2, 1, 4])") == 3
    assert done.stderr.count("resona_ext: CUDA is not usable, the CPU operators are: ") == 1
    if not HAS_CUDA:
        reason = "has no CUDA kernels"
    elif torch_cuda == "None":
        reason = "is a build without CUDA"
    else:
        reason = "the driver knows CUDA up to 12.8, resona_ext was built with CUDA 13"
    assert reason in done.stderr and "What to do: " in done.stderr


def test_driver_that_refuses(monkeypatch):
    class Driver:
        def cuDriverGetVersion(self, version):
            return 3  # CUDA_ERROR_NOT_INITIALIZED

    monkeypatch.setattr(_cuda.ctypes, "CDLL", lambda name: Driver())
    assert _cuda.driver_cuda() is None


def test_import_does_not_start_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: pytest.fail("CUDA was asked"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: pytest.fail("CUDA was asked"))
    assert _cuda.collect("13.0.88", list(WHEEL), gpus=False).gpus is None


def test_info_tells_the_state_of_cuda(capsys):
    assert cli.main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)["cuda"]
    assert facts["torch cuda"] == torch.version.cuda
    assert len(facts["gpus"]) == (torch.cuda.device_count() if torch.cuda.is_available() else 0)
    assert facts["usable"] == (facts["what to do"] is None) and facts["why"]
    if not HAS_CUDA:
        assert "has no CUDA kernels" in facts["why"]


def test_info_on_a_good_machine(monkeypatch, capsys):
    monkeypatch.setattr(_cuda, "collect", lambda *_, **__: GOOD)
    assert cli.main(["info"]) == 0
    printed = capsys.readouterr().out
    for part in ("NVIDIA H200", "sm_90a runs on", "13.0", "usable             yes"):
        assert part in printed


# --- a kernel without an image ---------------------------------------------------------------------

MISSING_IMAGE = """
#include "cuda/launch.cu"
#include <cstdio>
// Stands in for the CUDA runtime.
extern "C" cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void*) { return cudaError_t(ERROR); }
extern "C" cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
extern "C" cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t*, const void*, void**) {
  return cudaSuccess;
}
extern "C" cudaError_t cudaGetLastError() { return cudaSuccess; }
extern "C" const char* cudaGetErrorName(cudaError_t) { return "its name"; }
extern "C" const char* cudaGetErrorString(cudaError_t) { return "its text"; }
std::string resona::cuda_architectures() { return "sm_80 sm_90a"; }
int main() {
  try {
    resona::cuda::detail::launch({"some_kernel", {1}, 32}, {nullptr, 0}, nullptr, nullptr);
  } catch (const std::runtime_error& error) { std::puts(error.what()); }
}
"""


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
@pytest.mark.parametrize(("error", "told"), [("209", True), ("222", True), ("700", False)])
def test_a_missing_image_names_those_built_in(error, told, tmp_path):
    """209: no kernel image for the device, 222: PTX newer than the driver, 700: another error."""
    source = tmp_path / "missing.cu"
    source.write_text(MISSING_IMAGE.replace("ERROR", error, 1))
    program = tmp_path / "missing"
    command = ["nvcc", "-std=c++17", "-x", "c++", f"-I{ROOT / 'csrc'}", "-cudart", "none"]
    subprocess.run([*command, source, "-o", program], check=True)
    text = subprocess.run([program], check=True, capture_output=True, text=True).stdout
    assert "resona::cuda: some_kernel: expected success of cudaFuncGetAttributes" in text
    assert ("built for sm_80 sm_90a; TORCH_CUDA_ARCH_LIST" in text) is told
