"""The packages flash-attn 2, 3 and 4. Not yet run: written against their documented functions."""

from __future__ import annotations

from torch import Tensor

from ..data import Case
from . import Baseline, Checkouts, Forward, import_reason, importable, low_precision_only, needs_gpu


def _build(module: str):
    def build(case: Case, checkouts: Checkouts) -> Forward:
        flash = importable(module).flash_attn_func

        def function(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            out = flash(query, key, value, causal=True)  # aligned at the end, as ours
            return out[0] if isinstance(out, tuple) else out

        return Forward(function)

    return build


def _baseline(name: str, summary: str, module: str) -> Baseline:
    return Baseline(
        name,
        summary,
        "dense",
        ("attend", "fused", "backward", "decode"),
        lambda device, checkouts: import_reason(module) or needs_gpu(device),
        low_precision_only,
        _build(module),
    )


BASELINES = (
    _baseline("fa2", "flash-attn 2", "flash_attn"),
    _baseline("fa3", "flash-attn 3 (hopper/)", "flash_attn_interface"),
    _baseline("fa4", "flash-attn 4 (CuTe DSL)", "flash_attn.cute"),
)
