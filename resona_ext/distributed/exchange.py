"""How queries meet chunks of other ranks. Two ways, with the same result:

chunks    each rank asks for the distinct chunks that its queries selected; keys and values travel, and
          their gradients back
queries   each rank sends its queries to the ranks that hold chunks of theirs; outputs and log-sum-exps
          come back and are merged

Both leave with the exchange under way, so that the part at home is computed meanwhile, and in backward its
gradients (collectives.Trip). The way of queries to the other ranks is waited for: their answers are what the
part at home overlaps. Whatever a rank has to say or to ask, it takes part in every
collective, forward and backward, in the same order: nothing here branches on a rank's own data.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ..functional import attend
from .collectives import Trip, send, send_counts, send_with_gradient
from .layout import Layout


@dataclass
class Selection:
    """What the queries of one rank selected, and what all its tensors are."""

    query: Tensor  # [B, T, H, D]
    key: Tensor  # [B, T, Hkv, D]
    value: Tensor
    chunk: Tensor  # int64 [B, T, R, k]: chunk rows of the layout, -1 unused
    bias: Tensor | None  # [B, T, R, k]
    layout: Layout
    rank: int
    group: dist.ProcessGroup
    scale: float | None
    deterministic: bool | None

    def __post_init__(self) -> None:
        device = self.query.device
        self.owner_of, self.row_of = self.layout.owner.to(device), self.layout.row.to(device)
        used = self.chunk >= 0
        owner = self.owner_of[self.chunk.clamp(min=0)] if self.layout.chunks else self.chunk
        self.owner = torch.where(used, owner, -1)  # [B, T, R, k]

    @property
    def ranks(self) -> int:
        return self.layout.ranks

    def chunks_at(self, rows: Tensor, chunk_size: int) -> Tensor:
        """Token rows of the chunks that begin at `rows`: [n] -> [n, S]."""
        return rows.unsqueeze(1) + torch.arange(chunk_size, device=rows.device)


def attend_to(
    s: Selection, query: Tensor, key: Tensor, value: Tensor, slots: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Attention to chunks that stand one after another: query [B, n, H, D], key [B, chunks S, Hkv, D].

    The operator takes chunks of a query's past only. So the chunks are followed by as many tokens as there
    are queries, which nobody reads: then all chunks are past.
    """
    filler = key.new_zeros(key.shape[0], query.shape[1], *key.shape[2:])
    return attend(
        query,
        torch.cat([key, filler], dim=1),
        torch.cat([value, filler], dim=1),
        slots.int(),
        chunk_size=s.layout.chunk_size,
        bias=bias,
        scale=s.scale,
        deterministic=s.deterministic,
        return_lse=True,
    )


def merge(one: tuple[Tensor, Tensor], two: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Attention to two sets out of attention to each: (out [.., D], lse [..]) twice, in float32."""
    (out_1, lse_1), (out_2, lse_2) = one, two
    peak = torch.maximum(lse_1, lse_2).detach()
    peak = torch.where(peak == -torch.inf, 0.0, peak)
    weight_1, weight_2 = (lse_1 - peak).exp(), (lse_2 - peak).exp()
    total = weight_1 + weight_2
    nothing = total == 0
    total = torch.where(nothing, 1.0, total)
    out = (weight_1 / total).unsqueeze(-1) * out_1 + (weight_2 / total).unsqueeze(-1) * out_2
    return out, torch.where(nothing, -torch.inf, peak + total.log())


def at_home(s: Selection) -> tuple[Tensor, Tensor]:
    """Attention to the rank's own chunks."""
    rows, position = own_chunks(s)
    tokens = s.chunks_at(s.row_of[rows], s.layout.chunk_size).flatten()
    slots = torch.full_like(s.chunk, -1)
    if rows.numel():
        slots = torch.where(s.owner == s.rank, position[s.chunk.clamp(min=0)], -1)
    return attend_to(s, s.query, s.key[:, tokens], s.value[:, tokens], slots, s.bias)


def own_chunks(s: Selection) -> tuple[Tensor, Tensor]:
    """The chunk rows of this rank, ascending, and for each chunk row its place among them."""
    rows = (s.owner_of == s.rank).nonzero().squeeze(1)
    position = torch.full_like(s.owner_of, -1)
    position[rows] = torch.arange(rows.numel(), device=rows.device)
    return rows, position


class ChunkExchange:
    """Keys and values of foreign chunks come here."""

    def __init__(self, s: Selection):
        self.s = s
        chunks, heads, batch = max(1, s.layout.chunks), s.chunk.shape[2], s.chunk.shape[0]
        device = s.chunk.device
        entry = torch.arange(batch, device=device)[:, None, None, None]
        head = torch.arange(heads, device=device)[:, None]
        # (owner, batch entry, retrieval head, chunk) as one number, so that sorted means by owner.
        number = ((s.owner * batch + entry) * heads + head) * chunks + s.chunk
        self.is_foreign = (s.owner >= 0) & (s.owner != s.rank)
        self.number = torch.where(self.is_foreign, number, -1)
        self.wanted = self.number[self.is_foreign].unique()
        self.there = torch.bincount(self.wanted // (batch * heads * chunks), minlength=s.ranks)
        self.shape = (batch, heads, chunks)

    @property
    def count(self) -> Tensor:
        return self.there.sum()

    def _parts(self, number: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Batch entry, retrieval head, chunk."""
        batch, heads, chunks = self.shape
        group = number // chunks
        return group // heads % batch, group % heads, number % chunks

    def start(self) -> None:
        s, size = self.s, self.s.layout.chunk_size
        from_here = send_counts(self.there, s.group)
        to_here = self.there.tolist()
        asked = send(self.wanted, from_here, to_here, s.group)
        entry, head, chunk = self._parts(asked)
        tokens = s.chunks_at(s.row_of[chunk], size) if s.layout.chunks else chunk[:, None]
        pair = [
            x.unflatten(2, (self.shape[1], -1))[entry[:, None], tokens, head[:, None]]
            for x in (s.key, s.value)
        ]
        # [n, 2, S, Hkv / R, D]
        self.trip = Trip(to_here, from_here, s.group).depart(torch.stack(pair, dim=1))

    def finish(self) -> tuple[Tensor, Tensor]:
        s, size = self.s, self.s.layout.chunk_size
        batch, heads, _ = self.shape
        entry, head, _ = self._parts(self.wanted)
        group = entry * heads + head
        counts = torch.bincount(group, minlength=batch * heads)
        most = max(counts.tolist(), default=0)
        order = group.argsort(stable=True)
        position = torch.empty_like(group)
        within = torch.arange(group.numel(), device=group.device)
        position[order] = within - (counts.cumsum(0) - counts)[group[order]]

        kv_heads = s.key.shape[2] // heads
        buffers = s.key.new_zeros(batch, most, heads, 2, size, kv_heads, s.key.shape[3])
        buffers = buffers.index_put((entry, position, head), self.trip.arrive())
        key, value = (
            x.permute(0, 1, 3, 2, 4, 5).flatten(3, 4).flatten(1, 2) for x in buffers.unbind(3)
        )
        found = torch.searchsorted(self.wanted, self.number).clamp(
            max=max(0, self.wanted.numel() - 1)
        )
        slots = position[found] if self.wanted.numel() else torch.zeros_like(found)
        slots = torch.where(self.is_foreign, slots, -1)
        return attend_to(s, s.query, key, value, slots, s.bias)


class QueryExchange:
    """Queries go to the ranks that hold chunks of theirs, results come back."""

    def __init__(self, s: Selection):
        self.s = s
        ranks = torch.arange(s.ranks, device=s.chunk.device)
        goes = (s.owner.flatten(0, 1).flatten(1).unsqueeze(0) == ranks[:, None, None]).any(dim=2)
        goes[s.rank] = False
        self.to, self.row = goes.nonzero(as_tuple=True)  # sorted by rank, then query
        self.there = goes.sum(dim=1)

    @property
    def count(self) -> Tensor:
        return self.there.sum()

    def start(self) -> None:
        s = self.s
        self.from_here = send_counts(self.there, s.group)
        self.to_here = self.there.tolist()
        sizes = (self.from_here, self.to_here, s.group)
        queries = s.query.shape[1]
        query = send_with_gradient(s.query.flatten(0, 1)[self.row], *sizes)
        bias = None
        if s.bias is not None:
            own = s.bias.flatten(0, 1)
            own = torch.where(own.isfinite(), own, 0.0)  # of unused slots
            bias = send_with_gradient(own[self.row], *sizes)
        is_there = s.owner.flatten(0, 1)[self.row] == self.to[:, None, None]
        chunk = torch.where(is_there, s.chunk.flatten(0, 1)[self.row], -1)
        chunk = send(chunk, *sizes)
        entry = send(self.row // max(1, queries), *sizes)
        out, lse = self._serve(query, chunk, entry, bias)
        back = (self.to_here, self.from_here, s.group)
        self.trips = [Trip(*back).depart(t) for t in (out, lse)]

    def _serve(self, query: Tensor, chunk: Tensor, entry: Tensor, bias: Tensor | None):
        """Attention of foreign queries to own chunks; batch entries stand one after another."""
        s, size = self.s, self.s.layout.chunk_size
        rows, position = own_chunks(s)
        tokens = s.chunks_at(s.row_of[rows], size).flatten()
        slots = position[chunk.clamp(min=0)] if rows.numel() else torch.zeros_like(chunk)
        slots = torch.where(chunk >= 0, slots + entry[:, None, None] * rows.numel(), -1)
        key, value = (x[:, tokens].flatten(0, 1).unsqueeze(0) for x in (s.key, s.value))
        bias = None if bias is None else bias.unsqueeze(0)
        out, lse = attend_to(s, query.unsqueeze(0), key, value, slots.unsqueeze(0), bias)
        return out.squeeze(0), lse.squeeze(0)

    def finish(self) -> tuple[Tensor, Tensor]:
        s = self.s
        batch, queries, heads, dim = s.query.shape
        came_out, came_lse = (trip.arrive() for trip in self.trips)
        wide = came_lse.dtype
        result = (
            came_out.new_zeros(batch * queries, heads, dim, dtype=wide),
            came_lse.new_full((batch * queries, heads), -torch.inf),
        )
        begin = 0
        for count in self.to_here:
            part = slice(begin, begin + count)
            row, begin = self.row[part], begin + count
            out = torch.zeros_like(result[0]).index_copy(0, row, came_out[part].to(wide))
            lse = torch.full_like(result[1], -torch.inf).index_copy(0, row, came_lse[part])
            result = merge(result, (out, lse))
        return result[0].unflatten(0, (batch, queries)), result[1].unflatten(0, (batch, queries))


EXCHANGES = {"chunks": ChunkExchange, "queries": QueryExchange}
