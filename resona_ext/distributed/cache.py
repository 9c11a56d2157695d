"""`ChunkCache` of a context that no single device holds.

    keys, values        each token on one rank: the prompt's where its layout has them, a new chunk's on
                        the rank that then has the fewest
    chunk embeddings    of all chunks on every rank: L / S of them
    a step              every rank has the same new tokens, searches all chunks, attends to those at home;
                        the partial results, one row each, are gathered and merged by log-sum-exp

The merge goes by the order of the ranks, so all ranks return the same bits and may sample by themselves.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .._cache_checks import check_carry, check_piece, check_settings, refuse_gradients, require
from .._cache_parts import Piece
from .._cache_superchunks import fold
from ..functional import RetrieveAttendAux, _with_heads, attend, retrieve
from .agreement import agree, check_device, checksum, number_of
from .attention import DistributedAux, retrieve_attend
from .collectives import all_gather
from .exchange import merge
from .layout import Layout
from .rows import Rows

NAMES = (
    "heads",
    "top_k",
    "dtype of query",
    "score_scale",
    "sink",
    "inclusive",
    "settings of the cache (checksum)",
    "tokens in the cache",
    "layout (checksum)",
)


class Home(NamedTuple):
    """Where a chunk stands."""

    rank: int
    place: int  # among that rank's chunks


class ShardedChunkCache:
    """Keys, values and chunk embeddings of the tokens so far, for one layer, over the ranks of a mesh.

    A full forward over L tokens equals one `prefill` of sharded tokens and `step` for the rest: the same
    indices bit for bit, outputs to rounding (partial outputs are in the dtype of queries: one rounding
    more). All sequences of the batch are equally long. Nothing here has gradients.

    Args:
        mesh: of one dimension, the ranks that share the context. Every rank makes every call.
        batch, max_length, num_kv_heads, head_dim, retrieval_heads, retrieval_dim, chunk_size, dtype,
            embedding_dtype, carry_rows, carry_dim: as in `ChunkCache`; max_length of the whole.
        device: of all buffers; default the mesh's.
        search: "exact". There is no other over the ranks of a mesh.

    Attributes:
        key, value: [B, own tokens and room, Hkv, D], chunk by chunk.
        chunk_embedding: [B, M // S, R, E] of the whole, the same on every rank.

    Raises:
        ValueError: from any method, on every rank: an argument that does not fit on any of them, or more
            than max_length tokens. The cache is then as it was.
    """

    def __init__(
        self,
        batch: int,
        max_length: int,
        num_kv_heads: int,
        head_dim: int,
        retrieval_heads: int,
        retrieval_dim: int,
        chunk_size: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        *,
        mesh: DeviceMesh,
        embedding_dtype: torch.dtype | None = None,
        carry_rows: int = 0,
        carry_dim: int = 0,
        search: str = "exact",
    ) -> None:
        expected = '"exact", as nothing else is searched over several ranks'
        require(search == "exact", "ShardedChunkCache", "search", expected, repr(search))
        self.search = search
        is_line = mesh.ndim == 1
        require(is_line, "ShardedChunkCache", "mesh", 'one dimension, as mesh["context"]', mesh)
        self.mesh, self.group = mesh, mesh.get_group()
        self.rank, self.ranks = dist.get_rank(self.group), mesh.size()
        self.batch, self.max_length = batch, max_length
        self.num_kv_heads, self.head_dim = num_kv_heads, head_dim
        self.retrieval_heads, self.retrieval_dim = retrieval_heads, retrieval_dim
        self.chunk_size = chunk_size
        self.carry_rows, self.carry_dim = carry_rows, carry_dim
        self.dtype = dtype
        self.embedding_dtype = dtype if embedding_dtype is None else embedding_dtype
        self.history_rows = carry_rows
        # A device with its number, as tensors have it.
        self.device = torch.empty(0, device=mesh.device_type if device is None else device).device
        check_settings(self)
        self.reset()

    def reset(self) -> None:
        """Forget all tokens, and give back the memory of keys and values."""
        heads = (self.retrieval_heads, self.retrieval_dim)
        wide = torch.float64 if self.embedding_dtype == torch.float64 else torch.float32

        def zeros(*shape: int, dtype: torch.dtype = self.dtype) -> Tensor:
            return torch.zeros(self.batch, *shape, dtype=dtype, device=self.device)

        chunks = self.max_length // self.chunk_size
        self.key = zeros(0, self.num_kv_heads, self.head_dim)
        self.value = torch.zeros_like(self.key)
        self.chunk_embedding = zeros(chunks, *heads, dtype=self.embedding_dtype)
        self.open_sum = zeros(*heads, dtype=wide)
        self.carry = zeros(self.carry_rows, self.carry_dim)
        self._length = 0
        self._homes: list[Home] = []  # of every chunk begun
        self._counts = [0] * self.ranks
        # The same for the device: the place of each chunk that stands here, else -1. One entry for a
        # chunk that max_length cuts short, and one that stays -1, where index -1 reads.
        self._place = torch.full((chunks + 2,), -1, dtype=torch.long, device=self.device)

    # --- Reading ---------------------------------------------------------------------------------

    @property
    def lengths(self) -> Tensor:
        """int32 [B], tokens in the cache."""
        return torch.full((self.batch,), self._length, dtype=torch.int32, device=self.device)

    @property
    def nbytes(self) -> int:
        """Bytes of this rank's buffers."""
        names = ("key", "value", "chunk_embedding", "open_sum", "carry")
        return sum(getattr(self, name).nbytes for name in names)

    def get_seq_length(self) -> int:
        """Tokens of the whole, without asking the device."""
        return self._length

    def carried(self) -> Tensor:
        """As `ChunkCache.carried`: [B, carry_rows, carry_dim], oldest first, the same on every rank."""
        return self.carry

    # --- Appending -------------------------------------------------------------------------------

    def prefill(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        query_embedding: Tensor,
        context_embedding: Tensor,
        *,
        top_k: int,
        layout: Layout | None = None,
        score_scale: Tensor | None = None,
        sink: Tensor | None = None,
        scale: float | None = None,
        carry: Tensor | None = None,
        inclusive: bool = False,
        return_aux: bool = False,
    ) -> Tensor | tuple[Tensor, DistributedAux]:
        """Fill the empty cache from a sharded prompt: each rank gives its own tokens.

        Args:
            layout: which rank holds what, of one sequence; default as in `retrieve_attend`.
            The others: as in `ChunkCache.prefill`, T being the tokens of this rank.

        Returns:
            out [B, T, H, D] of this rank's tokens, or (out, DistributedAux).
        """
        method = "ShardedChunkCache.prefill"
        piece = self._piece(query, key, value, query_embedding, context_embedding, carry)
        shared = {"top_k": top_k, "score_scale": score_scale, "sink": sink, "scale": scale}
        lengths = self._agree(method, piece, shared, inclusive, layout)
        if layout is None:
            layout = Layout.of_lengths(lengths, self.chunk_size)
        require(self._length == 0, method, "cache", "an empty one", f"{self._length} tokens")
        sequences = len(layout.borders) - 1
        require(sequences == 1, method, "layout", "one of one sequence", sequences)
        self._check_room(method, layout.length + int(inclusive and layout.length > 0))
        with torch.no_grad():
            out, aux = retrieve_attend(
                *piece[:5],
                chunk_size=self.chunk_size,
                mesh=self.mesh,
                layout=layout,
                inclusive=inclusive,
                return_aux=True,
                **shared,
            )
            rows = Rows(layout, self.rank, self.group)
            tail = rows.last(piece.context_embedding, layout.length % self.chunk_size)
            last = rows.last(carry, self.carry_rows) if self.carry_rows else self.carry[:, :0]
            self._take_over(layout, piece, aux.chunk_embedding, tail, last)
        return (out, aux) if return_aux else out

    def _take_over(self, layout: Layout, piece: Piece, chunks: Tensor, tail: Tensor, last: Tensor):
        size, homes = self.chunk_size, {}
        for rank, own in enumerate(layout.pieces):
            for part in own:
                stop = -(-part.end // size) if part.length else 0
                for chunk in range(part.start // size, stop):
                    homes[chunk] = Home(rank, self._counts[rank])
                    self._counts[rank] += 1
        self._homes = [homes[chunk] for chunk in range(len(homes))]
        mine = [(c, home.place) for c, home in enumerate(self._homes) if home.rank == self.rank]
        if mine:
            chunk, place = torch.tensor(mine, device=self.device).unbind(1)
            self._place[chunk] = place
        # New chunks go where the fewest are, and a step reads up to S rows beyond the last.
        evenly = -(-self.max_length // (size * self.ranks))
        tokens = (max(self._counts[self.rank], evenly) + 1) * size
        count = piece.key.shape[1]
        for name in ("key", "value"):
            own = getattr(self, name).new_zeros(
                self.batch, tokens, self.num_kv_heads, self.head_dim
            )
            own[:, :count] = getattr(piece, name)
            setattr(self, name, own)
        self.chunk_embedding[:, : layout.chunks] = chunks
        begin = layout.length - tail.shape[1]
        self.open_sum = fold(tail, begin, size, self.open_sum, self.chunk_embedding)
        self._keep_carry(last)
        self._length = layout.length

    def step(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        query_embedding: Tensor,
        context_embedding: Tensor,
        *,
        top_k: int,
        score_scale: Tensor | None = None,
        sink: Tensor | None = None,
        scale: float | None = None,
        carry: Tensor | None = None,
        inclusive: bool = False,
        return_aux: bool = False,
    ) -> Tensor | tuple[Tensor, RetrieveAttendAux]:
        """Append T tokens, one or more, that every rank has: the same tensors on all of them.

        Arguments as in `ChunkCache.step`. Each chunk_size tokens cost two collectives: a few numbers
        that show that all ranks agree, and one row of output and log-sum-exp per token and head.

        Returns:
            out [B, T, H, D], or (out, RetrieveAttendAux), the same on every rank.
        """
        method = "ShardedChunkCache.step"
        piece = self._piece(query, key, value, query_embedding, context_embedding, carry)
        shared = {"top_k": top_k, "score_scale": score_scale, "sink": sink, "scale": scale}
        lengths = self._agree(method, piece, shared, inclusive, None)
        expected = "as many tokens on every rank"
        require(len(set(lengths)) == 1, method, "query", expected, lengths)
        total = self._length + query.shape[1]
        self._check_room(method, total + int(inclusive and query.shape[1] > 0))
        with torch.no_grad():
            found = [
                self._step(part, inclusive, **shared) for part in _in_parts(piece, self.chunk_size)
            ]
        out, *aux = (torch.cat(parts, dim=1) for parts in zip(*found, strict=True))
        return (out, RetrieveAttendAux(*aux)) if return_aux else out

    def _step(self, piece: Piece, inclusive: bool, top_k, score_scale, sink, scale):
        """At most S tokens."""
        start, count, size = self._length, piece.query.shape[1], self.chunk_size
        self._append(piece, start)
        length = self._length + int(inclusive)
        chunks = self.chunk_embedding[:, : length // size]
        settings = {"chunk_size": size, "top_k": top_k, "context_length": length}
        indices, scores = retrieve(piece.query_embedding, chunks, **settings)
        bias = None
        if score_scale is not None:
            bias = score_scale.unsqueeze(-1) * scores.masked_fill(indices < 0, 0.0)
        # As many rows behind the last chunk as there are queries: then all chunks are past.
        rows = self._counts[self.rank] * size + count
        key, value = self.key[:, :rows], self.value[:, :rows]
        slots = self._place[indices.long()].int()
        settings = {"chunk_size": size, "bias": bias, "scale": scale, "return_lse": True}
        out, lse = attend(piece.query, key, value, slots, **settings)
        out, lse = self._merged(out, lse)
        if sink is not None:
            out, lse = merge((out, lse), (torch.zeros_like(out), sink.expand_as(lse)))
        return out.to(piece.query.dtype), lse, indices, scores

    def _append(self, piece: Piece, start: int) -> None:
        size, end = self.chunk_size, start + piece.key.shape[1]
        for chunk in range(len(self._homes), -(-end // size)):
            rank = self._counts.index(min(self._counts))
            self._homes.append(Home(rank, self._counts[rank]))
            if rank == self.rank:
                self._place[chunk] = self._counts[rank]
            self._counts[rank] += 1
        self._reserve((self._counts[self.rank] + 1) * size)
        at = start
        while at < end:
            chunk, stop = at // size, min((at // size + 1) * size, end)
            rank, place = self._homes[chunk]
            if rank == self.rank:
                row = place * size + at % size
                part = slice(at - start, stop - start)
                self.key[:, row : row + stop - at] = piece.key[:, part]
                self.value[:, row : row + stop - at] = piece.value[:, part]
            at = stop
        context = piece.context_embedding
        self.open_sum = fold(context, start, size, self.open_sum, self.chunk_embedding)
        if self.carry_rows:
            self._keep_carry(piece.carry)
        self._length = end

    def _reserve(self, tokens: int) -> None:
        """Room for so many rows; without a prefill it doubles."""
        if tokens <= self.key.shape[1]:
            return
        more = max(tokens, 2 * self.key.shape[1]) - self.key.shape[1]
        pad = torch.nn.functional.pad
        self.key, self.value = (pad(t, (0, 0, 0, 0, 0, more)) for t in (self.key, self.value))

    def _keep_carry(self, rows: Tensor) -> None:
        if self.carry_rows:
            self.carry = torch.cat([self.carry, rows], dim=1)[:, -self.carry_rows :].clone()

    def _merged(self, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        """The partial results of all ranks as one. Each rank sends its own, as bytes in one message."""
        parts = [t.contiguous().view(torch.uint8).flatten() for t in (out, lse)]
        own = torch.cat(parts)
        total = None
        for row in all_gather(own, self.group):
            of_out, of_lse = row.split([part.numel() for part in parts])
            o = of_out.clone().view(out.dtype).view_as(out).to(lse.dtype)
            n = of_lse.clone().view(lse.dtype).view_as(lse)
            total = (o, n) if total is None else merge(total, (o, n))
        return total

    # --- Moving ----------------------------------------------------------------------------------

    def reorder(self, beam_idx: Tensor) -> None:
        """Sequence b becomes what sequence beam_idx[b] was, int [B], the same on every rank."""
        for name in ("key", "value", "chunk_embedding", "open_sum", "carry"):
            setattr(self, name, getattr(self, name).index_select(0, beam_idx))

    # --- Checks ----------------------------------------------------------------------------------

    def _piece(self, query, key, value, query_embedding, context_embedding, carry) -> Piece:
        embeddings = _with_heads(query_embedding), _with_heads(context_embedding)
        return Piece(query, key, value, *embeddings, carry)

    def _check_room(self, method: str, wanted: int) -> None:
        expected = f"at most max_length = {self.max_length} tokens"
        require(wanted <= self.max_length, method, "query", expected, wanted)

    def _agree(self, method: str, piece: Piece, shared: dict, inclusive: bool, layout) -> list[int]:
        own, error = None, ""
        score_scale, sink = shared["score_scale"], shared["sink"]
        try:
            check_device(piece.query, "query", self.mesh)
            refuse_gradients(method, *piece, score_scale, sink)
            checked = (shared["top_k"], score_scale, sink, shared["scale"])
            check_piece(self, method, piece, *checked)
            check_carry(self, method, piece.carry, piece.query.shape[1])
            settings = (self.batch, self.max_length, self.num_kv_heads, self.head_dim)
            settings += (self.retrieval_heads, self.retrieval_dim, self.chunk_size, self.carry_rows)
            values = (
                piece.query.shape[2],
                shared["top_k"],
                number_of(piece.query, "query"),
                int(score_scale is not None),
                int(sink is not None),
                int(inclusive),
                checksum(settings),
                self._length,
                checksum(None if layout is None else (layout.pieces, layout.borders)),
            )
            own = dict(zip(NAMES, values, strict=True))
        except (ValueError, RuntimeError) as problem:
            error = str(problem)
        tokens = piece.query.shape[1] if piece.query.dim() == 4 else 0
        return agree(own, error, tokens, self.mesh, self.group, NAMES)


def _in_parts(piece: Piece, most: int) -> list[Piece]:
    """Of at most so many tokens; one part if there are none."""
    starts = range(0, max(1, piece.query.shape[1]), most)
    return [
        Piece(*(None if t is None else t[:, start : start + most] for t in piece))
        for start in starts
    ]
