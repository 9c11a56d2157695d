"""What the two-level search misses, measured on the embeddings at hand."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .functional import RetrieveResult, pool_chunks, retrieve
from .ops import resona


class SearchRecall(NamedTuple):
    """What `search_recall` measured."""

    recall: float  # of the exact search's chunks, the share that was found
    rows_complete: float  # of the rows with anything to find, the share that found all of it
    superchunk_size: int
    probes: int


@torch.no_grad()
def search_recall(
    query_embedding: Tensor,
    context_embedding: Tensor,
    *,
    chunk_size: int,
    top_k: int,
    cu_seqlens: Tensor | None = None,
    superchunk_size: int | None = None,
    probes: int | None = None,
) -> SearchRecall:
    """Compare `search="two_level"` with the exact search, on all rows that are given.

    A chunk that two_level returned counts if its score reaches the exact search's k-th: among chunks
    that tie, as repeated text makes them, one is as good as another. Slots with a NaN score do not count.

    Args:
        query_embedding: [B, T, R, E] or [B, T, E]. The last T rows of a long context are enough.
        context_embedding: [B, L, R, E] or [B, L, E].
        chunk_size: tokens per chunk, S.
        top_k: chunks per query, k.
        cu_seqlens: int32 [n + 1], borders of packed sequences (B = 1, T = L).
        superchunk_size, probes: as in `retrieve`.

    Returns:
        shares from 0 to 1 (1 where there is nothing to find), and the sizes that were used.
    """
    context_length = context_embedding.shape[1]
    chunks = pool_chunks(context_embedding, chunk_size, cu_seqlens)
    settings = {
        "chunk_size": chunk_size,
        "top_k": top_k,
        "context_length": context_length,
        "cu_seqlens": cu_seqlens,
    }
    sizes = {"superchunk_size": superchunk_size, "probes": probes}
    exact = retrieve(query_embedding, chunks, **settings)
    found = retrieve(query_embedding, chunks, **settings, search="two_level", **sizes)
    used = resona._plan_two_level(context_length, chunk_size, top_k, **sizes)
    return SearchRecall(*shares_found(exact, found), *used)


def shares_found(exact: RetrieveResult, found: RetrieveResult) -> tuple[float, float]:
    """`recall` and `rows_complete` of SearchRecall."""
    counted = (exact.indices >= 0) & ~exact.scores.isnan()
    worst = torch.where(counted, exact.scores, torch.inf).amin(dim=-1, keepdim=True)
    wanted = counted.sum(dim=-1)
    hits = ((found.indices >= 0) & (found.scores >= worst)).sum(dim=-1)
    complete = (hits == wanted) & (wanted > 0)
    return _share(hits, wanted), _share(complete, wanted > 0)


def _share(part: Tensor, whole: Tensor) -> float:
    total = int(whole.sum())
    return int(part.sum()) / total if total else 1.0
