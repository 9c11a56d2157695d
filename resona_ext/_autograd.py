"""Gradients: each public operator saves indices and log-sum-exp and calls the raw backward operators.

Indices are constants. The embeddings get a gradient only through the scores, that is when score_scale is
given or a gradient reaches `scores`; otherwise none, which is the paper's hard mask. The backward
operators themselves are not differentiable: asking for it is an error, not a wrong number.
"""

from __future__ import annotations

import torch
from torch.autograd import forward_ad

from . import _prefix

ops = torch.ops.resona


def _setup_pool_chunks(ctx, inputs, output):
    context_embedding, ctx.chunk_size, cu_seqlens = inputs
    ctx.save_for_backward(context_embedding, cu_seqlens)


def _backward_pool_chunks(ctx, gradient):
    context_embedding, cu_seqlens = ctx.saved_tensors
    grad = ops._pool_chunks_backward(gradient, context_embedding, ctx.chunk_size, cu_seqlens)
    return grad, None, None


def _setup_retrieve(ctx, inputs, output):
    query, chunks, ctx.chunk_size, _, ctx.context_length, cu_seqlens = inputs
    indices, _ = output
    ctx.mark_non_differentiable(indices)
    ctx.save_for_backward(indices, query, chunks, cu_seqlens)


def _setup_retrieve_two_level(ctx, inputs, keyword_only_inputs, output):
    _setup_retrieve(ctx, inputs, output)


def _backward_retrieve(ctx, _, score_gradient):
    indices, query, chunks, cu_seqlens = ctx.saved_tensors
    grads = ops._retrieve_backward(
        score_gradient, indices, query, chunks, ctx.chunk_size, ctx.context_length, cu_seqlens
    )
    return (*grads, None, None, None, None)


def _setup_attend(ctx, inputs, keyword_only_inputs, output):
    query, key, value, indices, ctx.chunk_size, bias, sink, cu_seqlens = inputs
    ctx.keywords = keyword_only_inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(query, key, value, indices, bias, sink, cu_seqlens, *output)


def _attend_gradients(ctx, out_gradient, lse_gradient, saved, bias):
    query, key, value, indices, sink, cu_seqlens, out, lse = saved
    if out_gradient is None:
        out_gradient = torch.zeros_like(out)
    return ops._attend_backward(
        out_gradient,
        lse_gradient,
        query,
        key,
        value,
        indices,
        out,
        lse,
        ctx.chunk_size,
        bias,
        sink,
        cu_seqlens,
        **ctx.keywords,
    )


def _backward_attend(ctx, out_gradient, lse_gradient):
    if out_gradient is None and lse_gradient is None:
        return (None,) * 8
    query, key, value, indices, bias, sink, cu_seqlens, out, lse = ctx.saved_tensors
    saved = (query, key, value, indices, sink, cu_seqlens, out, lse)
    dq, dk, dv, dbias, dsink = _attend_gradients(ctx, out_gradient, lse_gradient, saved, bias)
    dbias = None if bias is None else dbias
    dsink = None if sink is None else dsink
    return dq, dk, dv, None, None, dbias, dsink, None


def _setup_fused(ctx, inputs, keyword_only_inputs, output):
    (query, key, value, query_embedding, context_embedding, ctx.chunk_size, _) = inputs[:7]
    score_scale, sink, cu_seqlens = inputs[7:]
    out, lse, indices, scores = output
    ctx.keywords = keyword_only_inputs
    ctx.mark_non_differentiable(indices)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(
        query,
        key,
        value,
        query_embedding,
        context_embedding,
        score_scale,
        sink,
        cu_seqlens,
        out,
        lse,
        indices,
        scores,
    )


def _backward_fused(ctx, out_gradient, lse_gradient, _, score_gradient):
    saved = ctx.saved_tensors  # read once: activation checkpointing allows no second time
    query, key, value, query_embedding, context_embedding, score_scale = saved[:6]
    sink, cu_seqlens, out, lse, indices, scores = saved[6:]
    dq = dk = dv = dsink = dscale = dquery_embedding = dcontext_embedding = None
    if out_gradient is not None or lse_gradient is not None:
        used_scores = torch.where(indices >= 0, scores, 0.0)  # score_scale * -inf would be NaN
        bias = None
        if score_scale is not None:
            bias = (score_scale[:, None] * used_scores).to(score_scale.dtype)
        needed = (query, key, value, indices, sink, cu_seqlens, out, lse)
        dq, dk, dv, dbias, dsink = _attend_gradients(ctx, out_gradient, lse_gradient, needed, bias)
        dsink = None if sink is None else dsink
        if score_scale is not None:
            # One number out of B T k terms that may cancel: summed in float64.
            dscale = (dbias.double() * used_scores).sum(dim=(0, 1, 3)).to(score_scale.dtype)
            through_bias = (dbias * score_scale[:, None]).to(scores.dtype)
            score_gradient = (
                through_bias if score_gradient is None else score_gradient + through_bias
            )
    if score_gradient is not None and (ctx.needs_input_grad[3] or ctx.needs_input_grad[4]):
        chunks = ops.pool_chunks(context_embedding, ctx.chunk_size, cu_seqlens)
        dquery_embedding, dchunks = ops._retrieve_backward(
            score_gradient,
            indices,
            query_embedding,
            chunks,
            ctx.chunk_size,
            context_embedding.shape[1],
            cu_seqlens,
        )
        if ctx.needs_input_grad[4]:
            dcontext_embedding = ops._pool_chunks_backward(
                dchunks, context_embedding, ctx.chunk_size, cu_seqlens
            )
    embeddings = (dquery_embedding, dcontext_embedding)
    return dq, dk, dv, *embeddings, None, None, dscale, dsink, None


def _refuse_double_backward(name: str):
    def backward(ctx, *gradients):
        raise RuntimeError(
            f"resona::{name}: double backward: expected at most one differentiation, got a second. "
            "Call backward() or grad() without create_graph=True."
        )

    return backward


def _refuse_tangents(name: str, arguments) -> None:
    for t in arguments:
        if isinstance(t, torch.Tensor) and forward_ad.unpack_dual(t).tangent is not None:
            raise RuntimeError(
                f"resona::{name}: forward-mode differentiation: expected inputs without tangents, got a "
                "dual tensor. Use reverse mode: backward() or torch.autograd.grad()."
            )


def _raw(name: str):
    """A step in place: below autograd as it is, refused where a gradient would be lost."""
    op = getattr(ops, name).default
    arguments = tuple(a.name for a in op._schema.arguments)

    def kernel(keyset, *args, **kwargs):
        if torch.is_grad_enabled():
            for argument, t in zip(arguments, args, strict=False):
                if isinstance(t, torch.Tensor) and t.requires_grad:
                    raise RuntimeError(
                        f"resona::{name}: {argument}: expected no gradient, as the step has no backward, "
                        "got requires_grad=True. Call it under torch.no_grad()."
                    )
        with torch._C._AutoDispatchBelowAutograd():
            below = keyset & torch._C._after_autograd_keyset
            return op.redispatch(below, *args, **kwargs)

    return kernel


class _ReverseModeLibrary(torch.library.Library):
    """torch's autograd kernel drops tangents in silence; one registered here refuses them."""

    def impl(self, op_name, fn, dispatch_key="", **options):
        def guarded(keyset, *args, **kwargs):
            if getattr(forward_ad, "_current_level", 0) >= 0:
                _refuse_tangents(op_name, args)
            return fn(keyset, *args, **kwargs)

        super().impl(op_name, guarded, dispatch_key, **options)


def register() -> torch.library.Library:
    """The registrations live as long as the library that is returned."""
    library = _ReverseModeLibrary("resona", "IMPL")
    for name, setup, backward in (
        ("pool_chunks", _setup_pool_chunks, _backward_pool_chunks),
        ("retrieve", _setup_retrieve, _backward_retrieve),
        ("retrieve_two_level", _setup_retrieve_two_level, _backward_retrieve),
        ("attend", _setup_attend, _backward_attend),
        ("fused_retrieve_attend", _setup_fused, _backward_fused),
        ("prefix_linear_attention", _prefix.setup_context, _prefix.backward),
        ("_pool_chunks_backward", None, _refuse_double_backward("_pool_chunks_backward")),
        ("_retrieve_backward", None, _refuse_double_backward("_retrieve_backward")),
        ("_attend_backward", None, _refuse_double_backward("_attend_backward")),
        (
            "_prefix_linear_attention_backward",
            None,
            _refuse_double_backward("_prefix_linear_attention_backward"),
        ),
    ):
        torch.library.register_autograd(
            f"resona::{name}", backward, setup_context=setup, lib=library
        )
    for name in ("decode_step", "decode_step_two_level", "prefix_linear_attention_step"):
        library.impl(name, _raw(name), "Autograd", with_keyset=True)
    return library
