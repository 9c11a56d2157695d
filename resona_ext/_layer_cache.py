"""The layer token by token: what `Resona.forward` does when it is given a cache.

Functions of the layer rather than methods, so that `layer.py` stays the reading of the paper.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ._layer_parts import (
    first_real_token,
    require,
    rms_norm,
    roll_rows,
    score_scale_and_sink,
    search_settings,
)
from .cache import ChunkCache
from .ops import resona

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from .distributed import ShardedChunkCache
    from .layer import Resona


def make_cache(
    layer: Resona,
    batch: int,
    max_length: int,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
    history: int | None,
) -> ChunkCache:
    device = torch.device(layer.k_proj.weight.device if device is None else device)
    if dtype is None:
        dtype = cache_dtype(layer, device)
    inclusive = layer.eligibility == "inclusive"
    taps = max(layer.key_conv - 1, 0)
    room = max_length + int(inclusive)  # see `inclusive` of ChunkCache.prefill
    superchunk_size = search_settings(layer)["superchunk_size"]
    if layer.search == "two_level" and superchunk_size is None:
        # As a full forward over max_length tokens would choose it. Probes go with each call.
        where = (room, layer.chunk_size, layer.top_k)
        superchunk_size = resona._plan_two_level(*where, None, layer.probes)[0]
    return ChunkCache(
        batch,
        room,
        layer.num_kv_heads,
        layer.head_dim,
        layer.retrieval_heads,
        layer.retrieval_dim,
        layer.chunk_size,
        dtype,
        device,
        history,
        carry_rows=taps,
        carry_dim=layer.d_model if taps else 0,
        search=layer.search,
        superchunk_size=superchunk_size,
    )


def make_sharded_cache(
    layer: Resona,
    batch: int,
    max_length: int,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
    mesh: DeviceMesh,
) -> ShardedChunkCache:
    from .distributed import ShardedChunkCache

    if dtype is None:
        dtype = cache_dtype(layer, layer.k_proj.weight.device)
    inclusive = layer.eligibility == "inclusive"
    taps = max(layer.key_conv - 1, 0)
    return ShardedChunkCache(
        batch,
        max_length + int(inclusive),
        layer.num_kv_heads,
        layer.head_dim,
        layer.retrieval_heads,
        layer.retrieval_dim,
        layer.chunk_size,
        dtype,
        device,
        mesh=mesh,
        carry_rows=taps,
        carry_dim=layer.d_model if taps else 0,
        search=layer.search,
    )


def is_sharded(cache: object) -> bool:
    """Whether a cache is a ShardedChunkCache, for which torch.distributed need not be there."""
    module = sys.modules.get("resona_ext.distributed")
    return module is not None and isinstance(cache, module.ShardedChunkCache)


def cache_dtype(layer: Resona, device: torch.device) -> torch.dtype:
    """Of queries, keys and values as the layer computes them now: autocast's, or the weights'."""
    dtype = layer.k_proj.weight.dtype
    is_cast = torch.is_autocast_enabled(device.type) and dtype != torch.float64
    return torch.get_autocast_dtype(device.type) if is_cast else dtype


def check_cache(layer: Resona, cache: ChunkCache, x: Tensor, cu_seqlens: Tensor | None) -> None:
    is_cache = isinstance(cache, ChunkCache) or is_sharded(cache)
    require(is_cache, "cache", "a ChunkCache", type(cache).__name__)
    require(cu_seqlens is None, "cache", "None with cu_seqlens", "both")
    expected = "None with a context encoder of your own, which it cannot run on parts of a chunk"
    require(layer.encoders.is_pooled, "cache", expected, "a cache")
    require(cache.batch == x.shape[0], "cache", f"of batch {x.shape[0]}", cache.batch)
    taps = max(layer.key_conv - 1, 0)
    settings = {
        "num_kv_heads",
        "head_dim",
        "retrieval_heads",
        "retrieval_dim",
        "chunk_size",
        "search",
    }
    if search_settings(layer)["superchunk_size"] is not None:
        settings.add("superchunk_size")
    wanted = {name: getattr(layer, name) for name in sorted(settings)}
    wanted |= {"carry_rows": taps, "carry_dim": layer.d_model if taps else 0}
    got = {name: getattr(cache, name, None) for name in wanted}
    require(got == wanted, "cache", f"one of `make_cache` with {wanted}", got)


def cached_branch(
    layer: Resona, x: Tensor, e: Tensor, cache: ChunkCache, attention_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """c [B, T, d] for tokens that follow those in the cache, and the rows with nothing eligible."""
    if attention_mask is None:
        return _append(layer, x, e, cache, None)
    require(not is_sharded(cache), "attention_mask", "None with a sharded cache", "a mask")
    padding = first_real_token(attention_mask)
    count = (attention_mask != 0).sum(dim=1)
    x, e = roll_rows(x, padding), roll_rows(e, padding)
    retrieved, is_empty = _append(layer, x, e, cache, count)
    return roll_rows(retrieved, -padding), roll_rows(is_empty, -padding)


def _append(
    layer: Resona, x: Tensor, e: Tensor, cache: ChunkCache, count: Tensor | None
) -> tuple[Tensor, Tensor]:
    position = cache.lengths.unsqueeze(1) + torch.arange(x.shape[1], device=x.device)
    source = rms_norm(e) if layer.normalize_key_value else e
    key_source, carry = source, None
    if layer.key_conv_weight is not None:
        key_source = _taps_after(cache, source, layer.key_conv_weight)
        carry = source.to(cache.dtype) if cache.carry_rows else None
    query, key, value, query_embedding = layer._project(x, key_source, source, position, position)
    context = rms_norm(e) if layer.normalize_embeddings else e
    arguments = (
        query,
        key,
        value,
        query_embedding,
        layer.encoders.context_embedding(context, layer.q_proj.weight),
    )
    score_scale, sink = score_scale_and_sink(layer, query.dtype)
    inclusive = layer.eligibility == "inclusive"
    settings = {"top_k": layer.top_k, "score_scale": score_scale, "sink": sink, "carry": carry}
    if cache.search == "two_level":
        settings["probes"] = layer.probes
    if is_sharded(cache):
        out, aux = cache.step(*arguments, **settings, inclusive=inclusive, return_aux=True)
    elif x.shape[1] == 1 and count is None and not inclusive:
        out, aux = cache.step(*arguments, **settings, return_aux=True)
    else:
        settings |= {"lengths": count, "inclusive": inclusive}
        out, aux = cache.prefill(*arguments, **settings, return_aux=True)
    return layer._output(out), aux.indices[:, :, 0, 0] < 0


def _taps_after(cache: ChunkCache, source: Tensor, weight: Tensor) -> Tensor:
    """`causal_taps` for rows that follow those that the cache carries."""
    taps, rows = weight.shape[0], source.shape[1]
    known = torch.cat([cache.carried().to(source.dtype), source], dim=1) if taps > 1 else source
    out = source * weight[0]
    for distance in range(1, taps):
        begin = taps - 1 - distance
        out = out + weight[distance] * known[:, begin : begin + rows]
    return out
