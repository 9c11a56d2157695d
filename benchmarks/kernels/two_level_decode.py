"""One new token in a long cache: the step that searches all chunks against the one in two levels.

Every step has a query of its own, so that what it reads is not at hand from the step before, and both kinds
of step take turns. Only the search differs; its time does not depend on what the embeddings are like.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch
from torch import Tensor

from resona_ext import pool_chunks
from resona_ext.ops import resona

HEADS, KV_HEADS, HEAD_DIM = 8, 2, 64
STEPS = 31


class Cache:
    """One sequence of so many tokens, and a step from there that can be taken again and again."""

    def __init__(self, tokens: int, chunk_size: int, args: argparse.Namespace) -> None:
        dtype, dim = getattr(torch, args.dtype), args.retrieval_dim
        self.chunk_size, self.top_k, self.dim = chunk_size, args.top_k, dim
        self.length = tokens
        sizes = (tokens + 1, chunk_size, args.top_k, args.superchunk_size, args.probes)
        self.superchunk_size, self.probes = resona._plan_two_level(*sizes)
        rows = (1, tokens + 1, KV_HEADS, HEAD_DIM)
        chunks = torch.randn(1, (tokens + 1) // chunk_size, 1, dim)
        chunks = torch.nn.functional.normalize(chunks, dim=-1).to(dtype)
        self.state = [
            torch.zeros(rows, dtype=dtype),
            torch.zeros(rows, dtype=dtype),
            chunks,
            torch.zeros(1, 1, dim),
            torch.zeros(1, 2 * chunk_size, 1, dim, dtype=dtype),
            torch.zeros(1, dtype=torch.int32),
        ]
        self.superchunks = [pool_chunks(chunks, self.superchunk_size), torch.zeros(1, 1, dim)]
        self.new = [torch.randn(1, 1, n, HEAD_DIM).to(dtype) for n in (HEADS, KV_HEADS, KV_HEADS)]
        self.context = torch.randn(1, 1, 1, dim).to(dtype)

    def exact(self, query: Tensor) -> Tensor:
        new, sizes = (*self.new, query, self.context), (self.chunk_size, self.top_k)
        return resona.decode_step(*new, *self.state, *sizes)[2]

    def two_level(self, query: Tensor) -> Tensor:
        new = (*self.new, query, self.context)
        sizes = (self.chunk_size, self.top_k, self.superchunk_size)
        state = (*self.state, *self.superchunks)
        return resona.decode_step_two_level(*new, *state, *sizes, probes=self.probes)[2]

    def seconds(self, step: Callable[[Tensor], Tensor], query: Tensor, clock) -> float:
        self.state[-1].fill_(self.length)
        begin = clock()
        step(query)
        return clock() - begin


def measure(tokens: int, chunk_size: int, args: argparse.Namespace, clock) -> dict:
    torch.manual_seed(0)
    cache = Cache(tokens, chunk_size, args)
    queries = torch.randn(STEPS + 1, 1, 1, 1, args.retrieval_dim).to(cache.context.dtype)
    times: dict[str, list[float]] = {"exact": [], "two_level": []}
    for query in queries:
        for name, seconds in times.items():
            seconds.append(cache.seconds(getattr(cache, name), query, clock))
    # The first of each finds nothing in place.
    exact, two_level = (1e6 * statistics.median(seconds[1:]) for seconds in times.values())
    return {
        "tokens": tokens,
        "chunk_size": chunk_size,
        "top_k": args.top_k,
        "heads": HEADS,
        "kv_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "retrieval_dim": args.retrieval_dim,
        "dtype": args.dtype,
        "superchunk_size": cache.superchunk_size,
        "probes": cache.probes,
        "exact_microseconds": round(exact, 1),
        "two_level_microseconds": round(two_level, 1),
        "speedup": round(exact / two_level, 2),
        "steps": STEPS,
    }
