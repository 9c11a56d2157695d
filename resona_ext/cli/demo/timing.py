"""Time the operator against full causal attention (torch SDPA) on growing lengths.

Both run forward on random data, in the same process, in turns, each in its own natural layout.
They compute different things: SDPA reads all tokens of the past, the operator finds k chunks and
reads those. The ratio says what the search saves, not that one replaces the other.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

from ...functional import retrieve_attend

LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768, 65536)
QUICK_LENGTHS = (1024, 2048, 4096, 8192)


class Shape(NamedTuple):
    heads: int = 4
    head_dim: int = 64
    retrieval_dim: int = 64
    chunk_size: int = 64
    top_k: int = 8

    def __str__(self) -> str:
        sizes = (f"{name.replace('_', ' ')} {size}" for name, size in self._asdict().items())
        return "batch 1, " + ", ".join(sizes)


DEFAULT_SHAPE = Shape()


@dataclass
class Row:
    length: int
    dtype: str
    operator_seconds: float  # medians
    attention_seconds: float
    calls: int  # timed calls of each
    warmed: bool  # False: no untimed call at this length, only at shorter ones

    @property
    def ratio(self) -> float:
        return self.attention_seconds / self.operator_seconds


def measure(
    lengths: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    shape: Shape = DEFAULT_SHAPE,
    seconds_per_length: float = 3.0,
    untimed_limit: float = 5.0,
    max_calls: int = 15,
    seed: int = 0,
) -> Iterator[Row]:
    """One row per length, ascending, each within about `seconds_per_length` or one call of each."""
    attention = 0.0
    for index, length in enumerate(lengths):
        operator_call, attention_call = _calls(length, dtype, shape, seed)
        # Attention grows with the square: no untimed calls where one alone would take too long.
        expected = attention * (length / lengths[index - 1]) ** 2 if index else 0.0
        warmed = expected < untimed_limit
        if warmed:
            operator_call(), attention_call()
        operator_times, attention_times = [], []
        begin = time.perf_counter()
        while not operator_times or (
            len(operator_times) < max_calls and time.perf_counter() - begin < seconds_per_length
        ):
            operator_times.append(_seconds(operator_call))
            attention_times.append(_seconds(attention_call))
        attention = median(attention_times)
        yield Row(
            length,
            str(dtype).removeprefix("torch."),
            median(operator_times),
            attention,
            len(operator_times),
            warmed,
        )


def _calls(length: int, dtype: torch.dtype, shape: Shape, seed: int) -> tuple[Callable, Callable]:
    generator = torch.Generator().manual_seed(seed)

    def random(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator).to(dtype)

    query, key, value = (random(1, length, shape.heads, shape.head_dim) for _ in range(3))
    query_embedding, context_embedding = (random(1, length, 1, shape.retrieval_dim) for _ in "qc")
    heads_first = [x.transpose(1, 2).contiguous() for x in (query, key, value)]

    @torch.no_grad()
    def operator_call() -> Tensor:
        return retrieve_attend(
            query,
            key,
            value,
            query_embedding,
            context_embedding,
            chunk_size=shape.chunk_size,
            top_k=shape.top_k,
        )

    @torch.no_grad()
    def attention_call() -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=True)

    return operator_call, attention_call


def _seconds(call: Callable) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def header() -> str:
    return f"  {'dtype':<9}{'length':>8}{'Resona':>12}{'SDPA':>12}{'SDPA / Resona':>16}{'calls':>8}"


def line(row: Row) -> str:
    return (
        f"  {row.dtype:<9}{row.length:>8,}{_duration(row.operator_seconds):>12}"
        f"{_duration(row.attention_seconds):>12}{f'{row.ratio:.2f}x':>16}{row.calls:>8}"
        + ("" if row.warmed else " *")
    )


def _duration(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.2f} ms"
