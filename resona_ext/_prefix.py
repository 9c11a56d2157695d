"""Prefix linear attention as torch sees it: fake kernels, gradients, FLOPs."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import register_flop_formula

from ._checks import accumulation_dtype
from ._prefix_checks import check_prefix, check_prefix_step

ops = torch.ops.resona

TILE = 64  # tokens that meet pair by pair; csrc/common/plan_prefix.h


def _prefix_linear_attention(
    query,
    key,
    value,
    prefix_key,
    prefix_value,
    prefix_lengths=None,
    mask=None,
    cu_seqlens=None,
    initial_state=None,
    initial_normalizer=None,
    *,
    scale=None,
):
    s = check_prefix(
        "prefix_linear_attention",
        query,
        key,
        value,
        prefix_key,
        prefix_value,
        prefix_lengths,
        mask,
        cu_seqlens,
        initial_state,
        initial_normalizer,
        scale,
    )
    dtype = accumulation_dtype(query)
    return (
        value.new_empty(value.shape),
        query.new_empty(s.state, dtype=dtype),
        query.new_empty(s.state[:3], dtype=dtype),
    )


def _prefix_linear_attention_backward(
    out_gradient,
    state_gradient,
    normalizer_gradient,
    out,
    query,
    key,
    value,
    prefix_key,
    prefix_value,
    prefix_lengths=None,
    mask=None,
    cu_seqlens=None,
    initial_state=None,
    initial_normalizer=None,
    *,
    scale=None,
):
    check_prefix(
        "_prefix_linear_attention_backward",
        query,
        key,
        value,
        prefix_key,
        prefix_value,
        prefix_lengths,
        mask,
        cu_seqlens,
        initial_state,
        initial_normalizer,
        scale,
    )
    dtype = accumulation_dtype(query)
    states = [
        query.new_empty(0 if t is None else t.shape, dtype=dtype)
        for t in (initial_state, initial_normalizer)
    ]
    return (
        *(t.new_empty(t.shape) for t in (query, key, value, prefix_key, prefix_value)),
        *states,
    )


def _prefix_linear_attention_step(query, key, value, state, normalizer, mask=None, *, scale=None):
    op = "prefix_linear_attention_step"
    check_prefix_step(op, query, key, value, state, normalizer, mask, scale)
    return value.new_empty(value.shape)


def register_fakes() -> None:
    for name, fake in (
        ("prefix_linear_attention", _prefix_linear_attention),
        ("_prefix_linear_attention_backward", _prefix_linear_attention_backward),
        ("prefix_linear_attention_step", _prefix_linear_attention_step),
    ):
        torch.library.register_fake(f"resona::{name}", fake)


def setup_context(ctx, inputs, keyword_only_inputs, output):
    ctx.keywords = keyword_only_inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[0], *inputs)


def backward(ctx, out_gradient, state_gradient, normalizer_gradient):
    if out_gradient is None and state_gradient is None and normalizer_gradient is None:
        return (None,) * 10
    out, *inputs = ctx.saved_tensors
    if out_gradient is None:
        out_gradient = torch.zeros_like(out)
    *rows, state, normalizer = ops._prefix_linear_attention_backward(
        out_gradient, state_gradient, normalizer_gradient, out, *inputs, **ctx.keywords
    )
    states = (None, None) if inputs[8] is None else (state, normalizer)
    return (*rows, None, None, None, *states)


def _flops(query_shape, value_shape, prefix_shape) -> int:
    """Within a tile two products of pairs; for the rest one read and one update of the state per token,
    for the prefix one update. The symmetric half of the features is what is computed.
    """
    batch, tokens, heads, f = query_shape
    dim, features = value_shape[3], 1 + f + f * (f + 1) // 2
    pairs = 2 * TILE * (f + dim)
    state = 2 * features * dim
    return batch * heads * (tokens * (pairs + 2 * state) + prefix_shape[1] * state)


def register_flops() -> None:
    @register_flop_formula(ops.prefix_linear_attention)
    def forward(query, key, value, prefix_key, *args, **kwargs) -> int:
        return _flops(query, value, prefix_key)

    # The reads and updates of both sweeps, and twice the pairs and the way through the features.
    @register_flop_formula(ops._prefix_linear_attention_backward)
    def backward_flops(
        out_gradient, state, normalizer, out, query, key, value, prefix_key, *args, **kwargs
    ) -> int:
        return 3 * _flops(query, value, prefix_key)

    @register_flop_formula(ops.prefix_linear_attention_step)
    def step(query, key, value, state, *args, **kwargs) -> int:
        batch, heads, features, dim = state
        return 4 * batch * heads * features * dim
