"""Prefix linear attention and its step as gpu_cases.py wants them.

A case's L are the tokens, S the rows of the prefix, E and D the feature and value dims. The step writes in
place, so what it wrote counts as a result.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from resona_ext.jrt import reference

if TYPE_CHECKING:
    from gpu_operators import Arguments, Case

ops = torch.ops.resona
OUTPUTS = ("out", "state", "normalizer")
DIFFERENTIABLE = ("query", "key", "value", "prefix_key", "prefix_value")


def cases(case: type[Case]) -> Iterator[Case]:
    def whole(name, dtype=torch.float32, **sizes):
        return case("prefix_linear_attention", name, dtype, **{**dict(H=2, E=8, D=16), **sizes})

    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        yield whole("small", dtype, S=20, small=True)
        yield whole("the paper's sizes", dtype, L=300, S=150, E=16, D=64)
        yield whole("everything", dtype, L=200, S=100, small=dtype == torch.bfloat16)
        yield whole("packed", dtype, lengths=(17, 0, 3, 80, 1), small=dtype == torch.float16)
        pieces = dict(B=1, H=1, L=1200, S=1100, small=dtype == torch.bfloat16)
        yield whole("pieces", dtype, **pieces)
        slices = dict(B=1, L=90, S=70, E=32, D=128, small=dtype == torch.float32)
        yield whole("slices", dtype, **slices)
        yield case("prefix_linear_attention_step", "everything", dtype, E=16, D=64, small=True)
    for layout in ("rows apart", "heads first", "last apart", "offset"):
        yield whole(layout, torch.bfloat16, L=100, S=60, layout=layout, small=layout == "offset")
    yield whole("odd sizes", L=67, S=66, E=5, D=17)
    yield whole("no prefix", S=0)
    yield whole("no tokens", L=0, S=0)
    yield whole("no batch", B=0)
    yield case("prefix_linear_attention_step", "no batch", B=0)
    sizes = dict(large=True, B=2, H=4, E=16, D=64)
    yield whole("16k tokens", torch.bfloat16, L=16384, S=8192, **sizes)


def features(case: Case) -> float:
    """Results are sums over so many features."""
    return 1 + case.E + case.E**2


def make(case: Case, seed: int) -> Arguments:
    packed = bool(case.lengths)
    lengths = case.lengths if seed % 2 == 0 else case.lengths[::-1]  # same shape, other values
    batch, tokens = (1, sum(lengths)) if packed else (case.B, case.L)
    rows, sequences = tokens if packed else case.S, len(lengths) if packed else batch
    everything = case.name == "everything"

    def draw(count: int, dim: int) -> Tensor:
        return torch.randn(batch, count, case.H, dim).to(case.dtype)

    longest = torch.tensor(lengths or [rows] * sequences)
    state, normalizer = states(sequences, case) if everything else (None, None)
    return {
        "query": draw(tokens, case.E),
        "key": draw(tokens, case.E),
        "value": draw(tokens, case.D),
        "prefix_key": draw(rows, case.E),
        "prefix_value": draw(rows, case.D),
        "prefix_lengths": (torch.rand(sequences) * (longest + 1)).int()
        if packed or everything
        else None,
        "mask": torch.rand(batch, tokens) > 0.2 if everything else None,
        "cu_seqlens": torch.tensor([0, *lengths]).cumsum(0).int() if packed else None,
        "initial_state": state,
        "initial_normalizer": normalizer,
    }


def states(sequences: int, case: Case) -> tuple[Tensor, Tensor]:
    """Of three tokens."""
    phi = reference.taylor_features(torch.randn(sequences, case.H, 3, case.E))
    values = torch.randn(sequences, case.H, 3, case.D)
    return torch.einsum("nhjr,nhjv->nhrv", phi, values), phi.sum(2)


def make_step(case: Case, seed: int) -> Arguments:
    state, normalizer = states(case.B, case)
    return {
        "query": torch.randn(case.B, 1, case.H, case.E).to(case.dtype),
        "key": torch.randn(case.B, 1, case.H, case.E).to(case.dtype),
        "value": torch.randn(case.B, 1, case.H, case.D).to(case.dtype),
        "state": state,
        "normalizer": normalizer,
        "mask": torch.arange(case.B)[:, None] % 3 != 2,
    }


def run_step(query, key, value, state, normalizer, mask) -> tuple[Tensor, ...]:
    """The result, and the state behind the step; the arguments stay as they are."""
    state, normalizer = (
        t.clone(memory_format=torch.contiguous_format) for t in (state, normalizer)
    )
    out = ops.prefix_linear_attention_step(query, key, value, state, normalizer, mask)
    return out, state, normalizer


def expect_step(query, key, value, state, normalizer, mask) -> tuple[Tensor, ...]:
    none = (key[:, :0], value[:, :0])
    return reference.recurrent(query, key, value, *none, None, mask, None, state, normalizer)


def rounding(case: Case, truth: Tensor) -> float:
    """Of sums over the features, and of a result in the dtype of the case."""
    size = max(1.0, truth.abs().max().item()) if truth.numel() else 0.0
    wide = torch.finfo(torch.float32).eps * math.sqrt(features(case))
    return size * (wide + (torch.finfo(case.dtype).eps if case.dtype != torch.float32 else 0))
