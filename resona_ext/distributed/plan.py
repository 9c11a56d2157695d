"""Which exchange moves fewer bytes. Pure functions of counts; the counts come from the selection."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sizes:
    """Of one rank's problem. Letters as in resona_ext.functional; `itemsize` of query, key and value."""

    heads: int
    kv_heads: int
    retrieval_heads: int
    head_dim: int
    top_k: int
    chunk_size: int
    itemsize: int


@dataclass(frozen=True)
class ExchangePlan:
    exchange: str  # "chunks" or "queries"
    reason: str
    chunk_bytes: int  # what either would move, over all ranks, forward
    query_bytes: int


def bytes_of_chunk(s: Sizes) -> int:
    """Keys and values of one chunk for the key/value heads of one retrieval head."""
    return 2 * s.chunk_size * (s.kv_heads // s.retrieval_heads) * s.head_dim * s.itemsize


def bytes_of_query(s: Sizes) -> int:
    """There: query, chunk numbers, bias. Back: output and log-sum-exp."""
    rows = 2 * s.heads * s.head_dim * s.itemsize
    return rows + 4 * s.heads + s.retrieval_heads * s.top_k * (8 + 4)


def plan_exchange(
    sizes: Sizes, foreign_chunks: int, foreign_rows: int, wanted: str
) -> ExchangePlan:
    """`foreign_chunks`: distinct chunks of other ranks that each rank selected, added up. `foreign_rows`:
    pairs of a query and another rank that holds some of its chunks."""
    chunk_bytes = foreign_chunks * bytes_of_chunk(sizes)
    query_bytes = foreign_rows * bytes_of_query(sizes)
    if wanted != "auto":
        return ExchangePlan(wanted, "asked for", chunk_bytes, query_bytes)
    if chunk_bytes <= query_bytes:
        reason = "the distinct chunks that queries selected are fewer bytes than the queries"
        return ExchangePlan("chunks", reason, chunk_bytes, query_bytes)
    reason = "queries and their results are fewer bytes than the distinct chunks that they selected"
    return ExchangePlan("queries", reason, chunk_bytes, query_bytes)
