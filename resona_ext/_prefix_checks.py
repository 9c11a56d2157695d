"""The argument checks of csrc/ops/prefix_checks.cpp for fake tensors: same order, same words."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ._checks import Checker, accumulation_dtype

MAX_FEATURE_DIM = 32
MAX_VALUE_DIM = 128
MAX_TOKENS = 2**31 - 1


class PrefixShape(NamedTuple):
    batch: int
    tokens: int
    heads: int
    feature_dim: int
    value_dim: int
    prefix_rows: int = 0
    sequences: int = 0

    @property
    def features(self) -> int:
        return 1 + self.feature_dim + self.feature_dim * self.feature_dim

    @property
    def state(self) -> tuple[int, ...]:
        return (self.sequences, self.heads, self.features, self.value_dim)


def _scale(check: Checker, scale: float | None) -> None:
    if scale is not None:
        got = f"{scale:f}" if math.isfinite(scale) else str(scale)
        ok = math.isfinite(scale) and scale > 0
        check.require(ok, "scale", "a positive finite number", got)


def _within(check: Checker, argument: str, name: str, letter: str, n: int, most: int) -> None:
    for ok in (n >= 1, n <= most):
        check.require(ok, argument, f"{name} from 1 to {most}", lambda: f"{letter} = {int(n)}")


def _query_key_value(check: Checker, query: Tensor, key: Tensor, value: Tensor) -> PrefixShape:
    check.rank("query", query, 4, "[B, T, H, f]")
    check.floating("query", query)
    batch, tokens, heads, dim = query.shape
    _within(check, "query", "feature dim f", "f", dim, MAX_FEATURE_DIM)
    check.require(tokens <= MAX_TOKENS, "query", "T < 2^31", lambda: f"T = {int(tokens)}")
    check.shape("key", key, "[B, T, H, f]", (batch, tokens, heads, dim))
    check.dtype("key", key, query.dtype, "query")
    check.device("key", key, query, "query")
    check.rank("value", value, 4, "[B, T, H, V]")
    value_dim = value.shape[3]
    _within(check, "value", "value dim V", "V", value_dim, MAX_VALUE_DIM)
    check.shape("value", value, "[B, T, H, V]", (batch, tokens, heads, value_dim))
    check.dtype("value", value, query.dtype, "query")
    check.device("value", value, query, "query")
    return PrefixShape(batch, tokens, heads, dim, value_dim)


def _exact(
    check: Checker, argument: str, t: Tensor, layout: str, shape: tuple, dtype, query: Tensor
) -> None:
    check.shape(argument, t, layout, shape)
    check.dtype(argument, t, dtype)
    check.device(argument, t, query, "query")


def check_prefix(
    op: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    prefix_lengths: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    initial_normalizer: Tensor | None,
    scale: float | None,
) -> PrefixShape:
    check = Checker(op)
    s = _query_key_value(check, query, key, value)
    check.rank("prefix_key", prefix_key, 4, "[B, M, H, f]")
    rows = prefix_key.shape[1]
    prefixes = (("prefix_key", prefix_key, "f"), ("prefix_value", prefix_value, "V"))
    for (argument, t, letter), dim in zip(prefixes, (s.feature_dim, s.value_dim), strict=True):
        check.shape(argument, t, f"[B, M, H, {letter}]", (s.batch, rows, s.heads, dim))
        check.dtype(argument, t, query.dtype, "query")
        check.device(argument, t, query, "query")
    got = lambda: f"M = {int(rows)}"  # noqa: E731
    check.require(rows <= s.tokens, "prefix_key", lambda: f"M <= T = {int(s.tokens)}", got)
    sequences = s.batch
    if cu_seqlens is not None:
        check.rank("cu_seqlens", cu_seqlens, 1, "[n + 1]")
        check.dtype("cu_seqlens", cu_seqlens, torch.int32)
        check.device("cu_seqlens", cu_seqlens, query, "query")
        check.require(cu_seqlens.shape[0] >= 1, "cu_seqlens", "at least one value", "none")
        packed = "B = 1 for packed sequences"
        check.require(s.batch == 1, "cu_seqlens", packed, lambda: f"B = {int(s.batch)}")
        if rows != 0:
            expected = lambda: f"M = T = {int(s.tokens)} (or 0) for packed sequences"  # noqa: E731
            check.require(rows == s.tokens, "prefix_key", expected, got)
        sequences = cu_seqlens.shape[0] - 1
    s = s._replace(prefix_rows=rows, sequences=sequences)
    if prefix_lengths is not None:
        _exact(check, "prefix_lengths", prefix_lengths, "[n]", (sequences,), torch.int32, query)
    if mask is not None:
        _exact(check, "mask", mask, "[B, T]", (s.batch, s.tokens), torch.bool, query)
    check.require(
        (initial_state is None) == (initial_normalizer is None),
        "initial_normalizer",
        "to come together with initial_state",
        "one without the other",
    )
    if initial_state is not None:
        dtype = accumulation_dtype(query)
        _exact(check, "initial_state", initial_state, "[n, H, F, V]", s.state, dtype, query)
        _exact(
            check, "initial_normalizer", initial_normalizer, "[n, H, F]", s.state[:3], dtype, query
        )
    _scale(check, scale)
    return s


def check_prefix_step(
    op: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: Tensor,
    normalizer: Tensor,
    mask: Tensor | None,
    scale: float | None,
) -> PrefixShape:
    check = Checker(op)
    s = _query_key_value(check, query, key, value)
    s = s._replace(sequences=s.batch)
    got = lambda: f"shape {[int(n) for n in query.shape]}"  # noqa: E731
    check.require(s.tokens == 1, "query", "T = 1, one new token per sequence", got)
    dtype = accumulation_dtype(query)
    _exact(check, "state", state, "[B, H, F, V]", s.state, dtype, query)
    _exact(check, "normalizer", normalizer, "[B, H, F]", s.state[:3], dtype, query)
    if mask is not None:
        _exact(check, "mask", mask, "[B, 1]", (s.batch, 1), torch.bool, query)
    _scale(check, scale)
    check.in_place("state", state, query)
    check.in_place("normalizer", normalizer, query)
    return s
