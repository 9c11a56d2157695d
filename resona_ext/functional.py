"""The operator as Python functions: what `torch.ops.resona` computes, with defaults and named results.

Shapes use the letters of the operator contract: B batch, T queries, L context tokens, H query heads,
Hkv key/value heads, D head dim, R retrieval heads, E retrieval dim, S chunk size, k chunks per query.
Query row i stands at position p = i + (L - T); chunk j holds tokens [jS, (j+1)S) and is eligible for
p when (j+1)S <= p. A trailing partial chunk is never retrieved.

Embeddings may also be given without the retrieval-head dimension, as [B, T, E]: that is R = 1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .ops import resona


class RetrieveResult(NamedTuple):
    """What `retrieve` found: best first, index -1 and score -inf in slots without a chunk."""

    indices: Tensor  # int32 [B, T, R, k]
    scores: Tensor  # float32 (float64 for float64 inputs) [B, T, R, k]


class RetrieveAttendAux(NamedTuple):
    """What `retrieve_attend` knows beside its output."""

    lse: Tensor  # natural log-sum-exp of all logits, sink included, [B, T, H]
    indices: Tensor  # int32 [B, T, R, k]
    scores: Tensor  # [B, T, R, k]


def _with_heads(embedding: Tensor) -> Tensor:
    return embedding.unsqueeze(2) if embedding.dim() == 3 else embedding


def _deterministic(flag: bool | None) -> bool:
    return torch.are_deterministic_algorithms_enabled() if flag is None else flag


def _sizes_of(op: str, search: str, superchunk_size: int | None, probes: int | None) -> dict | None:
    """Keyword arguments of the two-level search, None for the exact one."""
    if search not in ("exact", "two_level"):
        raise ValueError(f'{op}: search: expected "exact" or "two_level", got {search!r}')
    sizes = {"superchunk_size": superchunk_size, "probes": probes}
    if search == "two_level":
        return sizes
    for argument, value in sizes.items():
        if value is not None:
            raise ValueError(f'{op}: {argument}: expected None with search="exact", got {value}')
    return None


def pool_chunks(
    context_embedding: Tensor, chunk_size: int, cu_seqlens: Tensor | None = None
) -> Tensor:
    """Pool each whole chunk of the context into one unit vector.

    Args:
        context_embedding: [B, L, R, E] or [B, L, E].
        chunk_size: tokens per chunk, S >= 1.
        cu_seqlens: int32 [n + 1], borders of packed sequences (B = 1); the chunk grid restarts in each.

    Returns:
        [B, L // S, R, E] in the dtype of the input. A chunk whose sum is zero stays zero.

    Raises:
        RuntimeError: an argument breaks the contract; the message names it.
    """
    return resona.pool_chunks(_with_heads(context_embedding), chunk_size, cu_seqlens)


def retrieve(
    query_embedding: Tensor,
    chunk_embedding: Tensor,
    *,
    chunk_size: int,
    top_k: int,
    context_length: int,
    cu_seqlens: Tensor | None = None,
    search: str = "exact",
    superchunk_size: int | None = None,
    probes: int | None = None,
) -> RetrieveResult:
    """Find the k past chunks that are most similar to each query.

    The score is <query, chunk> / |query|: cosine similarity when chunks have unit norm, as
    `pool_chunks` makes them. Ties go to the lower index; a NaN score ranks below every number.

    Args:
        query_embedding: [B, T, R, E] or [B, T, E].
        chunk_embedding: [B, L // S, R, E] or [B, L // S, E], used as given.
        chunk_size: tokens per chunk, S.
        top_k: chunks per query, k >= 1; may exceed the number of chunks.
        context_length: L, which places the last query at position L - 1.
        cu_seqlens: int32 [n + 1], borders of packed sequences (B = 1, T = L).
        search: "exact", or "two_level" for long contexts: only the chunks of the `probes` best
            superchunks of each query are searched, and those of the one that its past ends in. The
            scores are the same; see docs/two-level.md and `search_recall` for what may be missed.
        superchunk_size: of "two_level", chunks per superchunk. Default by L, S and k, about
            sqrt(chunks / probes).
        probes: of "two_level", superchunks per query. Default max(16, 2 k). A query with no more whole
            superchunks in its past is searched exactly.

    Returns:
        indices int32 and scores, both [B, T, R, k]. Gradients flow to both embeddings through scores.

    Raises:
        ValueError: search is neither, or a size is given to the exact search.
    """
    arguments = (
        _with_heads(query_embedding),
        _with_heads(chunk_embedding),
        chunk_size,
        top_k,
        context_length,
        cu_seqlens,
    )
    sizes = _sizes_of("retrieve", search, superchunk_size, probes)
    if sizes is None:
        return RetrieveResult(*resona.retrieve(*arguments))
    return RetrieveResult(*resona.retrieve_two_level(*arguments, **sizes))


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indices: Tensor,
    *,
    chunk_size: int,
    bias: Tensor | None = None,
    sink: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    deterministic: bool | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention over the tokens of the given chunks.

    Args:
        query: [B, T, H, D].
        key, value: [B, L, Hkv, D] with H a multiple of Hkv.
        indices: int32 [B, T, R, k], any order, -1 unused; a repeated index counts each time. Every
            index must be eligible for its row (an error on CPU, unused on CUDA).
        chunk_size: tokens per chunk, S.
        bias: float32 [B, T, R, k] added to all logits of its chunk; -inf drops the chunk.
        sink: float32 [H], one extra logit per head whose value is zero.
        cu_seqlens: int32 [n + 1], borders of packed sequences (B = 1, T = L).
        scale: factor of <query, key>; default D ** -0.5.
        deterministic: bitwise reproducible backward; default torch.are_deterministic_algorithms_enabled().
        return_lse: also return the natural log-sum-exp of all logits.

    Returns:
        out [B, T, H, D], or (out, lse [B, T, H]). Rows that select nothing give 0 and -inf (or the sink).
    """
    out, lse = resona.attend(
        query,
        key,
        value,
        indices,
        chunk_size,
        bias,
        sink,
        cu_seqlens,
        scale=scale,
        deterministic=_deterministic(deterministic),
    )
    return (out, lse) if return_lse else out


def retrieve_attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_embedding: Tensor,
    context_embedding: Tensor,
    *,
    chunk_size: int,
    top_k: int,
    score_scale: Tensor | None = None,
    sink: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    deterministic: bool | None = None,
    return_aux: bool = False,
    search: str = "exact",
    superchunk_size: int | None = None,
    probes: int | None = None,
) -> Tensor | tuple[Tensor, RetrieveAttendAux]:
    """Pool chunks, find the k best past ones for each query, attend to their tokens.

    Args:
        query: [B, T, H, D].
        key, value: [B, L, Hkv, D].
        query_embedding: [B, T, R, E] or [B, T, E].
        context_embedding: [B, L, R, E] or [B, L, E].
        chunk_size: tokens per chunk, S.
        top_k: chunks per query, k.
        score_scale: float32 [R]; adds score_scale * score to the logits of each chunk, which lets
            gradients reach the embeddings.
        sink: float32 [H], one extra logit per head whose value is zero.
        cu_seqlens: int32 [n + 1], borders of packed sequences (B = 1, T = L).
        scale: factor of <query, key>; default D ** -0.5.
        deterministic: bitwise reproducible backward; default torch.are_deterministic_algorithms_enabled().
        return_aux: also return log-sum-exp, indices and scores.
        search, superchunk_size, probes: as in `retrieve`. "two_level" runs as several operators.

    Returns:
        out [B, T, H, D] in the dtype of query, or (out, RetrieveAttendAux).

    Source: Algorithms 2 and 3 of "Improving Context Copying in Linear Recurrence Models with
    Retrieval" (arXiv 2503.22913).
    """
    embeddings = _with_heads(query_embedding), _with_heads(context_embedding)
    settings = {"scale": scale, "deterministic": _deterministic(deterministic)}
    sizes = _sizes_of("retrieve_attend", search, superchunk_size, probes)
    if sizes is None:
        arguments = (*embeddings, chunk_size, top_k, score_scale, sink, cu_seqlens)
        out, *aux = resona.fused_retrieve_attend(query, key, value, *arguments, **settings)
    else:
        chunks = resona.pool_chunks(embeddings[1], chunk_size, cu_seqlens)
        where = (chunk_size, top_k, key.shape[1], cu_seqlens)
        indices, scores = resona.retrieve_two_level(embeddings[0], chunks, *where, **sizes)
        bias = None
        if score_scale is not None:
            # Unused slots hold -inf, and score_scale * -inf would put NaN into its gradient.
            used = scores.masked_fill(indices < 0, 0.0).to(score_scale.dtype)
            bias = score_scale.unsqueeze(-1) * used
        attention = (indices, chunk_size, bias, sink, cu_seqlens)
        out, lse = resona.attend(query, key, value, *attention, **settings)
        aux = (lse, indices, scores)
    return (out, RetrieveAttendAux(*aux)) if return_aux else out
