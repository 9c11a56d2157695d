"""`Resona.forward` where each rank holds some of the tokens.

Everything in the layer is token by token but three things:

    positions      from the layout                                        rows.positions
    key_conv       reads the tokens left of a piece, from other ranks     Rows.before
    the operator   retrieve_attend of this package, or a sharded cache

What is a mistake on one rank is an error on all of them, as in `retrieve_attend`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .._layer_cache import check_cache
from .._layer_parts import (
    causal_taps,
    check_inputs,
    require,
    rms_norm,
    score_scale_and_sink,
)
from .agreement import agree, bits, check_device, checksum, number_of
from .attention import retrieve_attend
from .cache import ShardedChunkCache
from .layout import Layout
from .rows import Rows, positions

if TYPE_CHECKING:
    from ..layer import Resona

NAMES = (
    "batch",
    "d_model",
    "key_conv",
    "chunk_size",
    "dtype of hidden_states",
    "dtype of embeddings",
    "layout and borders (checksum)",
    "cache",
    "requires_grad",  # of the inputs, as bits
)


def sharded_branch(
    layer: Resona,
    mesh: DeviceMesh,
    layout: Layout | None,
    x: Tensor,
    e: Tensor,
    y: Tensor | None,
    cu_seqlens: Tensor | None,
    attention_mask: Tensor | None,
    cache: ShardedChunkCache | None,
    indices: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """c [B, T, d] of this rank's tokens, and which rows had nothing eligible [B, T]."""
    require(mesh.ndim == 1, "mesh", 'of one dimension, as mesh["context"]', mesh)
    group = mesh.get_group()
    rank = dist.get_rank(group)
    own, error, borders = None, "", None
    try:
        check_inputs(layer.d_model, x, e, y, None, attention_mask)
        _check_sharded(layer, mesh, layout, x, e, cu_seqlens, attention_mask, cache, indices)
        borders = None if cu_seqlens is None else tuple(cu_seqlens.tolist())
        own = _facts(layer, layout, x, e, y, borders, cache)
    except (ValueError, RuntimeError) as problem:
        error = str(problem)
    lengths = agree(own, error, x.shape[1] if x.dim() > 1 else 0, mesh, group, NAMES)
    if layout is None:
        layout = Layout.of_lengths(lengths, layer.chunk_size, borders)

    rows, position = Rows(layout, rank, group), positions(layout, rank, x.device)
    source = rms_norm(e) if layer.normalize_key_value else e
    key_source = source
    if layer.key_conv_weight is not None:
        key_source = _taps(source, layer.key_conv_weight, rows, position)
    query, key, value, query_embedding = layer._project(x, key_source, source, position, position)
    context = rms_norm(e) if layer.normalize_embeddings else e
    pool = None
    if layer.encoders.is_pooled:
        context = layer.encoders.context_embedding(context, layer.q_proj.weight)
    else:

        def pool(rows: Tensor, borders: Tensor | None) -> Tensor:
            chunk = layer.encoders.chunk_embedding(rows, layer.chunk_size, borders)
            return chunk.to(query_embedding.dtype)

    score_scale, sink = score_scale_and_sink(layer, query.dtype)
    arguments = (query, key, value, query_embedding, context)
    settings = {"top_k": layer.top_k, "score_scale": score_scale, "sink": sink, "layout": layout}
    settings |= {"inclusive": layer.eligibility == "inclusive", "return_aux": True}
    if cache is not None:
        carry = source.to(cache.dtype) if cache.carry_rows else None
        out, aux = cache.prefill(*arguments, carry=carry, **settings)
    else:
        settings |= {"chunk_size": layer.chunk_size, "mesh": mesh, "pool": pool}
        out, aux = retrieve_attend(*arguments, **settings)
    return layer._output(out), aux.indices[:, :, 0, 0] < 0


def _check_sharded(layer, mesh, layout, x, e, cu_seqlens, attention_mask, cache, indices) -> None:
    check_device(x, "hidden_states", mesh)
    check_device(e, "embeddings", mesh)
    require(attention_mask is None, "attention_mask", "None with a mesh (pack instead)", "a mask")
    require(indices is None, "indices", "None with a mesh, which searches for itself", "indices")
    both = cu_seqlens is not None and layout is not None
    require(not both, "cu_seqlens", "None with a layout, which has its own borders", "both")
    packed = cu_seqlens is not None or (layout is not None and len(layout.borders) > 2)
    require(not packed or x.shape[0] == 1, "hidden_states", "of batch 1 when packed", list(x.shape))
    if layout is not None:
        ranks, rank = mesh.size(), mesh.get_local_rank()
        require(layout.ranks == ranks, "layout", f"one for {ranks} ranks", layout.ranks)
        size = layer.chunk_size
        require(layout.chunk_size == size, "layout", f"chunks of {size}", layout.chunk_size)
        expected = f"{layout.tokens_of(rank)} tokens on rank {rank}, as the layout says"
        require(layout.tokens_of(rank) == x.shape[1], "hidden_states", expected, x.shape[1])
    if cache is not None:
        require(not packed, "cache", "None with packed sequences", "both")
        expected = "a cache of `make_cache` with the same mesh"
        is_sharded = isinstance(cache, ShardedChunkCache) and cache.mesh == mesh
        require(is_sharded, "cache", expected, type(cache).__name__)
        check_cache(layer, cache, x, cu_seqlens)


def _facts(layer, layout, x, e, y, borders, cache) -> dict[str, int]:
    pieces = None if layout is None else (layout.pieces, layout.borders)
    tensors = [t for t in (x, e, y) if t is not None]
    values = (
        x.shape[0],
        layer.d_model,
        layer.key_conv,
        layer.chunk_size,
        number_of(x, "hidden_states"),
        number_of(e, "embeddings"),
        checksum((pieces, borders)),
        int(cache is not None),
        bits(torch.is_grad_enabled() and t.requires_grad for t in tensors),
    )
    return dict(zip(NAMES, values, strict=True))


def _taps(source: Tensor, weight: Tensor, rows: Rows, position: Tensor) -> Tensor:
    """`causal_taps` where what stands left of a piece may lie on another rank."""
    left = weight.shape[0] - 1
    pieces = rows.before(source, left)
    lengths = [piece.shape[1] - left for piece in pieces]
    results = [
        # The rows in front only give: what becomes of them is cut off.
        causal_taps(piece, weight, torch.nn.functional.pad(own, (left, 0)))[:, left:]
        for piece, own in zip(pieces, position.split(lengths), strict=True)
    ]
    return torch.cat([source[:, :0], *results], dim=1)
