"""Which rank holds which tokens. Plain numbers, the same on every rank; nothing is communicated here.

A rank holds one or more pieces, runs of consecutive tokens, in ascending order. Pieces begin on borders
of the chunk grid, so every whole chunk lies on one rank.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Piece:
    """Tokens [start, start + length) of the whole."""

    start: int
    length: int

    @property
    def end(self) -> int:
        return self.start + self.length


@dataclass(frozen=True)
class Layout:
    """The pieces of every rank.

    Args:
        pieces: of each rank, ascending.
        chunk_size: tokens per chunk, S.
        borders: of the sequences, (0, L) or the whole of cu_seqlens; the chunk grid restarts in each.

    Raises:
        ValueError: pieces overlap, leave a gap, or begin inside a chunk.
    """

    pieces: tuple[tuple[Piece, ...], ...]
    chunk_size: int
    borders: tuple[int, ...]

    def __post_init__(self) -> None:
        require(self.chunk_size >= 1, "chunk_size", "at least 1", self.chunk_size)
        in_order = self.borders[:1] == (0,) and all(a <= b for a, b in self.steps(self.borders))
        require(in_order, "borders", "ascending numbers from 0", list(self.borders))
        at = 0
        for piece in sorted(itertools.chain(*self.pieces), key=lambda p: (p.start, p.length)):
            require(piece.start == at, "pieces", f"one that begins at token {at}", piece)
            within = at - self.borders[self.sequence_of(at)] if at < self.length else 0
            expected = f"a piece to begin at a multiple of {self.chunk_size} tokens of its sequence"
            require(within % self.chunk_size == 0, "pieces", expected, piece)
            at = piece.end
        require(at == self.length, "pieces", f"{self.length} tokens in all", at)
        for own in self.pieces:
            ascending = all(a.end <= b.start for a, b in self.steps(own))
            require(ascending, "pieces", "ascending pieces on every rank", own)

    @staticmethod
    def steps(items: Iterable) -> Iterable:
        return itertools.pairwise(items)

    @classmethod
    def contiguous(
        cls,
        length: int,
        ranks: int,
        chunk_size: int,
        cu_seqlens: Sequence[int] | None = None,
    ) -> Layout:
        """One piece per rank, of as equal length as whole chunks allow."""
        borders = _borders(length, cu_seqlens)
        cuts = _cuts(borders, ranks, chunk_size)
        pieces = tuple((Piece(a, b - a),) for a, b in cls.steps(cuts))
        return cls(pieces, chunk_size, borders)

    @classmethod
    def balanced(
        cls,
        length: int,
        ranks: int,
        chunk_size: int,
        cu_seqlens: Sequence[int] | None = None,
    ) -> Layout:
        """Two pieces per rank, one early and one late: later queries have more chunks to search."""
        borders = _borders(length, cu_seqlens)
        cuts = _cuts(borders, 2 * ranks, chunk_size)
        all_pieces = [Piece(a, b - a) for a, b in cls.steps(cuts)]
        pairs = tuple((all_pieces[r], all_pieces[2 * ranks - 1 - r]) for r in range(ranks))
        return cls(pairs, chunk_size, borders)

    @classmethod
    def of_lengths(
        cls, lengths: Sequence[int], chunk_size: int, cu_seqlens: Sequence[int] | None = None
    ) -> Layout:
        """One piece per rank of the given lengths, in the order of the ranks."""
        cuts = [0, *itertools.accumulate(lengths)]
        pieces = tuple((Piece(a, b - a),) for a, b in cls.steps(cuts))
        return cls(pieces, chunk_size, _borders(cuts[-1], cu_seqlens))

    @property
    def length(self) -> int:
        return self.borders[-1]

    @property
    def ranks(self) -> int:
        return len(self.pieces)

    def tokens_of(self, rank: int) -> int:
        return sum(piece.length for piece in self.pieces[rank])

    def sequence_of(self, token: int) -> int:
        """The sequence that holds a token; empty ones hold none."""
        return bisect.bisect_right(self.borders, token) - 1

    @cached_property
    def chunk_begin(self) -> tuple[int, ...]:
        """Chunks before each sequence, and in all: chunk rows are numbered over the sequences."""
        counts = ((b - a) // self.chunk_size for a, b in self.steps(self.borders))
        return tuple(itertools.accumulate(counts, initial=0))

    @property
    def chunks(self) -> int:
        return self.chunk_begin[-1]

    def chunks_of(self, piece: Piece) -> list[tuple[int, int, int]]:
        """Runs of whole chunks in a piece: (first chunk row, count, first token)."""
        runs = []
        last = min(self.sequence_of(max(piece.start, piece.end - 1)), len(self.borders) - 2)
        for s in range(self.sequence_of(piece.start), last + 1):
            begin, end = self.borders[s], self.borders[s + 1]
            first = max(0, piece.start - begin) // self.chunk_size
            stop = (min(piece.end, end) - begin) // self.chunk_size
            if stop > first:
                token = begin + first * self.chunk_size
                runs.append((self.chunk_begin[s] + first, stop - first, token))
        return runs

    @cached_property
    def owner(self) -> Tensor:
        """The rank that holds each chunk row, int64 [chunks]."""
        return self._places[0]

    @cached_property
    def row(self) -> Tensor:
        """The row of that rank's tensors at which the chunk begins, int64 [chunks]."""
        return self._places[1]

    @cached_property
    def _places(self) -> tuple[Tensor, Tensor]:
        owner = torch.empty(self.chunks, dtype=torch.long)
        row = torch.empty(self.chunks, dtype=torch.long)
        for rank, own in enumerate(self.pieces):
            before = 0
            for piece in own:
                for first, count, token in self.chunks_of(piece):
                    owner[first : first + count] = rank
                    start = before + token - piece.start
                    row[first : first + count] = start + self.chunk_size * torch.arange(count)
                before += piece.length
        return owner, row


def shard(tensor: Tensor, layout: Layout, rank: int, dim: int = 1) -> Tensor:
    """The rows of the whole that a rank holds."""
    parts = [tensor.narrow(dim, piece.start, piece.length) for piece in layout.pieces[rank]]
    return torch.cat(parts, dim)


def unshard(tensors: Sequence[Tensor], layout: Layout, dim: int = 1) -> Tensor:
    """The whole out of what all ranks hold: the inverse of `shard`."""
    parts = []
    for tensor, own in zip(tensors, layout.pieces, strict=True):
        sizes = [piece.length for piece in own]
        parts += zip((p.start for p in own), tensor.split(sizes, dim), strict=True)
    return torch.cat([part for _, part in sorted(parts, key=lambda x: x[0])], dim)


def require(ok: bool, argument: str, expected: str, got: object) -> None:
    if not ok:
        raise ValueError(f"resona_ext.distributed: {argument}: expected {expected}, got {got}")


def _borders(length: int, cu_seqlens: Sequence[int] | None) -> tuple[int, ...]:
    if cu_seqlens is None:
        return (0, length)
    borders = tuple(int(n) for n in cu_seqlens)
    require(borders[-1:] == (length,), "cu_seqlens", f"to end with {length}", list(borders[-1:]))
    return borders


def _cuts(borders: tuple[int, ...], parts: int, chunk_size: int) -> list[int]:
    """Nearly equal parts that begin on chunk borders."""
    length = borders[-1]
    cuts = [0]
    for i in range(1, parts):
        target = i * length // parts
        begin = borders[bisect.bisect_right(borders, target) - 1] if target < length else 0
        cuts.append(max(cuts[-1], target - (target - begin) % chunk_size))
    return [*cuts, length]
