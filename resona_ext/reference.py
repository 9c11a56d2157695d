"""The operator in plain PyTorch: the definition that every backend is tested against.

Read it top to bottom as the contract. Nothing here is fast: `retrieve` holds the whole [T, C]
score matrix and `attend` gathers k * S tokens per query. Gradients come from autograd.

Symbols: B batch, T queries, L context tokens, H query heads, Hkv key/value heads, D head dim,
R retrieval heads, E retrieval dim, S chunk size, k chunks retrieved per query, C = L // S chunks.
Query row i stands at position p = i + (L - T); chunk j holds tokens [jS, (j+1)S).

`attend` computes in the dtype of its inputs, without upcasting: run it in float64 for the truth
and in the dtype at hand for the error that this dtype may be forgiven.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

LANES = 8  # partial sums of the canonical dot product


def canonical_dot(a: Tensor, b: Tensor) -> Tensor:
    """Sum of a * b over the last dimension, in float64 and in the one order all backends share.

    Element e goes into partial sum e mod 8, ascending; the eight are then added at distance
    4, 2, 1. A product of two float32 numbers is exact in float64, so contraction cannot matter.
    """
    a, b = a.double(), b.double()
    shape = torch.broadcast_shapes(a.shape[:-1], b.shape[:-1])
    partial = torch.zeros(*shape, LANES, dtype=torch.float64, device=a.device)
    for e in range(0, a.shape[-1], LANES):
        product = a[..., e : e + LANES] * b[..., e : e + LANES]
        partial = partial + torch.nn.functional.pad(product, (0, LANES - product.shape[-1]))
    for distance in (4, 2, 1):
        partial = partial[..., :distance] + partial[..., distance:]
    return partial[..., 0]


def _sqrt(x: Tensor) -> Tensor:
    """Correctly rounded. torch's float64 sqrt on CPU is one ulp off in about 1 % of cases (2.13)."""
    root = x.sqrt()
    exact = x.detach().cpu().clone().apply_(math.sqrt).to(x.device)
    return torch.where(exact == root, root, root + (exact - root.detach()))  # inf - inf is NaN


def _divide_by_norm(numerator: Tensor, squared_norm: Tensor) -> Tensor:
    """numerator / sqrt(squared_norm); zero, with zero gradient, where the norm is zero."""
    is_zero = squared_norm == 0
    norm = _sqrt(torch.where(is_zero, 1.0, squared_norm))
    return torch.where(is_zero, 0.0, numerator / norm)


def _score_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _sequences(cu_seqlens: Tensor) -> list[tuple[int, int]]:
    return list(itertools.pairwise(cu_seqlens.tolist()))


def pool_chunks(context_embedding: Tensor, chunk_size: int, cu_seqlens: Tensor | None = None):
    """Unit-norm sums of whole chunks. [B, L, R, E] -> [B, L // S, R, E]; packed: the rest zero."""
    if cu_seqlens is not None:
        pooled = [
            pool_chunks(context_embedding[:, begin:end], chunk_size)
            for begin, end in _sequences(cu_seqlens)
        ]
        pooled = torch.cat([context_embedding[:, :0], *pooled], dim=1)
        missing = context_embedding.shape[1] // chunk_size - pooled.shape[1]
        return torch.nn.functional.pad(pooled, (0, 0, 0, 0, 0, missing))
    chunks = context_embedding.shape[1] // chunk_size
    tokens = context_embedding[:, : chunks * chunk_size].unflatten(1, (chunks, chunk_size))
    tokens = tokens.to(_score_dtype(context_embedding))
    total = torch.zeros_like(tokens[:, :, 0])
    for s in range(chunk_size):
        total = total + tokens[:, :, s]
    squared_norm = canonical_dot(total, total).unsqueeze(-1)
    unit = _divide_by_norm(total.double(), squared_norm)
    return unit.to(total.dtype).to(context_embedding.dtype)


def similarity(query_embedding: Tensor, chunk_embedding: Tensor) -> Tensor:
    """Every score, rounded once, -0 made +0. [B, T, R, E], [B, C, R, E] -> [B, R, T, C]."""
    query = query_embedding.transpose(1, 2)
    chunk = chunk_embedding.transpose(1, 2)
    dot = canonical_dot(query.unsqueeze(3), chunk.unsqueeze(2))
    score = _divide_by_norm(dot, canonical_dot(query, query).unsqueeze(-1))
    return score.to(_score_dtype(query_embedding)) + 0.0


def retrieve(
    query_embedding: Tensor,
    chunk_embedding: Tensor,
    chunk_size: int,
    top_k: int,
    context_length: int,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The k best chunks wholly in the past of each query: score descending, then index ascending.

    [B, T, R, E], [B, C, R, E] -> indices int32, scores, both [B, T, R, k]. A NaN score ranks
    below every number. Slots without a chunk hold index -1 and score -inf.
    """
    if cu_seqlens is not None:
        return _each_sequence(
            lambda query, chunk, length: retrieve(query, chunk, chunk_size, top_k, length),
            query_embedding,
            chunk_embedding,
            chunk_size,
            cu_seqlens,
        )
    score = similarity(query_embedding, chunk_embedding)
    past = _eligible_chunks(query_embedding, chunk_size, context_length)
    chunk = torch.arange(context_length // chunk_size, device=score.device)
    return _best(score, chunk < past.unsqueeze(1), top_k)


def retrieve_two_level(
    query_embedding: Tensor,
    chunk_embedding: Tensor,
    chunk_size: int,
    top_k: int,
    context_length: int,
    cu_seqlens: Tensor | None = None,
    *,
    superchunk_size: int,
    probes: int,
) -> tuple[Tensor, Tensor]:
    """`retrieve` among the chunks of the best superchunks of each query.

    Superchunk u is chunks [uP, (u+1)P), P = superchunk_size; chunks are to superchunks what tokens
    are to chunks, so `pool_chunks` makes the centroids and `retrieve` finds the `probes` best ones
    wholly in the past. Their chunks are searched, and those of the superchunk in which the past ends.
    """
    if cu_seqlens is not None:
        sizes = {"superchunk_size": superchunk_size, "probes": probes}
        return _each_sequence(
            lambda query, chunk, length: retrieve_two_level(
                query, chunk, chunk_size, top_k, length, **sizes
            ),
            query_embedding,
            chunk_embedding,
            chunk_size,
            cu_seqlens,
        )
    centroid = pool_chunks(chunk_embedding.detach(), superchunk_size)
    tokens = superchunk_size * chunk_size
    probed, _ = retrieve(query_embedding.detach(), centroid, tokens, probes, context_length)
    probed = probed.transpose(1, 2).unsqueeze(-1)  # [B, R, T, probes, 1]

    past = _eligible_chunks(query_embedding, chunk_size, context_length).unsqueeze(1)
    chunk = torch.arange(context_length // chunk_size, device=past.device)
    superchunk = chunk // superchunk_size
    searched = (superchunk == probed).any(dim=3) | (superchunk == past // superchunk_size)
    score = similarity(query_embedding, chunk_embedding)
    return _best(score, searched & (chunk < past), top_k)


def _each_sequence(
    search, query_embedding: Tensor, chunk_embedding: Tensor, chunk_size: int, cu_seqlens: Tensor
) -> tuple[Tensor, Tensor]:
    """search(query, chunk, context_length) of every packed sequence, one after another."""
    parts = [search(query_embedding[:, :0], chunk_embedding[:, :0], 0)]
    chunk_begin = 0
    for begin, end in _sequences(cu_seqlens):
        chunks = (end - begin) // chunk_size
        own = chunk_embedding[:, chunk_begin : chunk_begin + chunks]
        parts.append(search(query_embedding[:, begin:end], own, end - begin))
        chunk_begin += chunks
    indices, scores = zip(*parts, strict=True)
    return torch.cat(indices, dim=1), torch.cat(scores, dim=1)


def _eligible_chunks(query_embedding: Tensor, chunk_size: int, context_length: int) -> Tensor:
    """How many chunks lie wholly before each row, [T]."""
    rows = query_embedding.shape[1]
    position = torch.arange(rows, device=query_embedding.device) + (context_length - rows)
    return position // chunk_size


def _best(score: Tensor, eligible: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Indices and scores [B, T, R, k] of the best eligible of [B, R, T, C]."""
    # A stable sort by score, then one by kind (number, NaN, not eligible), keeps indices ascending.
    is_nan = score.detach().isnan()
    comparable = torch.where(is_nan, -torch.inf, score.detach())
    order = comparable.sort(dim=-1, descending=True, stable=True).indices
    kind = torch.where(eligible, is_nan.int(), 2)
    order = order.gather(-1, kind.gather(-1, order).sort(dim=-1, stable=True).indices)
    order = order[..., :top_k]
    found = eligible.expand_as(score).gather(-1, order)
    indices = torch.where(found, order, -1).int()
    scores = torch.where(found, score.gather(-1, order), -torch.inf)
    missing = (0, top_k - indices.shape[-1])
    indices = torch.nn.functional.pad(indices, missing, value=-1)
    scores = torch.nn.functional.pad(scores, missing, value=-torch.inf)
    return indices.transpose(1, 2).contiguous(), scores.transpose(1, 2).contiguous()


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indices: Tensor,
    chunk_size: int,
    bias: Tensor | None = None,
    sink: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention over the tokens of the selected chunks.

    query [B, T, H, D], key and value [B, L, Hkv, D], indices [B, T, R, k] with -1 for unused
    slots, bias [B, T, R, k] added to every logit of its chunk, sink [H] one extra logit with a
    zero value -> out [B, T, H, D], lse [B, T, H]. A repeated index counts each time.
    """
    if cu_seqlens is not None:
        token = torch.arange(query.shape[1], device=query.device)
        first = cu_seqlens.long()[torch.searchsorted(cu_seqlens.long(), token, right=True) - 1]
        return _attend_tokens(query, key, value, indices, first, chunk_size, bias, sink, scale)
    first = torch.zeros(query.shape[1], dtype=torch.long, device=query.device)
    return _attend_tokens(query, key, value, indices, first, chunk_size, bias, sink, scale)


def _attend_tokens(query, key, value, indices, first, chunk_size, bias, sink, scale):
    """`first` [T] is the token at which the chunk grid of each row begins."""
    batch, _, heads, dim = query.shape
    kv_heads, groups = key.shape[2], indices.shape[2]
    scale = dim**-0.5 if scale is None else scale
    used = indices >= 0
    if bias is not None:
        used = used & (bias != -torch.inf)

    within = torch.arange(chunk_size, device=query.device)
    token = first[:, None, None, None] + indices.long().unsqueeze(-1) * chunk_size + within
    token = torch.where(used.unsqueeze(-1), token, 0).flatten(3)  # [B, T, R, k * S]
    used = used.unsqueeze(-1).expand(*used.shape, chunk_size).flatten(3)

    # One retrieval head serves kv_heads // R key/value heads: [B, T, Hkv, k * S].
    token = token.repeat_interleave(kv_heads // groups, dim=2)
    used = used.repeat_interleave(kv_heads // groups, dim=2)
    batch_index = torch.arange(batch, device=query.device)[:, None, None, None]
    head_index = torch.arange(kv_heads, device=query.device)[None, None, :, None]
    if key.shape[1] == 0:  # nothing can be selected, and nothing can be gathered
        token, used = token[..., :0], used[..., :0]
    gathered_key = key[batch_index, token, head_index]
    gathered_value = value[batch_index, token, head_index].masked_fill(~used.unsqueeze(-1), 0)

    grouped = query.unflatten(2, (kv_heads, heads // kv_heads))
    logit = scale * torch.einsum("bthgd,bthnd->bthgn", grouped, gathered_key)
    if bias is not None:
        per_token = bias.to(logit.dtype).unsqueeze(-1).expand(*bias.shape, chunk_size).flatten(3)
        per_token = per_token.repeat_interleave(kv_heads // groups, dim=2)
        logit = logit + per_token[..., : logit.shape[-1]].unsqueeze(3)
    logit = logit.masked_fill(~used.unsqueeze(3), -torch.inf)
    zero = torch.zeros(kv_heads, heads // kv_heads, dtype=logit.dtype, device=logit.device)
    extra = (zero - torch.inf) if sink is None else sink.to(logit.dtype).view_as(zero)

    peak = torch.cat([logit, extra[..., None].expand(*logit.shape[:-1], 1)], dim=-1).detach()
    peak = peak.amax(dim=-1)
    peak = torch.where(peak == -torch.inf, 0.0, peak)
    weight = torch.exp(logit - peak.unsqueeze(-1))
    total = weight.sum(dim=-1) + torch.exp(extra - peak)
    nothing = total == 0
    total = torch.where(nothing, 1.0, total)
    out = torch.einsum("bthgn,bthnd->bthgd", weight, gathered_value) / total.unsqueeze(-1)
    lse = torch.where(nothing, -torch.inf, peak + total.log())
    return out.flatten(2, 3), lse.flatten(2, 3).to(_score_dtype(query))


def fused_retrieve_attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_embedding: Tensor,
    context_embedding: Tensor,
    chunk_size: int,
    top_k: int,
    score_scale: Tensor | None = None,
    sink: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """attend(retrieve(pool_chunks(...))); score_scale [R] turns the scores into the bias."""
    chunk_embedding = pool_chunks(context_embedding, chunk_size, cu_seqlens)
    indices, scores = retrieve(
        query_embedding, chunk_embedding, chunk_size, top_k, key.shape[1], cu_seqlens
    )
    bias = None
    if score_scale is not None:
        finite = torch.where(indices >= 0, scores, 0.0)  # score_scale * -inf must reach no gradient
        bias = score_scale[:, None] * finite
    out, lse = attend(query, key, value, indices, chunk_size, bias, sink, cu_seqlens, scale)
    return out, lse, indices, scores
