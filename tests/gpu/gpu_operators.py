"""The operators that a GPU is asked for, and the arguments of a case, made on the CPU.

A new operator is one entry in OPERATORS and its rows in CASES (gpu_cases.py).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
import decode_cases
import jrt_cases
from support import embeddings

from resona_ext import reference
from resona_ext.jrt import reference as jrt_reference

ops = torch.ops.resona
Arguments = dict[str, Tensor | int | None]
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


@dataclass(frozen=True)
class Case:
    """One problem of one operator. The sizes are named as in the operator's contract."""

    op: str
    name: str
    dtype: torch.dtype = F32
    B: int = 2
    L: int = 61
    T: int | None = None  # as many as L
    R: int = 2
    E: int = 24
    S: int = 4
    k: int = 3
    H: int = 4
    Hkv: int = 2
    D: int = 24
    contents: str = "random"  # a key of support.CONTENTS
    spoil: Callable[[Tensor], None] | None = None  # plants special values in the embeddings
    lengths: tuple[int, ...] = ()  # packed sequences; B and L follow
    layout: str = "contiguous"  # a key of LAYOUTS
    small: bool = False  # also under compute-sanitizer, a thousand times slower
    large: bool = False  # compared with the CPU operator, not with the reference

    def __str__(self) -> str:
        return f"{self.op}/{self.name}/{str(self.dtype).removeprefix('torch.')}"


@dataclass(frozen=True)
class Operator:
    make: Callable[
        [Case, int], Arguments
    ]  # case, seed -> arguments on the CPU, in the schema's order
    run: Callable[..., Tensor | tuple[Tensor, ...]]
    reference: Callable[..., Tensor | tuple[Tensor, ...]] | None = (
        None  # None: only wrong values are tried
    )
    outputs: tuple[str, ...] = ()
    # Outputs that may differ from the reference by rounding; the others are the same bits.
    close: frozenset[str] = frozenset()
    # The close ones in float64, from arguments in float64 and the expected outputs; default: the reference.
    truth: Callable[[Arguments, tuple[Tensor, ...]], tuple[Tensor, ...]] | None = None
    # Names of the arguments with a gradient, and the differentiable outputs as a function of the arguments
    # and of the expected outputs, whose indices are constants.
    differentiable: tuple[str, ...] = ()
    smooth: Callable[[Arguments, tuple[Tensor, ...]], tuple[Tensor, ...]] | None = None
    # What support.assert_no_worse forgives a close output, from the case and the truth.
    rounding: Callable[[Case, Tensor], float] = lambda case, truth: 0.0


# How a tensor lies in memory. Gradients are asked for in every layout.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t.clone(),
    "rows apart": lambda t: torch.cat([t, t[..., :3]], dim=-1)[..., : t.shape[-1]],
    "heads first": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "last apart": lambda t: torch.stack([t, t], dim=-1)[..., 0],
    # Aligned to an element and to nothing more.
    "offset": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape),
}


def zero_rows(t: Tensor) -> None:
    t[:, ::3] = 0


def not_finite(t: Tensor) -> None:
    for i, bad in enumerate((math.nan, math.inf, -math.inf)):
        t[:, 7 + 11 * i, :, i] = bad


def tiny_and_huge(t: Tensor) -> None:
    t[:, ::3] *= torch.finfo(t.dtype).tiny  # some subnormal
    t[:, 1::3] *= torch.finfo(t.dtype).max / 1e3


def _cu_seqlens(case: Case, seed: int) -> Tensor | None:
    if not case.lengths:
        return None
    lengths = case.lengths if seed % 2 == 0 else case.lengths[::-1]  # same shape, other values
    return torch.tensor([0, *lengths]).cumsum(0).int()


def _embedding(case: Case, batch: int, length: int) -> Tensor:
    made = embeddings(case.contents, batch, length, case.R, case.E, case.dtype)
    if case.spoil:
        case.spoil(made)
    return made


def _sizes(case: Case) -> tuple[int, int, int]:
    if case.lengths:
        return 1, sum(case.lengths), sum(case.lengths)
    return case.B, case.L if case.T is None else case.T, case.L


def make_pool_chunks(case: Case, seed: int) -> Arguments:
    batch, _, length = _sizes(case)
    return {
        "context_embedding": _embedding(case, batch, length),
        "chunk_size": case.S,
        "cu_seqlens": _cu_seqlens(case, seed),
    }


def make_retrieve(case: Case, seed: int) -> Arguments:
    batch, queries, length = _sizes(case)
    cu_seqlens = _cu_seqlens(case, seed)
    context = embeddings(case.contents, batch, length, case.R, case.E, case.dtype)
    # Queries that occur in the context, so that repeated contents tie.
    query = context.roll(5, dims=1)[:, length - queries :].clone()
    if case.spoil:
        case.spoil(query)
    return {
        "query_embedding": query,
        "chunk_embedding": ops.pool_chunks(context, case.S, cu_seqlens),
        "chunk_size": case.S,
        "top_k": case.k,
        "context_length": length,
        "cu_seqlens": cu_seqlens,
    }


def _rows(case: Case) -> Arguments:
    batch, queries, length = _sizes(case)
    return {
        "query": torch.randn(batch, queries, case.H, case.D).to(case.dtype),
        "key": torch.randn(batch, length, case.Hkv, case.D).to(case.dtype),
        "value": torch.randn(batch, length, case.Hkv, case.D).to(case.dtype),
    }


def make_attend(case: Case, seed: int) -> Arguments:
    found = make_retrieve(case, seed)
    indices, scores = ops.retrieve(*found.values())
    return {
        **_rows(case),
        "indices": indices,
        "chunk_size": case.S,
        "bias": scores.masked_fill(indices < 0, 0),
        "sink": torch.randn(case.H),
        "cu_seqlens": found["cu_seqlens"],
    }


def make_fused(case: Case, seed: int) -> Arguments:
    batch, queries, length = _sizes(case)
    context = _embedding(case, batch, length)
    return {
        **_rows(case),
        "query_embedding": context.roll(5, dims=1)[:, length - queries :].clone(),
        "context_embedding": context,
        "chunk_size": case.S,
        "top_k": case.k,
        "score_scale": torch.rand(case.R) if case.name == "scored" else None,
        "sink": None,
        "cu_seqlens": _cu_seqlens(case, seed),
    }


def attend_as_selected(arguments: Arguments, expected: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The attention over what was expected to be retrieved."""
    query, key, value, _, _, chunk_size, _, score_scale, sink, cu_seqlens = arguments.values()
    indices, scores = expected[2:]
    bias = None
    if score_scale is not None:
        bias = scores.double().masked_fill(indices < 0, 0) * score_scale[:, None]
    return reference.attend(query, key, value, indices, chunk_size, bias, sink, cu_seqlens)


def make_retrieve_backward(case: Case, seed: int) -> Arguments:
    forward = make_retrieve(case, seed)
    indices, scores = ops.retrieve(*forward.values())
    del forward["top_k"]
    return {"score_gradient": torch.randn_like(scores), "indices": indices, **forward}


def make_pool_chunks_backward(case: Case, seed: int) -> Arguments:
    forward = make_pool_chunks(case, seed)
    chunks = ops.pool_chunks(*forward.values())
    return {"chunk_gradient": torch.randn(chunks.shape).to(chunks.dtype), **forward}


def smooth_retrieve(arguments: Arguments, expected: tuple[Tensor, ...]) -> tuple[Tensor]:
    """The scores of the chunks that were retrieved."""
    query, chunks, size, _, length, cu_seqlens = arguments.values()
    indices = expected[0]
    borders = [0, length] if cu_seqlens is None else cu_seqlens.tolist()
    parts, first_chunk, queries = [query[:, :0, :, :1].expand_as(indices[:, :0])], 0, query.shape[1]
    for begin, end in pairwise(borders):
        own = slice(begin, end) if cu_seqlens is not None else slice(0, queries)
        count = (end - begin) // size
        score = reference.similarity(query[:, own], chunks[:, first_chunk : first_chunk + count])
        first_chunk += count
        chosen = indices[:, own].transpose(1, 2).long()
        if count:
            score = score.gather(-1, chosen.clamp(min=0)).masked_fill(chosen < 0, 0)
        else:  # nothing to gather from, and every slot is unused
            score = score.sum(dim=-1, keepdim=True).expand(chosen.shape)
        parts.append(score.transpose(1, 2))
    return (torch.cat(parts, dim=1),)


OPERATORS = {
    "pool_chunks": Operator(
        make_pool_chunks,
        ops.pool_chunks,
        reference.pool_chunks,
        outputs=("chunks",),
        differentiable=("context_embedding",),
        smooth=lambda arguments, _: (reference.pool_chunks(*arguments.values()),),
    ),
    "retrieve": Operator(
        make_retrieve,
        ops.retrieve,
        reference.retrieve,
        outputs=("indices", "scores"),
        differentiable=("query_embedding", "chunk_embedding"),
        smooth=smooth_retrieve,
    ),
    "retrieve_two_level": Operator(
        make_retrieve,
        partial(ops.retrieve_two_level, superchunk_size=5, probes=3),
        partial(reference.retrieve_two_level, superchunk_size=5, probes=3),
        outputs=("indices", "scores"),
        differentiable=("query_embedding", "chunk_embedding"),
        smooth=smooth_retrieve,
    ),
    "attend": Operator(
        make_attend,
        ops.attend,
        reference.attend,
        outputs=("out", "lse"),
        close=frozenset({"out", "lse"}),
        differentiable=("query", "key", "value"),
        smooth=lambda arguments, _: reference.attend(*arguments.values()),
    ),
    "fused_retrieve_attend": Operator(
        make_fused,
        ops.fused_retrieve_attend,
        reference.fused_retrieve_attend,
        outputs=("out", "lse", "indices", "scores"),
        close=frozenset({"out", "lse"}),
        truth=attend_as_selected,
    ),
    "decode_step": Operator(
        decode_cases.make,
        decode_cases.run,
        decode_cases.expect,
        outputs=decode_cases.OUTPUTS,
        close=frozenset({"out", "lse"}),
        truth=decode_cases.truth,
    ),
    "decode_step_two_level": Operator(
        decode_cases.make_two_level,
        decode_cases.run_two_level,
        decode_cases.expect_two_level,
        outputs=(*decode_cases.OUTPUTS, *decode_cases.UPPER),
        close=frozenset({"out", "lse"}),
        truth=decode_cases.truth,
    ),
    "prefix_linear_attention": Operator(
        jrt_cases.make,
        ops.prefix_linear_attention,
        jrt_reference.quadratic,
        outputs=jrt_cases.OUTPUTS,
        close=frozenset(jrt_cases.OUTPUTS),
        truth=lambda arguments, _: ops.prefix_linear_attention(*arguments.values()),
        differentiable=jrt_cases.DIFFERENTIABLE,
        smooth=lambda arguments, _: jrt_reference.quadratic(*arguments.values()),
        rounding=jrt_cases.rounding,
    ),
    "prefix_linear_attention_step": Operator(
        jrt_cases.make_step,
        jrt_cases.run_step,
        jrt_cases.expect_step,
        outputs=jrt_cases.OUTPUTS,
        close=frozenset(jrt_cases.OUTPUTS),
        rounding=jrt_cases.rounding,
    ),
    "_pool_chunks_backward": Operator(make_pool_chunks_backward, ops._pool_chunks_backward),
    "_retrieve_backward": Operator(make_retrieve_backward, ops._retrieve_backward),
}
