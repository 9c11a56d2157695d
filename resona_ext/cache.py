"""What one retrieval layer remembers while a model generates: `ChunkCache`.

Letters as in `functional.py`; M is `max_length`, the capacity in tokens, W the rows of history.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ._cache_checks import (
    check_carry,
    check_piece,
    check_room,
    check_settings,
    check_state,
    check_two_level,
    checked_index,
    checked_probes,
    refuse_gradients,
    require,
)
from ._cache_parts import Piece, Settings, append_and_attend, crop_to, runs_of, spans_of
from ._cache_superchunks import Superchunks
from .functional import RetrieveAttendAux, _sizes_of, _with_heads
from .ops import resona

FORMAT = 1  # of state_dict


class ChunkCache:
    """Keys, values and chunk embeddings of the tokens so far, for one layer and a batch of sequences.

    A full forward over L tokens equals `prefill` over any pieces of them and `step` for the rest: the
    same indices bit for bit, outputs to rounding. Sequences may differ in length. All buffers are
    allocated once and updated in place; their addresses never change (but see `batch_select_indices`).
    Nothing here has gradients.

    Args:
        batch: sequences, B.
        max_length: capacity in tokens per sequence, M.
        num_kv_heads: key/value heads Hkv.
        head_dim: D, 1 to 256.
        retrieval_heads: R, 1 or a divisor of Hkv.
        retrieval_dim: E.
        chunk_size: tokens per chunk, S.
        dtype: of queries, keys and values.
        device: of all buffers.
        history: the last W raw context embeddings are kept, so that `crop` can shorten a sequence by
            W - S tokens or more. Default min(2 S, M) + carry_rows. 0: crop to chunk borders only.
        embedding_dtype: of query and context embeddings. Default dtype.
        carry_rows, carry_dim: the owner may hand in a row of carry_dim numbers (of `dtype`) with each
            token and read the last carry_rows of them back: the tail of a short convolution.
        search, superchunk_size, probes: as in `retrieve`. Where superchunk_size is not given, max_length
            takes the place of L (and 8 that of top_k, if probes is not given either): give it where a
            full forward has to find the same. probes may also be given with each call.

    Attributes:
        key, value: [B, M, Hkv, D].
        chunk_embedding: [B, M // S, R, E], unit norm; rows of closed chunks count.
        open_sum: [B, R, E], sum of the chunk that is not yet closed; float32, or float64.
        history: [B, W, R, E]; token p stands in row p mod W.
        lengths: int32 [B], tokens in the cache.
        superchunks: of a two-level search, its size, embedding [B, M // S // P, R, E] and sum [B, R, E];
            None with the exact one.
        These are to be read; change them through the methods, which also keep count on the host.

    Raises:
        ValueError: from any method, an argument that does not fit, named in the message, or more than
            max_length tokens. The cache is then as it was.
    """

    _tokens = ("key", "value")
    _rows = ("open_sum", "history", "carry", "lengths", "history_start")
    _settings = ("batch", "num_kv_heads", "head_dim", "retrieval_heads", "retrieval_dim")
    _settings += ("chunk_size", "carry_rows", "carry_dim")

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
        history: int | None = None,
        *,
        embedding_dtype: torch.dtype | None = None,
        carry_rows: int = 0,
        carry_dim: int = 0,
        search: str = "exact",
        superchunk_size: int | None = None,
        probes: int | None = None,
    ) -> None:
        _sizes_of("ChunkCache", search, superchunk_size, probes)
        self.search, self.superchunk_size, self.probes = search, superchunk_size, probes
        self.batch = batch
        self.max_length = max_length
        self.num_kv_heads, self.head_dim = num_kv_heads, head_dim
        self.retrieval_heads, self.retrieval_dim = retrieval_heads, retrieval_dim
        self.chunk_size = chunk_size
        self.carry_rows, self.carry_dim = carry_rows, carry_dim
        self.dtype = dtype
        self.embedding_dtype = dtype if embedding_dtype is None else embedding_dtype
        self.history_rows = history
        if history is None:
            self.history_rows = min(2 * chunk_size, max_length) + carry_rows
        check_settings(self)
        check_two_level(self)
        self._longest = 0  # tokens of the longest sequence, as far as the host knows

        heads = (retrieval_heads, retrieval_dim)
        wide = torch.float64 if self.embedding_dtype == torch.float64 else torch.float32

        def zeros(*shape: int, dtype: torch.dtype = self.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.key = zeros(batch, max_length, num_kv_heads, head_dim)
        self.value = torch.zeros_like(self.key)
        chunks = max_length // chunk_size
        self.chunk_embedding = zeros(batch, chunks, *heads, dtype=self.embedding_dtype)
        self.open_sum = zeros(batch, *heads, dtype=wide)
        self.history = zeros(batch, self.history_rows, *heads, dtype=self.embedding_dtype)
        self.carry = zeros(batch, self.history_rows if carry_rows else 0, carry_dim)
        self.lengths = zeros(batch, dtype=torch.int32)
        # What lies before was overwritten by tokens that a crop has removed.
        self.history_start = zeros(batch, dtype=torch.int32)
        self._sequence = torch.arange(batch, device=device)
        self.superchunks = None
        if search == "two_level":
            if superchunk_size is None:
                sizes = (None, probes)
                self.superchunk_size = resona._plan_two_level(max_length, chunk_size, 1, *sizes)[0]
            buffers = (self.chunk_embedding, self.open_sum)
            self.superchunks = Superchunks(self.superchunk_size, *buffers)

    # --- Reading ---------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        return self.lengths.device

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        names = (*self._tokens, "chunk_embedding", *self._rows)
        upper = 0 if self.superchunks is None else self.superchunks.nbytes
        return sum(getattr(self, name).nbytes for name in names) + upper

    def get_seq_length(self) -> int:
        """Tokens of the longest sequence, without asking the device.

        On CUDA it is an upper bound after `reorder` and `batch_select_indices`.
        """
        return self._longest

    def carried(self) -> Tensor:
        """The rows handed in with the last carry_rows tokens, oldest first: [B, carry_rows, carry_dim].

        Zeros stand in for tokens before the first.
        """
        back = torch.arange(-self.carry_rows, 0, device=self.device)
        position = self.lengths.unsqueeze(1) + back
        rows = self.carry[self._sequence.unsqueeze(1), position % max(self.history_rows, 1)]
        return rows.masked_fill((position < 0).unsqueeze(-1), 0)

    def check(self) -> None:
        """Raise if a step inside a replayed graph found a sequence full; count again. Waits for the device.

        Python does not run in a replay. There the kernel leaves a full sequence alone and turns its length n
        into -n - 1, until `reset`; and nobody counts tokens on the host, so call this before anything else.
        """
        lengths = self.lengths.tolist()
        self._longest = max((n if n >= 0 else -n - 1 for n in lengths), default=0)
        full = [b for b, n in enumerate(lengths) if n < 0]
        if full:
            raise RuntimeError(
                f"ChunkCache.check: expected at most max_length = {self.max_length} tokens per sequence, "
                f"got more in a replayed graph for sequences {full}"
            )

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
        score_scale: Tensor | None = None,
        sink: Tensor | None = None,
        scale: float | None = None,
        lengths: Tensor | Sequence[int] | None = None,
        attention_mask: Tensor | None = None,
        carry: Tensor | None = None,
        inclusive: bool = False,
        return_aux: bool = False,
        probes: int | None = None,
    ) -> Tensor | tuple[Tensor, RetrieveAttendAux]:
        """Append T tokens to each sequence, or fewer, and return their outputs.

        Reads lengths on the host, so it waits for the device and stays out of CUDA graphs.

        Args:
            query: [B, T, H, D].
            key, value: [B, T, Hkv, D].
            query_embedding, context_embedding: [B, T, R, E], or [B, T, E] if R is 1.
            top_k: chunks per query, k.
            score_scale: float32 [R] (float64 for float64 queries), as in `retrieve_attend`.
            sink: float32 [H] (likewise), one extra logit per head whose value is zero.
            scale: factor of <query, key>; default D ** -0.5.
            lengths: [B], real tokens at the start of each row; the rest is padding. Default T.
            attention_mask: [B, T], 1 at tokens and 0 at padding, which stands left or right of them.
                Instead of lengths.
            carry: [B, T, carry_dim], needed with carry_rows.
            inclusive: a token also sees the chunk that it closes. Takes one token of capacity more than
                there are tokens.
            return_aux: also return log-sum-exp, indices and scores.
            probes: of this call; default the cache's.

        Returns:
            out [B, T, H, D], or (out, RetrieveAttendAux). Rows at padding hold 0, -inf, -1 and -inf.
        """
        method = "ChunkCache.prefill"
        tensors = (query, key, value, query_embedding, context_embedding, carry, score_scale, sink)
        refuse_gradients(method, *tensors)
        embeddings = _with_heads(query_embedding), _with_heads(context_embedding)
        piece = Piece(query, key, value, *embeddings, carry)
        check_piece(self, method, piece, top_k, score_scale, sink, scale)
        probes = checked_probes(self, method, probes)
        rows = query.shape[1]
        spans = spans_of(method, lengths, attention_mask, self.batch, rows)
        self.check()
        starts = self.lengths.tolist()
        ends = [start + count for start, (_, count) in zip(starts, spans, strict=True)]
        longest = max(ends, default=0)
        check_room(self, method, longest + int(inclusive and rows > 0))

        runs = runs_of(starts, spans)
        settings = Settings(top_k, score_scale, sink, scale, probes, inclusive)
        with torch.no_grad():
            out, *aux = append_and_attend(self, runs, piece, settings)
            self.lengths.copy_(torch.tensor(ends, dtype=torch.int32))
        self._longest = longest
        return (out, RetrieveAttendAux(*aux)) if return_aux else out

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
        return_aux: bool = False,
        probes: int | None = None,
    ) -> Tensor | tuple[Tensor, RetrieveAttendAux]:
        """Append one token to each sequence and return its output: `torch.ops.resona.decode_step`, or
        `decode_step_two_level`.

        Asks nothing of the device. Arguments as in `prefill` with T = 1, in tensors of [B, 1, ...].

        Raises:
            ValueError: the longest sequence is full, or carry or probes do not fit.
            RuntimeError: from the operator; the message names the argument.
        """
        check_room(self, "ChunkCache.step", self._longest + 1)
        check_carry(self, "ChunkCache.step", carry, 1)
        probes = checked_probes(self, "ChunkCache.step", probes)
        slot = self.lengths % self.history_rows if self.carry_rows else None
        new = (query, key, value, _with_heads(query_embedding), _with_heads(context_embedding))
        state = (self.key, self.value, self.chunk_embedding, self.open_sum, self.history)
        state += (self.lengths,)
        sizes, extras = (self.chunk_size, top_k), (score_scale, sink)
        if self.superchunks is None:
            out, *aux = resona.decode_step(*new, *state, *sizes, *extras, scale=scale)
        else:
            state += (self.superchunks.embedding, self.superchunks.sum)
            sizes += (self.superchunks.size,)
            keywords = {"probes": probes, "scale": scale}
            out, *aux = resona.decode_step_two_level(*new, *state, *sizes, *extras, **keywords)
        if slot is not None:
            self.carry[self._sequence, slot] = carry.detach()[:, 0]
        self._longest += 1
        return (out, RetrieveAttendAux(*aux)) if return_aux else out

    # --- Forgetting and moving -------------------------------------------------------------------

    def reset(self) -> None:
        """Forget all tokens of all sequences."""
        for t in (self.lengths, self.open_sum, self.history_start):
            t.zero_()
        if self.superchunks is not None:
            self.superchunks.sum.zero_()
        self._longest = 0

    @torch.no_grad()
    def crop(self, length: int | Sequence[int]) -> None:
        """Shorten sequences, as after rejected speculative tokens. Waits for the device.

        Args:
            length: tokens to keep; a negative number removes so many from the end; a sequence that is
                no longer than that stays. One number, or one per sequence.

        Raises:
            ValueError: the chunk that the cut leaves open began before the history. Any length that is
                a multiple of chunk_size can be kept if there is no carry.
        """
        self.check()
        crop_to(self, length)
        self._longest = max(self.lengths.tolist(), default=0)

    def reorder(self, beam_idx: Tensor) -> None:
        """Sequence b becomes what sequence beam_idx[b] was: beam search. beam_idx is int [B]."""
        index = checked_index(self, "reorder", beam_idx)
        expected = f"shape [{self.batch}]"
        fits = len(index) == self.batch
        require(fits, "ChunkCache.reorder", "beam_idx", expected, list(beam_idx.shape))
        for _, used in self._used():
            used.copy_(used.index_select(0, index))
        if self.superchunks is not None:
            self.superchunks.select(index, in_place=True)
        self._count_again()

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences at indices, int [n], in that order. Allocates new buffers."""
        index = checked_index(self, "batch_select_indices", indices)
        for name in (*self._tokens, "chunk_embedding", *self._rows):
            setattr(self, name, getattr(self, name).index_select(0, index))
        if self.superchunks is not None:
            self.superchunks.select(index, in_place=False)
        self.batch = len(index)
        self._sequence = torch.arange(self.batch, device=self.device)
        self._count_again()

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each sequence `repeats` times, one after another. Allocates new buffers."""
        require(
            repeats >= 1, "ChunkCache.batch_repeat_interleave", "repeats", "at least 1", repeats
        )
        self.batch_select_indices(self._sequence.repeat_interleave(repeats))

    def _used(self, longest: int | None = None) -> Iterable[tuple[str, Tensor]]:
        """The part of every buffer that holds something, while the longest sequence has `longest` tokens."""
        longest = self._longest if longest is None else longest
        for name in self._tokens:
            yield name, getattr(self, name)[:, :longest]
        yield "chunk_embedding", self.chunk_embedding[:, : longest // self.chunk_size]
        for name in self._rows:
            yield name, getattr(self, name)

    def _count_again(self) -> None:
        if self.device.type == "cpu":
            self._longest = max(self.lengths.tolist(), default=0)

    # --- Saving ----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor | int]:
        """Tensors and ints, copies of what is in use, for torch.save; see `load_state_dict`.

        The same for every search: superchunks follow from the chunks.
        """
        settings = {name: getattr(self, name) for name in self._settings}
        used = {name: t.clone() for name, t in self._used()}
        return {"format": FORMAT, "longest": self._longest, **settings, **used}

    def load_state_dict(self, state: dict[str, Tensor | int]) -> None:
        """Take over what `state_dict` gave, also on another device, of another max_length or search.

        Raises:
            ValueError: the state is of another kind of cache, does not fit or is damaged. The cache is
                then as it was.
        """
        settings = {"format": FORMAT} | {name: getattr(self, name) for name in self._settings}
        check_state(self, state, settings)
        self._longest = state["longest"]
        for name, target in self._used():
            target.copy_(state[name])
        if self.superchunks is not None:
            counts = [n // self.chunk_size for n in self.lengths.tolist()]
            self.superchunks.restore(self.chunk_embedding, counts)

    def __repr__(self) -> str:
        names = ("batch", "max_length", *self._settings[1:6], "dtype", "embedding_dtype", "device")
        if self.superchunks is not None:
            names += ("search", "superchunk_size")
        return f"ChunkCache({', '.join(f'{name}={getattr(self, name)}' for name in names)})"
