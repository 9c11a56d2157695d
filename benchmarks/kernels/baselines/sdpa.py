"""torch.nn.functional.scaled_dot_product_attention with each of its back ends."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..data import Case
from . import Baseline, Checkouts, Forward, low_precision_only, needs_gpu

SCORE_LIMIT = 8 << 30  # bytes that the math back end may hold for its scores


def _build(backend: SDPBackend | None):
    def build(case: Case, checkouts: Checkouts) -> Forward:
        # is_causal aligns the mask at the start; one query at the end sees everything anyway.
        is_causal = case.shape.rows == case.shape.length
        grouped = case.shape.heads != case.shape.kv_heads

        def function(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            with sdpa_kernel(backend) if backend is not None else nullcontext():
                return torch.nn.functional.scaled_dot_product_attention(
                    query, key, value, is_causal=is_causal, enable_gqa=grouped
                )

        return Forward(function, heads_first=True)

    return build


def _alignment(case: Case) -> str | None:
    if case.shape.rows in (1, case.shape.length):
        return None
    return "its causal mask is aligned at the start, ours at the end: T must be 1 or L"


def _math_unfit(case: Case) -> str | None:
    s = case.shape
    scores = s.batch * s.heads * s.rows * s.length * 4
    if scores > SCORE_LIMIT:
        return f"would hold {scores / 2**30:,.0f} GiB of scores"
    return _alignment(case)


def _flash_missing(device: str, checkouts: Checkouts) -> str | None:
    return None if device == "cuda" else 'on a CPU flash is what "sdpa" uses'


def _low_precision(case: Case) -> str | None:
    return low_precision_only(case) or _alignment(case)


def _baseline(name, summary, backend, missing, unfit) -> Baseline:
    operators = ("attend", "fused", "backward", "decode")
    return Baseline(name, summary, "dense", operators, missing, unfit, _build(backend))


BASELINES = (
    _baseline("sdpa", "torch SDPA, its own choice", None, lambda *_: None, _alignment),
    _baseline("sdpa-math", "torch SDPA, plain", SDPBackend.MATH, lambda *_: None, _math_unfit),
    _baseline(
        "sdpa-flash",
        "torch SDPA, FlashAttention-2",
        SDPBackend.FLASH_ATTENTION,
        _flash_missing,
        _low_precision,
    ),
    _baseline(
        "sdpa-cudnn",
        "torch SDPA, cuDNN",
        SDPBackend.CUDNN_ATTENTION,
        lambda device, checkouts: needs_gpu(device),
        _low_precision,
    ),
)
