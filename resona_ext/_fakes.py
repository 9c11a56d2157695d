"""Fake kernels: shapes and dtypes of the results, after the same checks as the real ones."""

from __future__ import annotations

import torch

from . import _prefix
from ._checks import (
    accumulation_dtype,
    check_attend,
    check_decode,
    check_fused,
    check_pool_chunks,
    check_retrieve,
    check_superchunks,
    check_two_level,
)


def _pool_chunks(context_embedding, chunk_size, cu_seqlens=None):
    s = check_pool_chunks("pool_chunks", context_embedding, chunk_size, cu_seqlens)
    chunks = s.context // chunk_size
    return context_embedding.new_empty(s.batch, chunks, s.retrieval_heads, s.retrieval_dim)


def _pool_chunks_backward(chunk_gradient, context_embedding, chunk_size, cu_seqlens=None):
    check_pool_chunks("_pool_chunks_backward", context_embedding, chunk_size, cu_seqlens)
    return context_embedding.new_empty(context_embedding.shape)


def _retrieve(query_embedding, chunk_embedding, chunk_size, top_k, context_length, cu_seqlens=None):
    s = check_retrieve(
        "retrieve", query_embedding, chunk_embedding, chunk_size, top_k, context_length, cu_seqlens
    )
    shape = (s.batch, s.queries, s.retrieval_heads, top_k)
    indices = query_embedding.new_empty(shape, dtype=torch.int32)
    return indices, query_embedding.new_empty(shape, dtype=accumulation_dtype(query_embedding))


def _retrieve_two_level(
    query_embedding,
    chunk_embedding,
    chunk_size,
    top_k,
    context_length,
    cu_seqlens=None,
    *,
    superchunk_size=None,
    probes=None,
):
    op, search = "retrieve_two_level", (chunk_size, top_k, context_length, cu_seqlens)
    s = check_retrieve(op, query_embedding, chunk_embedding, *search)
    check_two_level(op, superchunk_size, probes)
    shape = (s.batch, s.queries, s.retrieval_heads, top_k)
    indices = query_embedding.new_empty(shape, dtype=torch.int32)
    return indices, query_embedding.new_empty(shape, dtype=accumulation_dtype(query_embedding))


def _retrieve_backward(
    score_gradient,
    indices,
    query_embedding,
    chunk_embedding,
    chunk_size,
    context_length,
    cu_seqlens=None,
):
    check_retrieve(
        "_retrieve_backward",
        query_embedding,
        chunk_embedding,
        chunk_size,
        indices.shape[3],
        context_length,
        cu_seqlens,
    )
    return query_embedding.new_empty(query_embedding.shape), query_embedding.new_empty(
        chunk_embedding.shape
    )


def _attend(
    query,
    key,
    value,
    indices,
    chunk_size,
    bias=None,
    sink=None,
    cu_seqlens=None,
    *,
    scale=None,
    deterministic=False,
):
    check_attend("attend", query, key, value, indices, chunk_size, bias, sink, cu_seqlens, scale)
    lse = query.new_empty(query.shape[:3], dtype=accumulation_dtype(query))
    return query.new_empty(query.shape), lse


def _attend_backward(
    out_gradient,
    lse_gradient,
    query,
    key,
    value,
    indices,
    out,
    lse,
    chunk_size,
    bias=None,
    sink=None,
    cu_seqlens=None,
    *,
    scale=None,
    deterministic=False,
):
    op = "_attend_backward"
    check_attend(op, query, key, value, indices, chunk_size, bias, sink, cu_seqlens, scale)
    dtype = accumulation_dtype(query)
    return (
        query.new_empty(query.shape),
        query.new_empty(key.shape),
        query.new_empty(key.shape),
        query.new_empty(0 if bias is None else bias.shape, dtype=dtype),
        query.new_empty(0 if sink is None else sink.shape, dtype=dtype),
    )


def _attended_and_retrieved(s, query, query_embedding, top_k):
    """out, lse, indices, scores."""
    slots = (*query.shape[:2], s.retrieval_heads, top_k)
    return (
        query.new_empty(query.shape),
        query.new_empty(query.shape[:3], dtype=accumulation_dtype(query)),
        query.new_empty(slots, dtype=torch.int32),
        query.new_empty(slots, dtype=accumulation_dtype(query_embedding)),
    )


def _fused_retrieve_attend(
    query,
    key,
    value,
    query_embedding,
    context_embedding,
    chunk_size,
    top_k,
    score_scale=None,
    sink=None,
    cu_seqlens=None,
    *,
    scale=None,
    deterministic=False,
):
    s = check_fused(
        "fused_retrieve_attend",
        query,
        key,
        value,
        query_embedding,
        context_embedding,
        chunk_size,
        top_k,
        score_scale,
        sink,
        cu_seqlens,
        scale,
    )
    return _attended_and_retrieved(s, query, query_embedding, top_k)


def _decode_step(
    query,
    key,
    value,
    query_embedding,
    context_embedding,
    key_cache,
    value_cache,
    chunk_embedding,
    open_sum,
    history,
    lengths,
    chunk_size,
    top_k,
    score_scale=None,
    sink=None,
    *,
    scale=None,
):
    s = check_decode(
        "decode_step",
        query,
        key,
        value,
        query_embedding,
        context_embedding,
        key_cache,
        value_cache,
        chunk_embedding,
        open_sum,
        history,
        lengths,
        chunk_size,
        top_k,
        score_scale,
        sink,
        scale,
    )
    return _attended_and_retrieved(s, query, query_embedding, top_k)


def _decode_step_two_level(
    query,
    key,
    value,
    query_embedding,
    context_embedding,
    key_cache,
    value_cache,
    chunk_embedding,
    open_sum,
    history,
    lengths,
    superchunk_embedding,
    superchunk_sum,
    chunk_size,
    top_k,
    superchunk_size,
    score_scale=None,
    sink=None,
    *,
    probes=None,
    scale=None,
):
    op, new = "decode_step_two_level", (query, key, value, query_embedding, context_embedding)
    state = (key_cache, value_cache, chunk_embedding, open_sum, history, lengths)
    s = check_decode(op, *new, *state, chunk_size, top_k, score_scale, sink, scale)
    superchunks = (superchunk_embedding, superchunk_sum, chunk_size, superchunk_size, probes)
    check_superchunks(op, s, query, query_embedding, *superchunks)
    return _attended_and_retrieved(s, query, query_embedding, top_k)


def register() -> None:
    for fake in (
        _pool_chunks,
        _pool_chunks_backward,
        _retrieve,
        _retrieve_two_level,
        _retrieve_backward,
        _attend,
        _attend_backward,
        _fused_retrieve_attend,
        _decode_step,
        _decode_step_two_level,
    ):
        name = fake.__name__ if fake.__name__.endswith("_backward") else fake.__name__[1:]
        torch.library.register_fake(f"resona::{name}", fake)
    _prefix.register_fakes()
