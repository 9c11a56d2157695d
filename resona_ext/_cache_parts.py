"""Parts of the decode cache: pieces of a ragged batch, how they are appended, what a crop may keep."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, NoReturn

import torch
from torch import Tensor

from ._cache_checks import complain, require
from ._cache_superchunks import fold
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


class Settings(NamedTuple):
    """What a call says of its search and attention."""

    top_k: int
    score_scale: Tensor | None
    sink: Tensor | None
    scale: float | None
    probes: int | None
    inclusive: bool


def append_and_attend(
    cache: ChunkCache, runs: list[Run], piece: Piece, settings: Settings
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Append everything but the lengths; out, lse, indices and scores of all rows of the piece.

    Until the lengths change, nothing that is written can be seen; the sums are written last.
    """
    results = _unused_results(cache, piece, settings.top_k)
    sums, upper = cache.open_sum.clone(), cache.superchunks
    upper_sums = None if upper is None else upper.sum.clone()
    for run in runs:
        own = piece.of(run)
        sums[run.rows] = _append_tokens(cache, run, own)
        if upper is not None:
            first, last = run.start // cache.chunk_size, run.end // cache.chunk_size
            closed = cache.chunk_embedding[run.rows, first:last]
            upper_sums[run.rows] = upper.append(run.rows, closed, first)
        found = _search_and_attend(cache, run, own, settings)
        for result, part in zip(results, found, strict=True):
            result[run.rows, run.first : run.first + run.count] = part
    for run in runs:
        _keep_history(cache, run, piece.of(run))
    cache.open_sum.copy_(sums)
    if upper is not None:
        upper.sum.copy_(upper_sums)
    return results


def _unused_results(
    cache: ChunkCache, piece: Piece, top_k: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As they are at padding."""
    query, shape = piece.query, piece.query.shape
    slots = (*shape[:2], cache.retrieval_heads, top_k)
    wide = torch.float64 if cache.dtype == torch.float64 else torch.float32
    return (
        torch.zeros_like(query, memory_format=torch.contiguous_format),
        query.new_full(shape[:3], -torch.inf, dtype=wide),
        query.new_full(slots, -1, dtype=torch.int32),
        query.new_full(slots, -torch.inf, dtype=cache.open_sum.dtype),
    )


def _append_tokens(cache: ChunkCache, run: Run, piece: Piece) -> Tensor:
    """Write keys, values and the chunks that close; returns the sum of the chunk left open."""
    cache.key[run.rows, run.start : run.end] = piece.key
    cache.value[run.rows, run.start : run.end] = piece.value
    sums, chunks = cache.open_sum[run.rows], cache.chunk_embedding[run.rows]
    return fold(piece.context_embedding, run.start, cache.chunk_size, sums, chunks)


def _search_and_attend(
    cache: ChunkCache, run: Run, piece: Piece, settings: Settings
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out, lse, indices and scores of tokens that have been appended."""
    # Queries are aligned at the end of the context, so one token more moves each on by one.
    size, length = cache.chunk_size, run.end + int(settings.inclusive)
    chunks = cache.chunk_embedding[run.rows, : length // size]
    where = (piece.query_embedding, chunks, size, settings.top_k, length)
    if cache.superchunks is None:
        indices, scores = resona.retrieve(*where)
    else:
        sizes = {"superchunk_size": cache.superchunks.size, "probes": settings.probes}
        indices, scores = resona.retrieve_two_level(*where, **sizes)
    bias = None
    if settings.score_scale is not None:
        used = scores.masked_fill(indices < 0, 0.0).to(settings.score_scale.dtype)
        bias = settings.score_scale.unsqueeze(-1) * used
    key, value = cache.key[run.rows, :length], cache.value[run.rows, :length]
    selected = (indices, size, bias, settings.sink)
    out, lse = resona.attend(piece.query, key, value, *selected, scale=settings.scale)
    return out, lse, indices, scores


def _keep_history(cache: ChunkCache, run: Run, piece: Piece) -> None:
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


def _crop_targets(cache: ChunkCache, length: int | Sequence[int]) -> dict[int, Target]:
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


def crop_to(cache: ChunkCache, length: int | Sequence[int]) -> None:
    """Everything of `ChunkCache.crop` but the count on the host."""
    targets = _crop_targets(cache, length)
    size, before = cache.chunk_size, cache.lengths.tolist()
    sums, fewer_chunks = cache.open_sum.clone(), {}
    for b, target in targets.items():
        chunks = target.length // size
        if chunks < before[b] // size:
            fewer_chunks[b] = chunks
        sums[b] = 0
        for token in range(chunks * size, target.length):
            sums[b] += cache.history[b, token % cache.history_rows]
    cache.open_sum.copy_(sums)
    if cache.superchunks is not None:
        cache.superchunks.restore_sums(cache.chunk_embedding, fewer_chunks)
    for b, target in targets.items():
        cache.lengths[b] = target.length
        cache.history_start[b] = target.history_start


def _refuse_crop(
    method: str, cache: ChunkCache, b: int, keep: int, tokens: int, oldest: int
) -> NoReturn:
    size = cache.chunk_size
    least = min(tokens, max(-(-oldest // size) * size, oldest + cache.carry_rows))
    border = "" if cache.carry_rows else f"a multiple of chunk_size = {size}, or "
    expected = f"{border}at least {least}, where the history of sequence {b} still reaches"
    complain(method, "length", expected, keep)
