"""Prefix linear attention in plain PyTorch, twice: as a matrix of weights, and token by token.

Both are the definition, and tests hold them and every backend against each other. They compute in the
dtype of their inputs, without upcasting, and keep states in float32 (float64 for float64).

Letters: B batch, T tokens, M rows of the prefix, H heads, f feature dim, V value dim, F = 1 + f + f^2.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

EPSILON = 1e-12  # added to every denominator


def taylor_features(x: Tensor, scale: float | None = None) -> Tensor:
    """phi(x) = [1, sqrt(scale) x, scale / sqrt(2) vec(x x^T)], so that with s = scale <q, k>

        <phi(q), phi(k)> = 1 + s + s^2 / 2,

    the Taylor polynomial of exp(s). [..., f] -> [..., 1 + f + f^2]; scale defaults to f ** -0.5.
    """
    scale = x.shape[-1] ** -0.5 if scale is None else scale
    second = (x.unsqueeze(-1) * x.unsqueeze(-2)).flatten(-2) * (scale / math.sqrt(2))
    return torch.cat([torch.ones_like(x[..., :1]), math.sqrt(scale) * x, second], dim=-1)


def _state_dtype(t: Tensor) -> torch.dtype:
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def _prefix_mask(rows: int, prefix_lengths: Tensor | None, mask: Tensor | None, like: Tensor):
    """[B, M]: the tokens that count as prefix."""
    keep = torch.ones(like.shape[0], rows, dtype=torch.bool, device=like.device)
    if prefix_lengths is not None:
        keep = torch.arange(rows, device=like.device) < prefix_lengths[:, None]
    return keep if mask is None else keep & mask[:, :rows]


def _one_by_one(function, rows, prefix_lengths, mask, cu_seqlens, states, scale):
    """Packed sequences: each alone, then joined."""
    outs, finals = [], []
    for i, (begin, end) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
        *results, final, normalizer = function(
            *(t[:, begin:end] for t in rows),
            None if prefix_lengths is None else prefix_lengths[i : i + 1],
            None if mask is None else mask[:, begin:end],
            None,
            *(None if t is None else t[i : i + 1] for t in states),
            scale=scale,
        )
        outs.extend(results)
        finals.append((final, normalizer))
    state, normalizer = (torch.cat(t) for t in zip(*finals, strict=True))
    return torch.cat(outs, dim=1), state, normalizer


def quadratic(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    prefix_lengths: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    initial_state: Tensor | None = None,
    initial_normalizer: Tensor | None = None,
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As attention: weights 1 + s + s^2 / 2 of every visible pair, normalised by their sum.

    Token i sees tokens j <= i through key and value, and the whole prefix, whatever its own place, through
    prefix_key and prefix_value. Padding is seen by nobody, and its own rows are zero.
    """
    rows = (query, key, value, prefix_key, prefix_value)
    states = (initial_state, initial_normalizer)
    if cu_seqlens is not None:
        return _one_by_one(quadratic, rows, prefix_lengths, mask, cu_seqlens, states, scale)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    tokens = query.shape[1]
    real = query.new_ones(query.shape[:2], dtype=torch.bool) if mask is None else mask
    prefix = _prefix_mask(prefix_key.shape[1], prefix_lengths, mask, query)
    query, key, value = (t.masked_fill(~real[..., None, None], 0) for t in (query, key, value))
    prefix_key, prefix_value = (
        t.masked_fill(~prefix[..., None, None], 0) for t in (prefix_key, prefix_value)
    )

    def weigh(keys: Tensor, visible: Tensor) -> Tensor:
        s = scale * torch.einsum("bihf,bjhf->bhij", query, keys)
        return (1 + s + s * s / 2) * visible

    causal = torch.ones(tokens, tokens, dtype=torch.bool, device=query.device).tril()
    own = weigh(key, causal & real[:, None, None, :])
    of_prefix = weigh(prefix_key, prefix[:, None, None, :])
    total = torch.einsum("bhij,bjhv->bihv", own, value)
    total = total + torch.einsum("bhij,bjhv->bihv", of_prefix, prefix_value)
    denominator = (own.sum(-1) + of_prefix.sum(-1)).transpose(1, 2)
    if initial_state is not None:
        features = taylor_features(query, scale)
        total = total + torch.einsum("bihr,bhrv->bihv", features, initial_state.to(query.dtype))
        denominator = denominator + torch.einsum(
            "bihr,bhr->bih", features, initial_normalizer.to(query.dtype)
        )
    out = total / (denominator.unsqueeze(-1) + EPSILON)
    out = out.masked_fill(~real[..., None, None], 0)

    dtype = _state_dtype(query)
    features = taylor_features(key.to(dtype), scale) * real[..., None, None]
    of_prefix = taylor_features(prefix_key.to(dtype), scale) * prefix[..., None, None]
    state = torch.einsum("bjhr,bjhv->bhrv", features, value.to(dtype))
    state = state + torch.einsum("bjhr,bjhv->bhrv", of_prefix, prefix_value.to(dtype))
    normalizer = features.sum(1) + of_prefix.sum(1)
    if initial_state is not None:
        state, normalizer = state + initial_state, normalizer + initial_normalizer
    return out, state, normalizer


def recurrent(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    prefix_lengths: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    initial_state: Tensor | None = None,
    initial_normalizer: Tensor | None = None,
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As a recurrence: the prefix fills the state, then each token is added and read, one by one."""
    rows = (query, key, value, prefix_key, prefix_value)
    states = (initial_state, initial_normalizer)
    if cu_seqlens is not None:
        return _one_by_one(recurrent, rows, prefix_lengths, mask, cu_seqlens, states, scale)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    batch, tokens, heads, f = query.shape
    dtype = _state_dtype(query)
    real = query.new_ones(batch, tokens, dtype=torch.bool) if mask is None else mask
    prefix = _prefix_mask(prefix_key.shape[1], prefix_lengths, mask, query)
    if initial_state is None:
        initial_state = query.new_zeros(batch, heads, 1 + f + f * f, value.shape[3], dtype=dtype)
        initial_normalizer = initial_state[..., 0]
    state, normalizer = initial_state, initial_normalizer

    def add(state, normalizer, k, v, keep):
        keep = keep[:, None, None]
        features = taylor_features(k.to(dtype).masked_fill(~keep, 0), scale) * keep
        v = v.to(dtype).masked_fill(~keep, 0)
        return state + features.unsqueeze(-1) * v.unsqueeze(-2), normalizer + features

    for j in range(prefix_key.shape[1]):
        new = (prefix_key[:, j], prefix_value[:, j], prefix[:, j])
        state, normalizer = add(state, normalizer, *new)
    out = []
    for i in range(tokens):
        state, normalizer = add(state, normalizer, key[:, i], value[:, i], real[:, i])
        keep = real[:, i, None, None]
        features = taylor_features(query[:, i].to(dtype).masked_fill(~keep, 0), scale)
        total = torch.einsum("bhr,bhrv->bhv", features, state)
        denominator = (features * normalizer).sum(-1, keepdim=True) + EPSILON
        out.append((total / denominator).masked_fill(~keep, 0).to(query.dtype))
    rows = torch.stack(out, dim=1) if out else value[:, :0]
    return rows, state, normalizer
