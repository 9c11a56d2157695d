"""The cost model of `resona_ext.distributed.retrieve_attend`: forward and backward, per call.

Bytes are those that leave a rank for another one, added up over the ranks. Selections enter by two
constants, which are counted (counting.py) and are 1 for independent random selections:

fresh    share of a query's selected chunks that neighbouring queries do not select anyway; the fewer, the
         fewer distinct chunks a rank has to fetch
spread   how far the k chunks of one query lie apart, as the share of k that behaves as if drawn
         independently; the less, the fewer ranks a query has to visit
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from resona_ext.distributed import Layout
from resona_ext.distributed.agreement import NAMES
from resona_ext.distributed.plan import Sizes, bytes_of_chunk

SAMPLES = 512  # positions and ranks at which sums over all of them are taken


@dataclass(frozen=True)
class Problem:
    """Letters as in the operator. The layout is `Layout.balanced`."""

    length: int
    ranks: int
    heads: int = 16
    kv_heads: int = 16
    head_dim: int = 128
    retrieval_heads: int = 1
    retrieval_dim: int = 128
    chunk_size: int = 64
    top_k: int = 8
    itemsize: int = 2
    fresh: float = 1.0
    spread: float = 1.0

    @property
    def sizes(self) -> Sizes:
        names = ("heads", "kv_heads", "retrieval_heads", "head_dim", "top_k", "chunk_size")
        return Sizes(*(getattr(self, name) for name in names), self.itemsize)

    @property
    def chunks(self) -> int:
        return self.length // self.chunk_size


def flops(p: Problem) -> dict[str, float]:
    """Of the busiest rank, forward: balanced pieces share the triangle of the search evenly."""
    pairs = p.length * p.chunks / 2
    return {
        "search": 2 * p.retrieval_heads * p.retrieval_dim * pairs / p.ranks,
        "attend": 4 * p.heads * p.head_dim * p.top_k * p.chunk_size * p.length / p.ranks,
    }


def messages(p: Problem, exchange: str, has_bias: bool = False) -> int:
    """Collectives per forward: agreement, chunk embeddings, counts for the plan; then the exchange."""
    if exchange == "chunks":
        return 3 + 3  # counts, numbers of chunks, keys and values
    return 3 + 6 + int(has_bias)  # counts, queries, chunks, entries; outputs, log-sum-exps


def fixed_bytes(p: Problem) -> dict[str, float]:
    """What does not depend on the selection. `embedding gradients` only with score_scale."""
    others = p.ranks * (p.ranks - 1)
    layout = Layout.balanced(p.length, p.ranks, p.chunk_size)
    most = max(sum(n for q in own for _, n, _ in layout.chunks_of(q)) for own in layout.pieces)
    rows = most * p.retrieval_heads * p.retrieval_dim
    return {
        "agreement": others * 8 * (2 + len(NAMES) + 3),  # the plan's two counts, one count per pair
        "embeddings": others * rows * p.itemsize,
        "embedding gradients": others * rows * max(4, p.itemsize),
    }


def exchange_bytes(p: Problem, exchange: str, count: float, has_bias: bool = False) -> dict:
    """Forward and backward, of `count` foreign chunks or pairs of a query and a foreign rank."""
    if exchange == "chunks":
        rows = bytes_of_chunk(p.sizes)
        return {"forward": count * (rows + 8), "backward": count * rows}
    wide = max(4, p.itemsize)
    row, lse = p.heads * p.head_dim * p.itemsize, wide * p.heads
    slots = p.retrieval_heads * p.top_k
    gradient = 2 * row + lse + has_bias * slots * wide
    return {"forward": count * (gradient + 8 * slots + 8), "backward": count * gradient}


def _log_unselected(first: np.ndarray, last: np.ndarray, k: int) -> np.ndarray:
    """log of the product of (1 - k / c) over c from first + 1 to last: a chunk that none of them picks."""
    first = np.maximum(first, k)  # up to k chunks, all are picked; foreign ones then are few
    last = np.maximum(last, first)
    a, b = (torch.from_numpy(n.astype(float)) for n in (first, last))
    log = torch.lgamma(b - k + 1) - torch.lgamma(a - k + 1)
    return (log + torch.lgamma(a + 1) - torch.lgamma(b + 1)).numpy()


def foreign_chunks(p: Problem) -> float:
    """Expected distinct chunks of other ranks that each rank selects, added up over the ranks."""
    if p.ranks == 1:
        return 0.0
    layout = Layout.balanced(p.length, p.ranks, p.chunk_size)
    ranks = np.unique(np.linspace(0, p.ranks - 1, min(p.ranks, 16)).astype(int))
    total = 0.0
    for rank in ranks:
        ends = [(q.start // p.chunk_size, q.end // p.chunk_size) for q in layout.pieces[rank]]
        below = max(end for _, end in ends)
        chunk = np.unique(np.linspace(0, max(0, below - 1), min(below, 4096)).astype(int))
        log = np.zeros(len(chunk))
        own = np.zeros(len(chunk), dtype=bool)
        for begin, end in ends:
            # Queries of block c see c chunks, chunk j among them from block j + 1 on.
            log += _log_unselected(
                np.maximum(begin, chunk + 1) - 1, np.full_like(chunk, end - 1), p.top_k
            )
            own |= (begin <= chunk) & (chunk < end)
        wanted = 1 - np.exp(p.chunk_size * p.fresh * log)
        total += float(np.where(own, 0, wanted).mean()) * below * p.retrieval_heads
    return total / len(ranks) * p.ranks


def foreign_pairs(p: Problem) -> float:
    """Expected pairs of a query and another rank that holds chunks of it, added up over the ranks."""
    if p.ranks == 1:
        return 0.0
    layout = Layout.balanced(p.length, p.ranks, p.chunk_size)
    position = (np.arange(SAMPLES) + 0.5) / SAMPLES * p.length
    held = np.zeros((SAMPLES, p.ranks))
    home = np.zeros((SAMPLES, p.ranks), dtype=bool)
    for rank, pieces in enumerate(layout.pieces):
        for piece in pieces:
            held[:, rank] += np.clip(position - piece.start, 0, piece.length)
            home[:, rank] |= (piece.start <= position) & (position < piece.end)
    drawn = np.minimum(p.top_k, position // p.chunk_size) * p.retrieval_heads * p.spread
    visited = 1 - (1 - np.minimum(1, held / position[:, None])) ** drawn[:, None]
    return float(np.where(home, 0, visited).sum(axis=1).mean()) * p.length


def cost(p: Problem) -> dict:
    """All of it, with both exchanges and which of them moves less."""
    counts = {"chunks": foreign_chunks(p), "queries": foreign_pairs(p)}
    moved = {name: exchange_bytes(p, name, count) for name, count in counts.items()}
    best = min(moved, key=lambda name: moved[name]["forward"])
    return {"flops": flops(p), "counts": counts, "moved": moved, "best": best} | fixed_bytes(p)
