"""Peers that are used from a checkout of yours: Triton native sparse attention and FlashMoBA.

None of their code is here. Not yet run: written against the functions that their repositories
document (XunhaoLai/native-sparse-attention-triton, mit-han-lab/flash-moba 2.0).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ..data import Case
from . import Baseline, Checkouts, Forward, import_reason, importable, low_precision_only, needs_gpu

NSA_MODULE = "native_sparse_attention.ops.triton.topk_sparse_attention"
MOBA_MODULE = "flash_moba.flash_moba_interface"


def _missing(option: str, module: str, path_of: Callable[[Checkouts], Path | None]):
    def missing(device: str, checkouts: Checkouts) -> str | None:
        path = path_of(checkouts)
        if path is None:
            return f"no checkout given ({option} PATH)"
        if needs_gpu(device):
            return needs_gpu(device)
        if str(path) not in sys.path:
            sys.path.insert(0, str(path))
        return import_reason(module)

    return missing


def _borders(case: Case) -> Tensor:
    s = case.shape
    return torch.arange(s.batch + 1, dtype=torch.int32, device=case.device) * s.length


def _build_nsa(case: Case, checkouts: Checkouts) -> Forward:
    attention = importable(NSA_MODULE).topk_sparse_attention
    s, borders = case.shape, _borders(case)
    # [Hkv, tokens, k], used slots first: as ours, repeated for the heads that share a selection.
    per_head = case.indices.flatten(0, 1).transpose(0, 1)
    per_head = per_head.repeat_interleave(s.kv_heads // s.retrieval_heads, dim=0).contiguous()

    def function(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        packed = (x.flatten(0, 1) for x in (query, key, value))
        return attention(*packed, per_head, s.chunk_size, borders).view_as(query)

    return Forward(function)


def _nsa_unfit(case: Case) -> str | None:
    s = case.shape
    if s.chunk_size < 16 or s.chunk_size & (s.chunk_size - 1):
        return "chunk size must be a power of two from 16"
    if s.head_dim > 128:
        return "head dim at most 128"
    return low_precision_only(case)


def _build_moba(case: Case, checkouts: Checkouts) -> Forward:
    attention = importable(MOBA_MODULE).flash_moba_varlen_func
    s, borders = case.shape, _borders(case)

    def function(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        packed = (x.flatten(0, 1) for x in (query, key, value))
        lengths = (borders, borders, s.length, s.length)
        out = attention(*packed, *lengths, s.chunk_size, s.top_k, causal=True)
        return out.view_as(query)

    return Forward(function)


def _moba_unfit(case: Case) -> str | None:
    s = case.shape
    if s.chunk_size % 64:
        return "chunk size must be a multiple of 64"
    if s.top_k < 3:
        return "top-k below 3 leaves no rows that the check knows"
    return low_precision_only(case)


BASELINES = (
    Baseline(
        "nsa",
        "Triton native sparse attention, our selection (--nsa PATH)",
        "selected",
        ("attend", "backward"),
        _missing("--nsa", NSA_MODULE, lambda checkouts: checkouts.nsa),
        _nsa_unfit,
        _build_nsa,
    ),
    Baseline(
        "flashmoba",
        "FlashMoBA: own chunk forced, search per head (--flashmoba PATH)",
        "moba",
        ("fused", "backward"),
        _missing("--flashmoba", MOBA_MODULE, lambda checkouts: checkouts.flashmoba),
        _moba_unfit,
        _build_moba,
    ),
)
