"""Bytes and operations of each stage by formula, and the least time that follows. Pure functions.

Counts are exact where a closed sum exists: query i at position p selects min(k, p // S) chunks, so the
early rows of a causal problem count for less. A *pair-row* is one (query, query head, selected chunk).

Three numbers per stage:
    flops       multiplications and additions of the matrix products
    compulsory  bytes if every tensor were read or written once, from main memory
    cached      bytes through the cache that the processors share (a GPU's L2), for the better of
                two loop orders: key/value-stationary, where each pair-row reads its query and
                writes and reads back a partial result, or query-stationary, where each query
                reads all its chunks

The floor adds up, stage by stage, the largest of the three at the speed measured on the machine. No
launch, no softmax, no imbalance is in it: nothing can be faster, and nothing will quite reach it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .shapes import Shape

INDEX_BYTES = 8  # index and score of one slot
PAIR_ROW_BYTES = 8  # log-sum-exp written and read back
SEARCH_ROWS = 128  # queries that share one pass over the chunks


@dataclass(frozen=True)
class Work:
    flops: float = 0.0
    compulsory: float = 0.0  # bytes
    cached: float = 0.0  # bytes

    def __add__(self, other: Work) -> Work:
        return Work(
            self.flops + other.flops,
            self.compulsory + other.compulsory,
            self.cached + other.cached,
        )


@dataclass(frozen=True)
class Speeds:
    """Ceilings of a machine. cache None: the shared cache is no limit of its own, as on a CPU, whose
    kernels keep partial results in the core's private cache."""

    copy: float  # bytes/s, read plus written
    matmul: float  # FLOP/s in the dtype at hand
    cache: float | None = None  # bytes/s of random rows out of the shared cache


def floor_seconds(stages: Iterable[Work], speeds: Speeds) -> float:
    def stage(work: Work) -> float:
        cached = work.cached / speeds.cache if speeds.cache else 0.0
        return max(work.flops / speeds.matmul, work.compulsory / speeds.copy, cached)

    return sum(map(stage, stages))


def eligible_chunks(shape: Shape) -> int:
    """Sum over the queries of one sequence of the chunks that lie wholly before them."""
    return _whole_chunks(shape.length, shape.chunk_size) - _whole_chunks(
        shape.length - shape.rows, shape.chunk_size
    )


def selected_chunks(shape: Shape) -> int:
    """Sum over the queries of one sequence of the chunks that they select, at most k each."""
    limit = shape.top_k * shape.chunk_size  # from this position on all k slots are used
    first = shape.length - shape.rows
    full = max(0, shape.length - max(first, limit))
    short_end, short_begin = min(shape.length, limit), min(first, limit)
    short = _whole_chunks(short_end, shape.chunk_size) - _whole_chunks(
        short_begin, shape.chunk_size
    )
    return full * shape.top_k + short


def _whole_chunks(positions: int, chunk_size: int) -> int:
    """Sum of p // chunk_size over p < positions."""
    whole, rest = divmod(positions, chunk_size)
    return chunk_size * whole * (whole - 1) // 2 + rest * whole


def pair_rows(shape: Shape) -> int:
    return shape.batch * shape.heads * selected_chunks(shape)


def pool(shape: Shape, itemsize: int) -> Work:
    width = shape.batch * shape.retrieval_heads * shape.retrieval_dim
    tokens = (shape.length + shape.length // shape.chunk_size) * width * itemsize
    return Work(shape.length * width, tokens, tokens)


def search(shape: Shape, itemsize: int) -> Work:
    heads = shape.batch * shape.retrieval_heads
    scores = heads * eligible_chunks(shape)
    vectors = (shape.rows + shape.length // shape.chunk_size) * heads
    found = heads * shape.rows * shape.top_k * INDEX_BYTES
    return Work(
        flops=2 * scores * shape.retrieval_dim,
        compulsory=vectors * shape.retrieval_dim * itemsize + found,
        cached=scores / min(SEARCH_ROWS, max(1, shape.rows)) * shape.retrieval_dim * itemsize,
    )


def attend(shape: Shape, itemsize: int) -> Work:
    s, e = shape, itemsize
    rows = pair_rows(s)
    queries = s.batch * s.rows * s.heads * s.head_dim * e
    context = s.batch * s.kv_heads * s.head_dim * e * _tokens_read(s)
    indices = s.batch * s.retrieval_heads * s.rows * s.top_k * INDEX_BYTES
    if s.top_k == 1:  # the partial result is the result
        stationary_keys = 2 * rows * s.head_dim * e + 2 * context
    else:
        stationary_keys = 3 * rows * s.head_dim * e + 4 * context + queries + rows * PAIR_ROW_BYTES
    per_group = rows * s.kv_heads / s.heads
    stationary_queries = 2 * per_group * s.chunk_size * s.head_dim * e + 2 * queries
    return Work(
        flops=4 * rows * s.chunk_size * s.head_dim,
        compulsory=2 * queries + 2 * context + indices,
        cached=min(stationary_keys, stationary_queries),
    )


def attend_backward(shape: Shape, itemsize: int) -> Work:
    s, e = shape, itemsize
    rows = pair_rows(s)
    queries = s.batch * s.rows * s.heads * s.head_dim * e
    context = s.batch * s.kv_heads * s.head_dim * e * _tokens_read(s)
    return Work(
        flops=10 * rows * s.chunk_size * s.head_dim,
        compulsory=4 * queries + 4 * context,
        cached=4 * rows * s.head_dim * e + 4 * queries + 8 * context,
    )


def dense(shape: Shape, itemsize: int) -> Work:
    """Causal attention to the whole past, the query's own token included."""
    s = shape
    first = s.length - s.rows
    pairs = s.batch * s.heads * (s.length * (s.length + 1) - first * (first + 1)) // 2
    tensors = 2 * s.batch * itemsize * s.head_dim * (s.rows * s.heads + s.length * s.kv_heads)
    return Work(4 * pairs * s.head_dim, tensors, tensors)


def dense_backward(shape: Shape, itemsize: int) -> Work:
    forward = dense(shape, itemsize)
    return Work(2.5 * forward.flops, 2 * forward.compulsory, 2 * forward.cached)


def _tokens_read(shape: Shape) -> int:
    """Context tokens that can be read at all: few queries select few chunks."""
    return min(shape.length, selected_chunks(shape) * shape.chunk_size)
