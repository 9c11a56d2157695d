"""The middle of the layer: which chunks each token gets, and the attention to them.

Functions of the layer rather than methods, so that `layer.py` stays the reading of the paper.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ._layer_parts import require, rms_norm, roll_rows, score_scale_and_sink, search_settings
from .cache import ChunkCache
from .functional import attend, retrieve, retrieve_attend

if TYPE_CHECKING:
    from .layer import Resona


def search_and_attend(
    layer: Resona,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_embedding: Tensor,
    e: Tensor,
    cu_seqlens: Tensor | None,
    indices: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The operator: out [B, T, H, D], and which rows selected nothing [B, T].

    One head tells for all heads what is eligible, as that depends on the position alone; indices that
    are given may leave out more.
    """
    score_scale, sink = score_scale_and_sink(layer, query.dtype)
    settings = {"chunk_size": layer.chunk_size, "cu_seqlens": cu_seqlens}
    if indices is not None:
        out = attend(query, key, value, indices, sink=sink, **settings)
        return out, (indices < 0).flatten(2).all(dim=-1)

    search = search_settings(layer)
    context = rms_norm(e) if layer.normalize_embeddings else e
    if layer.encoders.is_pooled:
        out, aux = retrieve_attend(
            query,
            key,
            value,
            query_embedding,
            layer.encoders.context_embedding(context, layer.q_proj.weight),
            top_k=layer.top_k,
            score_scale=score_scale,
            sink=sink,
            return_aux=True,
            **search,
            **settings,
        )
        return out, aux.indices[:, :, 0, 0] < 0

    chunk = layer.encoders.chunk_embedding(context, layer.chunk_size, cu_seqlens)
    chunk = chunk.to(query_embedding.dtype)
    where = {"top_k": layer.top_k, "context_length": e.shape[1]}
    indices, scores = retrieve(query_embedding, chunk, **where, **search, **settings)
    bias = None
    if score_scale is not None:
        # Unused slots hold -inf, and score_scale * -inf would put NaN into its gradient.
        bias = score_scale.unsqueeze(-1) * scores.masked_fill(indices < 0, 0.0)
    out = attend(query, key, value, indices, bias=bias, sink=sink, **settings)
    return out, indices[:, :, 0, 0] < 0


def check_indices(
    layer: Resona, indices: Tensor, x: Tensor, cu_seqlens: Tensor | None, cache: ChunkCache | None
) -> None:
    """Whether a selection made elsewhere goes with the rest. Its values are the operator's to check."""
    require(cache is None, "indices", "None with a cache, which searches for itself", "both")
    expected = "None with trainable_retrieval, which learns from its own scores"
    require(not layer.trainable_retrieval, "indices", expected, "indices")
    expected = 'None with cu_seqlens and eligibility="inclusive"'
    require(cu_seqlens is None or layer.eligibility == "strict", "indices", expected, "all three")
    heads = layer.retrieval_heads
    expected = f"torch.int32 [{x.shape[0]}, {x.shape[1]}, {heads}, k >= 1]"
    got = f"{indices.dtype} {list(indices.shape)}"
    valid = indices.dtype == torch.int32 and indices.dim() == 4 and indices.shape[3] >= 1
    valid = valid and list(indices.shape[:3]) == [*x.shape[:2], heads]
    require(valid, "indices", expected, got)


def roll_indices(indices: Tensor, padding: Tensor, attention_mask: Tensor) -> Tensor:
    """`roll_rows` for indices [B, T, R, k]; rows of padding select nothing."""
    kept = indices.masked_fill((attention_mask == 0)[:, :, None, None], -1)
    return roll_rows(kept.flatten(2), padding).view_as(kept)
