"""The upper level of a decode cache: what a two-level search probes. Letters as in `cache.py`; P chunks make
a superchunk.

All of it follows from the chunk embeddings, so it is not saved, and `crop` needs no history for it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .ops import resona


def fold(rows: Tensor, start: int, size: int, open_sum: Tensor, units: Tensor) -> Tensor:
    """Sum rows in groups of `size`, in the canonical order: one after the other from zero.

    Tokens make chunks so, and chunks superchunks.

    Args:
        rows: [B, n, R, E], numbers start, start + 1, ...
        open_sum: [B, R, E] of the rows since the last border.
        units: [B, groups, R, E], of which those that close here are written.

    Returns:
        The new open sum.
    """
    count = rows.shape[1]
    head = min(-start % size, count)
    total = open_sum.clone()
    for i in range(head):
        total += rows[:, i]
    group = start // size
    if head > 0 and (start + head) % size == 0:
        # A group of one row is that row at unit length, which is what is left to do.
        units[:, group] = resona.pool_chunks(total.unsqueeze(1), 1)[:, 0]
        total.zero_()
        group += 1
    whole = (count - head) // size
    tail = head + whole * size
    if whole > 0:
        units[:, group : group + whole] = resona.pool_chunks(rows[:, head:tail], size)
    for i in range(tail, count):
        total += rows[:, i]
    return total


class Superchunks:
    """Centroids of the closed superchunks, and the sum of the open one.

    Attributes:
        size: chunks per superchunk, P.
        embedding: [B, M // S // P, R, E], unit norm; rows of closed superchunks count.
        sum: [B, R, E] of the chunks of the superchunk that is not yet closed; float32, or float64.
    """

    buffers = ("embedding", "sum")

    def __init__(self, size: int, chunk_embedding: Tensor, open_sum: Tensor) -> None:
        self.size = size
        batch, chunks, *heads = chunk_embedding.shape
        self.embedding = chunk_embedding.new_zeros(batch, chunks // size, *heads)
        self.sum = torch.zeros_like(open_sum)

    @property
    def nbytes(self) -> int:
        return self.embedding.nbytes + self.sum.nbytes

    def append(self, rows: slice, chunks: Tensor, start: int) -> Tensor:
        """Take in chunks [B, n, R, E], numbers start, start + 1, ... of these rows of the batch.

        Returns the new sums of these rows; `sum` itself stays.
        """
        return fold(chunks, start, self.size, self.sum[rows], self.embedding[rows])

    def restore(self, chunk_embedding: Tensor, counts: list[int]) -> None:
        """Form everything anew from the first counts[b] chunks of every sequence b."""
        longest = max(counts, default=0)
        used = chunk_embedding[:, :longest]
        self.embedding[:, : longest // self.size] = resona.pool_chunks(used, self.size)
        self.restore_sums(chunk_embedding, dict(enumerate(counts)))

    def restore_sums(self, chunk_embedding: Tensor, counts: dict[int, int]) -> None:
        """Form the sums of sequences b anew, which have counts[b] chunks; equal counts in one go."""
        for count in set(counts.values()):
            rows = [b for b, n in counts.items() if n == count]
            total = self.sum.new_zeros(len(rows), *self.sum.shape[1:])
            for chunk in chunk_embedding[rows, count // self.size * self.size : count].unbind(1):
                total += chunk
            self.sum[rows] = total

    def select(self, index: Tensor, in_place: bool) -> None:
        """Sequence b becomes what sequence index[b] was."""
        for name in self.buffers:
            chosen = getattr(self, name).index_select(0, index)
            if in_place:
                getattr(self, name).copy_(chosen)
            else:
                setattr(self, name, chosen)
