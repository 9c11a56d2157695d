"""Parts of the decode cache: pieces of a ragged batch, the sums of open chunks, what a crop may keep."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, NoReturn

import torch
from torch import Tensor

from ._cache_checks import complain, require
from .ops import resona

if TYPE_CHECKING:
    from .cache import ChunkCache


class Run(NamedTuple):
    """Neighbouring sequences that are equally long and get equally many tokens."""

    rows: slice  # of the batch
    start: int  # tokens in the cache before
    first: int  # where the new tokens begin in the piece
    count: int

    @property
    def end(self) -> int:
        return self.start + self.count


class Piece(NamedTuple):
    """What `prefill` gets with each token, [B, T, ...]."""

    query: Tensor
    key: Tensor
    value: Tensor
    query_embedding: Tensor
    context_embedding: Tensor
    carry: Tensor | None

    def of(self, run: Run) -> Piece:
        where = (run.rows, slice(run.first, run.first + run.count))
        return Piece(*(None if t is None else t[where] for t in self))


def spans_of(
    method: str,
    lengths: Tensor | Sequence[int] | None,
    attention_mask: Tensor | None,
    batch: int,
    rows: int,
) -> list[tuple[int, int]]:
    """(first, count) of the real tokens in each row of a batch."""
    if attention_mask is not None:
        require(lengths is None, method, "attention_mask", "None with lengths", "both")
        return _spans_of_mask(method, attention_mask, batch, rows)
    if lengths is None:
        return [(0, rows)] * batch
    is_tensor = isinstance(lengths, Tensor)
    counts = lengths.tolist() if is_tensor else list(lengths)
    valid = (not is_tensor or lengths.dim() == 1) and len(counts) == batch
    got = list(lengths.shape) if is_tensor else f"{len(counts)} numbers"
    require(valid, method, "lengths", f"shape [{batch}]", got)
    valid = all(isinstance(n, int) and 0 <= n <= rows for n in counts)
    require(valid, method, "lengths", f"ints from 0 to T = {rows}", counts)
    return [(0, count) for count in counts]


def _spans_of_mask(method: str, mask: Tensor, batch: int, rows: int) -> list[tuple[int, int]]:
    require(
        list(mask.shape) == [batch, rows], method, "attention_mask", [batch, rows], list(mask.shape)
    )
    # An additive float mask (0 at tokens) would be read upside down.
    expected = "bool or integer, 1 at tokens"
    is_float = mask.dtype.is_floating_point
    require(not is_float, method, "attention_mask", expected, mask.dtype)
    real = mask != 0
    count = real.sum(dim=1)
    first = (real.cumsum(dim=1) == 0).sum(dim=1)
    last = rows - (real.flip(1).cumsum(dim=1) == 0).sum(dim=1)
    whole = bool(((count == 0) | (last - first == count)).all())
    require(whole, method, "attention_mask", "no padding between tokens", "a hole")
    first = first.where(count > 0, 0)
    return list(zip(first.tolist(), count.tolist(), strict=True))


def runs_of(starts: list[int], spans: list[tuple[int, int]]) -> list[Run]:
    """Runs with something to do. A batch whose sequences are alike is one."""
    runs: list[Run] = []
    for b, (start, (first, count)) in enumerate(zip(starts, spans, strict=True)):
        if count == 0:
            continue
        if runs and runs[-1].rows.stop == b and runs[-1][1:] == (start, first, count):
            runs[-1] = runs[-1]._replace(rows=slice(runs[-1].rows.start, b + 1))
        else:
            runs.append(Run(slice(b, b + 1), start, first, count))
    return runs


def fold_tokens(
    context: Tensor, start: int, chunk_size: int, open_sum: Tensor, chunks: Tensor
) -> Tensor:
    """Pool tokens [start, start + T) into chunks, in the canonical order: token by token from zero.

    context [B, T, R, E], open_sum [B, R, E] of the tokens since the last border, chunks
    [B, C, R, E], of which the rows of chunks that close here are written. Returns the new open sum.
    """
    count = context.shape[1]
    head = min(-start % chunk_size, count)
    total = open_sum.clone()
    for t in range(head):
        total += context[:, t]
    chunk = start // chunk_size
    if head > 0 and (start + head) % chunk_size == 0:
        # A chunk of one token is that token at unit length, which is what is left to do.
        chunks[:, chunk] = resona.pool_chunks(total.unsqueeze(1), 1)[:, 0]
        total.zero_()
        chunk += 1
    whole = (count - head) // chunk_size
    tail = head + whole * chunk_size
    if whole > 0:
        chunks[:, chunk : chunk + whole] = resona.pool_chunks(context[:, head:tail], chunk_size)
    for t in range(tail, count):
        total += context[:, t]
    return total


def append_tokens(cache: ChunkCache, run: Run, piece: Piece) -> Tensor:
    """Write keys, values and the chunks that close; returns the sum of the chunk left open."""
    cache.key[run.rows, run.start : run.end] = piece.key
    cache.value[run.rows, run.start : run.end] = piece.value
    sums, chunks = cache.open_sum[run.rows], cache.chunk_embedding[run.rows]
    return fold_tokens(piece.context_embedding, run.start, cache.chunk_size, sums, chunks)


def search_and_attend(
    cache: ChunkCache,
    run: Run,
    piece: Piece,
    top_k: int,
    score_scale: Tensor | None,
    sink: Tensor | None,
    scale: float | None,
    inclusive: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out, lse, indices and scores of tokens that have been appended."""
    # Queries are aligned at the end of the context, so one token more moves each on by one.
    size, length = cache.chunk_size, run.end + int(inclusive)
    chunks = cache.chunk_embedding[run.rows, : length // size]
    indices, scores = resona.retrieve(piece.query_embedding, chunks, size, top_k, length)
    bias = None
    if score_scale is not None:
        used = scores.masked_fill(indices < 0, 0.0).to(score_scale.dtype)
        bias = score_scale.unsqueeze(-1) * used
    key, value = cache.key[run.rows, :length], cache.value[run.rows, :length]
    out, lse = resona.attend(piece.query, key, value, indices, size, bias, sink, scale=scale)
    return out, lse, indices, scores


def keep_history(cache: ChunkCache, run: Run, piece: Piece) -> None:
    """Write the last tokens into the rings that `crop` and the owner read."""
    count = min(run.count, cache.history_rows)
    if count == 0:
        return
    slot = torch.arange(run.end - count, run.end, device=cache.device) % cache.history_rows
    cache.history[run.rows, slot] = piece.context_embedding[:, -count:]
    if cache.carry_rows:
        cache.carry[run.rows, slot] = piece.carry[:, -count:]


class Target(NamedTuple):
    """What a sequence looks like after a crop."""

    length: int
    history_start: int


def crop_targets(cache: ChunkCache, length: int | Sequence[int]) -> dict[int, Target]:
    """The sequences that a crop shortens. Raises if one of them cannot be."""
    method = "ChunkCache.crop"
    wanted = [length] * cache.batch if isinstance(length, int) else list(length)
    valid = len(wanted) == cache.batch and all(type(n) is int for n in wanted)
    require(valid, method, "length", f"an int or {cache.batch} of them", length)
    targets = {}
    now = zip(wanted, cache.lengths.tolist(), cache.history_start.tolist(), strict=True)
    for b, (keep, tokens, floor) in enumerate(now):
        keep = max(0, tokens + keep) if keep < 0 else keep
        if keep >= tokens:
            continue
        oldest = max(floor, tokens - cache.history_rows)  # that the history still holds
        first = min(keep // cache.chunk_size * cache.chunk_size, max(0, keep - cache.carry_rows))
        at_border = keep % cache.chunk_size == 0 and (cache.carry_rows == 0 or keep == 0)
        if first < oldest and not at_border:
            _refuse_crop(method, cache, b, keep, tokens, oldest)
        targets[b] = Target(keep, min(keep, oldest))
    return targets


def _refuse_crop(
    method: str, cache: ChunkCache, b: int, keep: int, tokens: int, oldest: int
) -> NoReturn:
    size = cache.chunk_size
    least = min(tokens, max(-(-oldest // size) * size, oldest + cache.carry_rows))
    border = "" if cache.carry_rows else f"a multiple of chunk_size = {size}, or "
    expected = f"{border}at least {least}, where the history of sequence {b} still reaches"
    complain(method, "length", expected, keep)
