"""The argument checks of csrc/ops/checks.cpp for fake tensors: same order, same words.

Fake tensors have no values, so the values of cu_seqlens and indices are not looked at here, and what a
build lacks (CUDA kernels) is left to the real operators. Everything
goes through torch._check, which turns a comparison of symbolic sizes into a guard.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

MAX_HEAD_DIM = 256
MAX_CONTEXT = 2**31 - 1
SUPPORTED = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class Shape(NamedTuple):
    batch: int
    queries: int
    context: int
    heads: int = 1
    kv_heads: int = 1
    head_dim: int = 1
    retrieval_heads: int = 1
    retrieval_dim: int = 1
    top_k: int = 1


def accumulation_dtype(t: Tensor) -> torch.dtype:
    """The dtype of lse, scores, bias and sink beside a tensor."""
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _device(t: Tensor) -> str:
    if t.device.type == "cuda":
        return f"cuda:{t.device.index or 0}"
    return "cpu" if t.device.type == "cpu" else "another device"


def _text(shape: Sequence[int]) -> str:
    return "[" + ", ".join(str(int(n)) for n in shape) + "]"


class Checker:
    """Raises RuntimeError("resona::op: argument: expected ..., got ...")."""

    def __init__(self, op: str) -> None:
        self.op = op

    def require(self, ok: bool, argument: str, expected, got) -> None:
        def message() -> str:
            words = [w() if callable(w) else w for w in (expected, got)]
            return f"resona::{self.op}: {argument}: expected {words[0]}, got {words[1]}"

        if isinstance(ok, bool):
            if not ok:
                raise RuntimeError(message())
        else:
            torch._check(ok, message)

    def device(self, argument: str, t: Tensor, like: Tensor, name: str) -> None:
        expected = f"device {_device(like)} like {name}"
        self.require(t.device == like.device, argument, expected, _device(t))

    def rank(self, argument: str, t: Tensor, rank: int, layout: str) -> None:
        got = f"shape {_text(t.shape)}" if t.dim() != rank else ""
        self.require(t.dim() == rank, argument, f"rank {rank} {layout}", got)

    def floating(self, argument: str, t: Tensor) -> None:
        on_cuda = t.device.type == "cuda"
        ok = t.dtype in SUPPORTED and not (on_cuda and t.dtype == torch.float64)
        expected = (
            "dtype float32, float16 or bfloat16 on CUDA"
            if on_cuda
            else "dtype float32, float16, bfloat16 or float64"
        )
        self.require(ok, argument, expected, _name(t.dtype))

    def dtype(self, argument: str, t: Tensor, dtype: torch.dtype, like: str = "") -> None:
        expected = f"dtype {_name(dtype)}" + (f" like {like}" if like else "")
        self.require(t.dtype == dtype, argument, expected, _name(t.dtype))

    def shape(self, argument: str, t: Tensor, layout: str, expected: Sequence[int]) -> None:
        def wanted() -> str:
            return f"shape {layout} = {_text(expected)}"

        self.require(t.dim() == len(expected), argument, wanted, lambda: _text(t.shape))
        for got, want in zip(t.shape, expected, strict=True):
            self.require(got == want, argument, wanted, lambda: _text(t.shape))

    def size(self, argument: str, t: Tensor, dim: int, letter: str, want: int, like: str) -> None:
        def wanted() -> str:
            return f"{letter} = {int(want)} like {like}"

        self.require(t.shape[dim] == want, argument, wanted, lambda: f"shape {_text(t.shape)}")

    def at_least_one(self, argument: str, value: int) -> None:
        self.require(value >= 1, argument, "at least 1", lambda: str(int(value)))

    def lengths(self, argument: str, queries: int, context: int) -> None:
        self.require(context <= MAX_CONTEXT, argument, "L < 2^31", lambda: f"L = {int(context)}")
        expected = lambda: f"T <= L = {int(context)}"  # noqa: E731
        self.require(queries <= context, argument, expected, lambda: f"T = {int(queries)}")

    def sequences(self, cu_seqlens: Tensor | None, like: Tensor, name: str, s: Shape) -> None:
        if cu_seqlens is None:
            return
        self.rank("cu_seqlens", cu_seqlens, 1, "[n + 1]")
        self.dtype("cu_seqlens", cu_seqlens, torch.int32)
        self.device("cu_seqlens", cu_seqlens, like, name)
        self.require(cu_seqlens.shape[0] >= 1, "cu_seqlens", "at least one value", "none")
        packed = "B = 1 for packed sequences"
        self.require(s.batch == 1, "cu_seqlens", packed, lambda: f"B = {int(s.batch)}")
        expected = lambda: f"T = L = {int(s.context)} for packed sequences"  # noqa: E731
        got = lambda: f"T = {int(s.queries)}"  # noqa: E731
        self.require(s.queries == s.context, "cu_seqlens", expected, got)

    def retrieval_heads(self, argument: str, heads: int, kv_heads: int) -> None:
        expected = lambda: f"R = 1 or a divisor of Hkv = {int(kv_heads)}"  # noqa: E731
        got = lambda: f"R = {int(heads)}"  # noqa: E731
        self.require(heads >= 1, argument, expected, got)
        self.require(kv_heads % heads == 0, argument, expected, got)

    def query_key_value(self, query: Tensor, key: Tensor, value: Tensor, chunk_size: int) -> Shape:
        self.rank("query", query, 4, "[B, T, H, D]")
        self.floating("query", query)
        self.rank("key", key, 4, "[B, L, Hkv, D]")
        self.dtype("key", key, query.dtype, "query")
        self.device("key", key, query, "query")
        self.size("key", key, 0, "B", query.shape[0], "query")
        self.size("key", key, 3, "D", query.shape[3], "query")
        batch, queries, heads, dim = query.shape
        s = Shape(batch, queries, key.shape[1], heads, key.shape[2], dim)
        expected = f"head dim D from 1 to {MAX_HEAD_DIM}"
        self.require(dim >= 1, "query", expected, lambda: f"D = {int(dim)}")
        self.require(dim <= MAX_HEAD_DIM, "query", expected, lambda: f"D = {int(dim)}")
        self.shape("value", value, "[B, L, Hkv, D]", (batch, s.context, s.kv_heads, dim))
        self.dtype("value", value, query.dtype, "query")
        self.device("value", value, query, "query")
        self.require(s.kv_heads >= 1, "key", "Hkv of at least 1", "Hkv = 0")
        expected = lambda: f"H a multiple of Hkv = {int(s.kv_heads)}"  # noqa: E731
        self.require(heads >= 1, "query", expected, lambda: f"H = {int(heads)}")
        self.require(heads % s.kv_heads == 0, "query", expected, lambda: f"H = {int(heads)}")
        self.lengths("query", queries, s.context)
        self.at_least_one("chunk_size", chunk_size)
        return s

    def per_head(self, argument: str, t: Tensor | None, layout: str, n: int, query: Tensor) -> None:
        if t is None:
            return
        self.shape(argument, t, layout, (n,))
        self.dtype(argument, t, accumulation_dtype(query))
        self.device(argument, t, query, "query")

    def in_place(self, argument: str, t: Tensor, like: Tensor) -> None:
        self.device(argument, t, like, "query")
        expected = "a contiguous tensor, as it is written in place"
        self.require(t.is_contiguous(), argument, expected, lambda: f"strides {_text(t.stride())}")

    def scale(self, scale: float | None) -> None:
        if scale is not None:
            self.require(math.isfinite(scale), "scale", "a finite number", str(scale))


def check_pool_chunks(
    op: str, context: Tensor, chunk_size: int, cu_seqlens: Tensor | None
) -> Shape:
    check = Checker(op)
    check.rank("context_embedding", context, 4, "[B, L, R, E]")
    check.floating("context_embedding", context)
    batch, length, heads, dim = context.shape
    s = Shape(batch, length, length, retrieval_heads=heads, retrieval_dim=dim)
    check.at_least_one("chunk_size", chunk_size)
    check.require(dim >= 1, "context_embedding", "retrieval dim E of at least 1", "E = 0")
    check.lengths("context_embedding", length, length)
    check.sequences(cu_seqlens, context, "context_embedding", s)
    return s


def check_retrieve(
    op: str,
    query: Tensor,
    chunks: Tensor,
    chunk_size: int,
    top_k: int,
    context_length: int,
    cu_seqlens: Tensor | None,
) -> Shape:
    check = Checker(op)
    check.rank("query_embedding", query, 4, "[B, T, R, E]")
    check.floating("query_embedding", query)
    batch, queries, heads, dim = query.shape
    s = Shape(batch, queries, context_length, retrieval_heads=heads, retrieval_dim=dim, top_k=top_k)
    check.require(dim >= 1, "query_embedding", "retrieval dim E of at least 1", "E = 0")
    check.require(heads >= 1, "query_embedding", "R of at least 1", "R = 0")
    check.at_least_one("chunk_size", chunk_size)
    check.at_least_one("top_k", top_k)
    check.lengths("query_embedding", queries, context_length)
    expected = (batch, context_length // chunk_size, heads, dim)
    check.shape("chunk_embedding", chunks, "[B, L // S, R, E]", expected)
    check.dtype("chunk_embedding", chunks, query.dtype, "query_embedding")
    check.device("chunk_embedding", chunks, query, "query_embedding")
    check.sequences(cu_seqlens, query, "query_embedding", s)
    return s


def check_two_level(op: str, superchunk_size: int | None, probes: int | None) -> None:
    for argument, value in (("superchunk_size", superchunk_size), ("probes", probes)):
        if value is not None:
            Checker(op).at_least_one(argument, value)


def check_attend(
    op: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indices: Tensor,
    chunk_size: int,
    bias: Tensor | None,
    sink: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float | None,
) -> Shape:
    check = Checker(op)
    s = check.query_key_value(query, key, value, chunk_size)
    check.rank("indices", indices, 4, "[B, T, R, k]")
    check.dtype("indices", indices, torch.int32)
    check.device("indices", indices, query, "query")
    check.size("indices", indices, 0, "B", s.batch, "query")
    check.size("indices", indices, 1, "T", s.queries, "query")
    s = s._replace(retrieval_heads=indices.shape[2], top_k=indices.shape[3])
    check.retrieval_heads("indices", s.retrieval_heads, s.kv_heads)
    check.require(s.top_k >= 1, "indices", "k of at least 1", "k = 0")
    if bias is not None:
        check.shape("bias", bias, "[B, T, R, k]", tuple(indices.shape))
        check.dtype("bias", bias, accumulation_dtype(query))
        check.device("bias", bias, query, "query")
    check.per_head("sink", sink, "[H]", s.heads, query)
    check.scale(scale)
    check.sequences(cu_seqlens, query, "query", s)
    return s


def check_fused(
    op: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_embedding: Tensor,
    context_embedding: Tensor,
    chunk_size: int,
    top_k: int,
    score_scale: Tensor | None,
    sink: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float | None,
) -> Shape:
    check = Checker(op)
    s = check.query_key_value(query, key, value, chunk_size)
    check.rank("query_embedding", query_embedding, 4, "[B, T, R, E]")
    check.floating("query_embedding", query_embedding)
    check.device("query_embedding", query_embedding, query, "query")
    check.size("query_embedding", query_embedding, 0, "B", s.batch, "query")
    check.size("query_embedding", query_embedding, 1, "T", s.queries, "query")
    _, _, heads, dim = query_embedding.shape
    s = s._replace(retrieval_heads=heads, retrieval_dim=dim, top_k=top_k)
    check.retrieval_heads("query_embedding", heads, s.kv_heads)
    check.require(dim >= 1, "query_embedding", "retrieval dim E of at least 1", "E = 0")
    expected = (s.batch, s.context, heads, dim)
    check.shape("context_embedding", context_embedding, "[B, L, R, E]", expected)
    check.dtype("context_embedding", context_embedding, query_embedding.dtype, "query_embedding")
    check.device("context_embedding", context_embedding, query, "query")
    check.at_least_one("top_k", top_k)
    check.per_head("score_scale", score_scale, "[R]", heads, query)
    check.per_head("sink", sink, "[H]", s.heads, query)
    check.scale(scale)
    check.sequences(cu_seqlens, query, "query", s)
    return s


def check_decode(
    op: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_embedding: Tensor,
    context_embedding: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    chunk_embedding: Tensor,
    open_sum: Tensor,
    history: Tensor,
    lengths: Tensor,
    chunk_size: int,
    top_k: int,
    score_scale: Tensor | None,
    sink: Tensor | None,
    scale: float | None,
) -> Shape:
    check = Checker(op)
    s = check_fused(
        op,
        query,
        key,
        value,
        query_embedding,
        context_embedding,
        chunk_size,
        top_k,
        score_scale,
        sink,
        None,
        scale,
    )
    one = "one new token per sequence"
    check.require(s.queries == 1, "query", f"T = 1, {one}", lambda: f"shape {_text(query.shape)}")
    check.require(s.context == 1, "key", f"L = 1, {one}", lambda: f"shape {_text(key.shape)}")

    check.rank("key_cache", key_cache, 4, "[B, M, Hkv, D]")
    capacity = key_cache.shape[1]
    check.lengths("key_cache", 1, capacity)
    tokens = (s.batch, capacity, s.kv_heads, s.head_dim)
    heads = (s.retrieval_heads, s.retrieval_dim)
    check.shape("key_cache", key_cache, "[B, M, Hkv, D]", tokens)
    check.shape("value_cache", value_cache, "[B, M, Hkv, D]", tokens)
    chunks = (s.batch, capacity // chunk_size, *heads)
    check.shape("chunk_embedding", chunk_embedding, "[B, M // S, R, E]", chunks)
    check.shape("open_sum", open_sum, "[B, R, E]", (s.batch, *heads))
    check.rank("history", history, 4, "[B, W, R, E]")
    check.shape("history", history, "[B, W, R, E]", (s.batch, history.shape[1], *heads))
    check.shape("lengths", lengths, "[B]", (s.batch,))

    check.dtype("key_cache", key_cache, query.dtype, "query")
    check.dtype("value_cache", value_cache, query.dtype, "query")
    check.dtype("chunk_embedding", chunk_embedding, query_embedding.dtype, "query_embedding")
    check.dtype("open_sum", open_sum, accumulation_dtype(query_embedding))
    check.dtype("history", history, query_embedding.dtype, "query_embedding")
    check.dtype("lengths", lengths, torch.int32)

    check.in_place("key_cache", key_cache, query)
    check.in_place("value_cache", value_cache, query)
    check.in_place("chunk_embedding", chunk_embedding, query)
    check.in_place("open_sum", open_sum, query)
    check.in_place("history", history, query)
    check.in_place("lengths", lengths, query)
    return s._replace(context=capacity)


def check_superchunks(
    op: str,
    s: Shape,
    query: Tensor,
    query_embedding: Tensor,
    superchunk_embedding: Tensor,
    superchunk_sum: Tensor,
    chunk_size: int,
    superchunk_size: int,
    probes: int | None,
) -> None:
    """After `check_decode`, which gave the shape; its context is the capacity."""
    check = Checker(op)
    check.at_least_one("superchunk_size", superchunk_size)
    if probes is not None:
        check.at_least_one("probes", probes)
    heads = (s.retrieval_heads, s.retrieval_dim)
    superchunks = (s.batch, s.context // chunk_size // superchunk_size, *heads)
    layout = "[B, M // S // P, R, E]"
    check.shape("superchunk_embedding", superchunk_embedding, layout, superchunks)
    check.shape("superchunk_sum", superchunk_sum, "[B, R, E]", (s.batch, *heads))
    check.dtype(
        "superchunk_embedding", superchunk_embedding, query_embedding.dtype, "query_embedding"
    )
    check.dtype("superchunk_sum", superchunk_sum, accumulation_dtype(query_embedding))
    check.in_place("superchunk_embedding", superchunk_embedding, query)
    check.in_place("superchunk_sum", superchunk_sum, query)
