"""Rows that a rank needs from others when the layout alone says which: no counts are exchanged first.

before()  the rows left of each piece, which a short causal convolution reads
last()    the end of the whole, on every rank
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

from .collectives import send_with_gradient
from .layout import Layout


class Rows:
    """Takes part in one exchange per call, on every rank, with gradients."""

    def __init__(self, layout: Layout, rank: int, group) -> None:
        self.layout, self.rank, self.group = layout, rank, group
        pieces = [(p.start, r, p) for r, own in enumerate(layout.pieces) for p in own if p.length]
        self._sorted = sorted(pieces, key=lambda entry: entry[0])
        self._starts = [start for start, *_ in self._sorted]

    def _place(self, token: int) -> tuple[int, int]:
        """The rank that holds a token, and the row there."""
        start, rank, piece = self._sorted[bisect.bisect_right(self._starts, token) - 1]
        own = self.layout.pieces[rank]
        return rank, token - start + sum(p.length for p in own[: own.index(piece)])

    def fetch(self, x: Tensor, wanted: Sequence[Sequence[int]]) -> Tensor:
        """The tokens that this rank wants: x [B, T, ...] of its own -> [B, wanted, ...].

        Args:
            wanted: of every rank, the tokens by their numbers in the whole.
        """
        places = [[self._place(token) for token in tokens] for tokens in wanted]
        sent = [row for of_rank in places for owner, row in of_rank if owner == self.rank]
        there = [sum(owner == self.rank for owner, _ in of_rank) for of_rank in places]
        owners = [owner for owner, _ in places[self.rank]]
        here = [owners.count(rank) for rank in range(self.layout.ranks)]
        rows = x.transpose(0, 1)[torch.tensor(sent, dtype=torch.long, device=x.device)]
        received = send_with_gradient(rows, here, there, self.group)  # by owner, then as wanted
        order = sorted(range(len(owners)), key=lambda i: owners[i])
        back = torch.tensor(order, dtype=torch.long, device=x.device).argsort()
        return received[back].transpose(0, 1)

    def before(self, x: Tensor, count: int) -> list[Tensor]:
        """For each piece of this rank [B, count + length, d]: its rows behind the `count` tokens before.

        Zeros stand in for tokens before the sequence in which the piece begins.
        """
        wanted = [[self._left_of(p.start, count) for p in own] for own in self.layout.pieces]
        every = self.fetch(x, [list(chain.from_iterable(of_rank)) for of_rank in wanted])
        known = every.split([len(tokens) for tokens in wanted[self.rank]], dim=1)
        rows = x.split([p.length for p in self.layout.pieces[self.rank]], dim=1)
        return [
            torch.nn.functional.pad(torch.cat(pair, dim=1), (0, 0, count - pair[0].shape[1], 0))
            for pair in zip(known, rows, strict=True)
        ]

    def _left_of(self, start: int, count: int) -> list[int]:
        layout = self.layout
        begin = layout.borders[layout.sequence_of(start)] if start < layout.length else start
        return list(range(max(begin, start - count), start))

    def last(self, x: Tensor, count: int) -> Tensor:
        """The last `count` tokens of the whole, fewer if there are fewer: [B, <= count, ...]."""
        length = self.layout.length
        tokens = range(max(0, length - count), length)
        return self.fetch(x, [tokens] * self.layout.ranks)


def positions(layout: Layout, rank: int, device: torch.device) -> Tensor:
    """Of each token of a rank, its place in its own sequence: [T]."""
    token = torch.cat(
        [torch.arange(0), *(torch.arange(p.start, p.end) for p in layout.pieces[rank])]
    )
    borders = torch.tensor(layout.borders)
    return (token - borders[torch.searchsorted(borders, token, right=True) - 1]).to(device)
