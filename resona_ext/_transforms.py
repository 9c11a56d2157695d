"""What torch's transforms need to know of the operators: autocast, vmap, FLOP counts.

Autocast touches query, key, value and the embeddings only: bias, sink and score_scale stay float32.
Under vmap a mapped dimension is folded into the batch; where that is impossible (packed sequences, or a
mapped score_scale, sink or cu_seqlens) the operator runs once per entry.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import _prefix

ops = torch.ops.resona

# Arguments that vmap folds, by position. Everything else is per head or a setting.
ROWS = {
    "pool_chunks": (0,),
    "retrieve": (0, 1),
    "retrieve_two_level": (0, 1),
    "attend": (0, 1, 2, 3, 5),
    "fused_retrieve_attend": (0, 1, 2, 3, 4),
    "prefix_linear_attention": (0, 1, 2, 3, 4, 5, 6, 8, 9),
}
# Those of them that autocast casts.
CAST = {**ROWS, "attend": (0, 1, 2), "prefix_linear_attention": (0, 1, 2, 3, 4)}
# Position of cu_seqlens.
PACKED = {
    "pool_chunks": 2,
    "retrieve": 5,
    "retrieve_two_level": 5,
    "attend": 7,
    "fused_retrieve_attend": 9,
    "prefix_linear_attention": 7,
}
OUTPUTS = {
    "pool_chunks": 1,
    "retrieve": 2,
    "retrieve_two_level": 2,
    "attend": 2,
    "fused_retrieve_attend": 4,
    "prefix_linear_attention": 3,
}


def _autocast_kernel(name: str, device_type: str):
    op = getattr(ops, name).default
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, "Autocast" + device_type.upper()))

    def kernel(_, *args, **kwargs):
        dtype = torch.get_autocast_dtype(device_type)
        args = list(args)
        for i in CAST[name]:
            if args[i].is_floating_point() and args[i].dtype != torch.float64:
                args[i] = args[i].to(dtype)
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return op(*args, **kwargs)

    return kernel


def _fold(t: Tensor | None, dim: int | None, size: int) -> Tensor | None:
    """[.., n, .., B, ...] -> [n * B, ...]; an argument that is not mapped is repeated as a view."""
    if t is None:
        return None
    t = t.unsqueeze(0).expand(size, *t.shape) if dim is None else t.movedim(dim, 0)
    return t.flatten(0, 1)


def _pick(t, dim: int | None, i: int):
    return t.select(dim, i) if isinstance(t, Tensor) and dim is not None else t


def _vmap_rule(name: str):
    op = getattr(ops, name).default

    def rule(info, in_dims, *args, **kwargs):
        dims = list(in_dims) + [None] * (len(args) - len(in_dims))
        rows, packed = ROWS[name], PACKED[name]
        is_packed = len(args) > packed and args[packed] is not None
        mapped_setting = any(d is not None for i, d in enumerate(dims) if i not in rows)
        if is_packed or mapped_setting:
            results = [
                op(*(_pick(a, d, i) for a, d in zip(args, dims, strict=True)), **kwargs)
                for i in range(info.batch_size)
            ]
            if OUTPUTS[name] == 1:
                return torch.stack(results), 0
            stacked = tuple(torch.stack(r) for r in zip(*results, strict=True))
            return stacked, (0,) * OUTPUTS[name]
        size = info.batch_size
        folded = [
            _fold(a, d, size) if i in rows else a
            for i, (a, d) in enumerate(zip(args, dims, strict=True))
        ]
        results = op(*folded, **kwargs)
        batch = folded[0].shape[0] // size if size else 0
        if OUTPUTS[name] == 1:
            return results.unflatten(0, (size, batch)), 0
        return tuple(r.unflatten(0, (size, batch)) for r in results), (0,) * OUTPUTS[name]

    return rule


def _search_flops(query_shape, context_length: int, chunk_size: int) -> int:
    """Every query against every chunk in its past, two operations per element."""
    batch, queries, heads, dim = query_shape
    first = context_length - queries
    seen = _chunks_before(context_length, chunk_size) - _chunks_before(first, chunk_size)
    return 2 * batch * heads * dim * seen


def _chunks_before(position: int, chunk_size: int) -> int:
    """Sum of p // S over 0 <= p < position, without a loop over rows."""
    whole, rest = divmod(position, chunk_size)
    return chunk_size * whole * (whole - 1) // 2 + rest * whole


def _attend_flops(query_shape, tokens_per_query: int) -> int:
    batch, queries, heads, dim = query_shape
    return 4 * batch * queries * heads * dim * tokens_per_query


def _register_flops() -> None:
    @register_flop_formula(ops.pool_chunks)
    def pool_chunks(context_shape, chunk_size, *args, **kwargs) -> int:
        batch, length, heads, dim = context_shape
        return batch * heads * dim * (length // chunk_size) * chunk_size

    @register_flop_formula(ops.retrieve)
    def retrieve(query_shape, chunk_shape, chunk_size, top_k, context_length, *args, **kwargs):
        return _search_flops(query_shape, context_length, chunk_size)

    # As if every query probed as many superchunks as it may; the one still open counts as half full.
    @register_flop_formula(ops.retrieve_two_level)
    def retrieve_two_level(
        query_shape, chunk_shape, chunk_size, top_k, context_length, *_, **sizes
    ):
        sizes = {name: sizes.get(name) for name in ("superchunk_size", "probes")}
        size, probes = ops._plan_two_level(context_length, chunk_size, top_k, **sizes)
        batch, queries, heads, dim = query_shape
        refined = 2 * batch * queries * heads * dim * min(probes * size + size // 2, chunk_shape[1])
        pooled = pool_chunks(chunk_shape, size)
        return pooled + _search_flops(query_shape, context_length, size * chunk_size) + refined

    # Attention is counted as if all k slots were filled: the shapes say no more.
    @register_flop_formula(ops.attend)
    def attend(query_shape, key_shape, value_shape, indices_shape, chunk_size, *args, **kwargs):
        return _attend_flops(query_shape, indices_shape[3] * chunk_size)

    @register_flop_formula(ops.fused_retrieve_attend)
    def fused(
        query_shape, key_shape, value_shape, query_embedding, context, chunk_size, top_k, *_, **__
    ):
        pooled = pool_chunks(context, chunk_size)
        search = _search_flops(query_embedding, context[1], chunk_size)
        return pooled + search + _attend_flops(query_shape, top_k * chunk_size)

    # As if the cache were full, for the same reason.
    @register_flop_formula(ops.decode_step)
    def decode_step(query_shape, *shapes, **__) -> int:
        query_embedding, chunk_embedding, chunk_size, top_k = (
            shapes[2],
            shapes[6],
            shapes[10],
            shapes[11],
        )
        batch, _, heads, dim = query_embedding
        search = 2 * batch * heads * dim * chunk_embedding[1]
        return search + _attend_flops(query_shape, top_k * chunk_size)

    @register_flop_formula(ops.decode_step_two_level)
    def decode_step_two_level(query_shape, *shapes, probes=None, **__) -> int:
        query_embedding, key_cache, chunk_embedding, centroids = (shapes[i] for i in (2, 4, 6, 10))
        chunk_size, top_k, superchunk_size = shapes[12:15]
        where = (key_cache[1], chunk_size, top_k)
        size, probes = ops._plan_two_level(*where, superchunk_size, probes)
        batch, _, heads, dim = query_embedding
        scored = chunk_embedding[1]
        if centroids[1] > probes:
            scored = centroids[1] + min(probes * size + size // 2, scored)
        return 2 * batch * heads * dim * scored + _attend_flops(query_shape, top_k * chunk_size)

    # d query, d key, d value and the two recomputed products.
    @register_flop_formula(ops._attend_backward)
    def attend_backward(
        out_gradient,
        lse_gradient,
        query_shape,
        key,
        value,
        indices,
        out,
        lse,
        chunk_size,
        *args,
        **kwargs,
    ):
        return 5 * _attend_flops(query_shape, indices[3] * chunk_size) // 2

    _prefix.register_flops()


def register() -> torch.library.Library:
    """The registrations live as long as the library that is returned."""
    library = torch.library.Library("resona", "IMPL")
    for name in ROWS:
        for device_type in ("cpu", "cuda"):
            key = "Autocast" + device_type.upper()
            library.impl(name, _autocast_kernel(name, device_type), key, with_keyset=True)
        torch.library.register_vmap(f"resona::{name}", _vmap_rule(name))
    _register_flops()
    return library
