"""The two-level search against the exact one: what it finds and how long it takes, every token a query.

    python -m benchmarks.kernels.two_level --out benchmarks/results/two-level-cpu
    python -m benchmarks.kernels.two_level --decode --out benchmarks/results/two-level-decode-cpu

random       independent normal embeddings: no chunk says anything about its neighbours
skewed       one embedding per word of 50,000, words drawn by Zipf's law: repeated text in random order
correlated   a direction that turns slowly, in passages of 4,096 tokens; half of the passages return to an
             earlier place of the text. Key and query are that direction, each with noise of its own of half
             its size.
             correlated-N: N tokens until the direction's correlation with itself has fallen to 1 / e

recall       share of the exact search's chunks that were found, over all rows (resona_ext.search_recall)
speedup      time of the exact search / time of two_level, from chunk embeddings to indices and scores
--decode     steps of one token in a full cache instead: two_level_decode.py
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from resona_ext import RetrieveResult, pool_chunks, retrieve
from resona_ext.ops import resona
from resona_ext.recall import shares_found

from . import two_level_decode
from .record import Record, header

WORDS = 50_000
PASSAGE = 4096
NOISE = 0.5
DECODE_TOKENS = "65536,262144,1048576"


def random(tokens: int, dim: int) -> tuple[Tensor, Tensor]:
    return torch.randn(tokens, dim), torch.randn(tokens, dim)


def skewed(tokens: int, dim: int) -> tuple[Tensor, Tensor]:
    words = torch.multinomial(1.0 / torch.arange(1, WORDS + 1), tokens, replacement=True)
    rows = torch.randn(WORDS, dim)[words]
    return rows, rows


def correlated(tokens: int, dim: int, length: int) -> tuple[Tensor, Tensor]:
    passages = math.ceil(tokens / PASSAGE)
    decay = math.exp(-1 / length)
    turning = torch.randn(PASSAGE, passages, dim) * math.sqrt(1 - decay * decay)
    turning[0] /= math.sqrt(1 - decay * decay)
    for t in range(1, PASSAGE):
        turning[t] += decay * turning[t - 1]
    text = turning.transpose(0, 1).flatten(0, 1).contiguous()
    for begin in range(PASSAGE, passages * PASSAGE, PASSAGE):
        if torch.rand(()) < 0.5:
            earlier = int(torch.randint(0, begin - PASSAGE + 1, ()))
            text[begin : begin + PASSAGE] = text[earlier : earlier + PASSAGE].clone()
    text = text[:tokens]
    noise = NOISE * torch.randn(2, tokens, dim)
    return text + noise[0], text + noise[1]


CONTENTS = {
    "random": random,
    "skewed": skewed,
    **{
        f"correlated-{n}": lambda tokens, dim, n=n: correlated(tokens, dim, n)
        for n in (64, 256, 1024)
    },
}


def _timed(clock, function) -> tuple[float, RetrieveResult]:
    begin = clock()
    result = function()
    return clock() - begin, result


def measure(kind: str, tokens: int, chunk_size: int, args: argparse.Namespace, clock) -> dict:
    torch.manual_seed(0)
    dtype = getattr(torch, args.dtype)
    query, context = (t.to(dtype)[None] for t in CONTENTS[kind](tokens, args.retrieval_dim))
    chunks = pool_chunks(context, chunk_size)
    settings = {"chunk_size": chunk_size, "top_k": args.top_k, "context_length": tokens}
    sizes = {"superchunk_size": args.superchunk_size, "probes": args.probes}

    def two_level() -> RetrieveResult:
        return retrieve(query, chunks, **settings, search="two_level", **sizes)

    retrieve(query[:, :64], chunks[:, : 64 // chunk_size], **(settings | {"context_length": 64}))
    exact_seconds, exact = _timed(clock, lambda: retrieve(query, chunks, **settings))
    seconds, found = min((_timed(clock, two_level) for _ in range(2)), key=lambda pair: pair[0])
    recall, complete = shares_found(exact, found)
    used = resona._plan_two_level(tokens, chunk_size, args.top_k, **sizes)
    return {
        "contents": kind,
        "tokens": tokens,
        "chunk_size": chunk_size,
        "top_k": args.top_k,
        "retrieval_dim": args.retrieval_dim,
        "dtype": args.dtype,
        "superchunk_size": used[0],
        "probes": used[1],
        "recall": round(recall, 4),
        "rows_complete": round(complete, 4),
        "exact_seconds": round(exact_seconds, 3),
        "two_level_seconds": round(seconds, 3),
        "speedup": round(exact_seconds / seconds, 2),
    }


def rows(args: argparse.Namespace, clock) -> Iterator[dict]:
    for tokens, chunk_size in itertools.product(args.tokens, args.chunk_sizes):
        where = f"{tokens}/S{chunk_size}/{args.dtype}"
        if args.decode:
            yield {**two_level_decode.measure(tokens, chunk_size, args, clock), "id": where}
            continue
        for kind in args.contents.split(","):
            yield {**measure(kind, tokens, chunk_size, args, clock), "id": f"{kind}/{where}"}


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


_numbers.__name__ = "numbers with commas"  # argparse prints it


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels.two_level",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--tokens", type=_numbers, help=f"with commas (default: 262144; --decode: {DECODE_TOKENS})")
    add("--chunk-sizes", type=_numbers, default="2,16", help="S (default: %(default)s)")
    add("--decode", action="store_true", help="time steps of one token")
    add("--contents", default=",".join(CONTENTS), help="default: %(default)s")
    add("--top-k", type=int, default=8)
    add("--retrieval-dim", type=int, default=128)
    add("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    add("--superchunk-size", type=int, help="default: the plan's")
    add("--probes", type=int, help="default: the plan's")
    add("--threads", type=int)
    add("--processor-time", action="store_true", help="in place of wall time; needs --threads 1")
    add("--out", type=Path, required=True, metavar="PREFIX", help="of the .json and .csv")
    args = parser.parse_args(argv)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if args.processor_time and args.threads != 1:
        parser.error("--processor-time: expected --threads 1")
    unknown = set(args.contents.split(",")) - set(CONTENTS)
    if unknown:
        parser.error(f"--contents: expected of {', '.join(CONTENTS)}, got {', '.join(unknown)}")
    if args.tokens is None:
        args.tokens = _numbers(DECODE_TOKENS) if args.decode else [262144]
    clock = time.process_time if args.processor_time else time.perf_counter
    result = Record(header([], "cpu"))
    result.header["command"] = "python -m benchmarks.kernels.two_level " + shlex.join(argv)
    common = {
        "instruction_set": json.loads(resona._build_info())["cpu_isa"],
        "method": "processor" if args.processor_time else "wall",
    }
    for row in rows(args, clock):
        result.add(row | common)
        recall = f"recall {row['recall']:.4f}  " if "recall" in row else ""
        print(f"{row['id']:36} {recall}{row['speedup']:6.2f} x", flush=True)
        result.write(args.out)
    result.complete = True
    result.write(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
