"""The tables of tests/distributed over NCCL, a process for each of 1, 2 or 4 GPUs. Has not run yet."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))

from layer_cases import check_caches, check_layers
from processes import run
from sharded_cases import check_all

HAS_KERNELS = torch.cuda.is_available() and (
    json.loads(torch.ops.resona._build_info())["cuda"] != "none"
)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HAS_KERNELS, reason="no CUDA device, or a library without CUDA"),
]


@pytest.mark.parametrize("check", [check_all, check_layers, check_caches])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_agree_with_one_device(ranks, check, tmp_path):
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"{ranks} processes want as many GPUs, got {torch.cuda.device_count()}")
    for result in run(ranks, check, "cuda", folder=tmp_path, backend="nccl"):
        assert result == ("returned", {}), result
