"""Counts, compares with the model, records and plots. Minutes on a CPU; says nothing about time."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

from resona_ext.distributed.plan import bytes_of_chunk, bytes_of_query

from ..kernels import record
from . import counting, model, plot
from .model import Problem

PATTERNS = ("random", "correlated")
SMALL = {"heads": 4, "kv_heads": 2, "head_dim": 32, "retrieval_dim": 32, "chunk_size": 16}
SMALL |= {"top_k": 8, "itemsize": 4}
RANKS = (1, 2, 4, 8, 16, 32, 64)


def calibrate(length: int) -> tuple[dict, dict]:
    """The model's two constants by pattern, and rows that compare counts with it."""
    constants, rows = {}, {}
    for pattern in PATTERNS:
        p = Problem(length, 16, retrieval_dim=64)
        chunk = counting.select(p, pattern)
        counts = {w: counting.needs(chunk, replace(p, ranks=w)) for w in RANKS[1:]}
        fitted = {
            "fresh": _fit(p, "fresh", counts[16]["chunks"], model.foreign_chunks),
            "spread": _fit(p, "spread", counts[16]["queries"], model.foreign_pairs),
        }
        constants[pattern] = {name: round(value, 4) for name, value in fitted.items()}
        for ranks, counted in counts.items():
            foreseen = replace(p, ranks=ranks, **constants[pattern])
            rows[f"needs/{pattern}/L{length}/W{ranks}"] = {
                "chunks": counted["chunks"],
                "chunks_by_model": round(model.foreign_chunks(foreseen)),
                "queries": counted["queries"],
                "queries_by_model": round(model.foreign_pairs(foreseen)),
            }
    return constants, rows


def _fit(p: Problem, name: str, counted: int, predict) -> float:
    """The constant in (0, 1] with which the model gives the count, by bisection; both grow together."""
    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (
            (middle, high) if predict(replace(p, **{name: middle})) < counted else (low, middle)
        )
    return high


def parity(length: int) -> dict:
    """Processes beside one process: results, and bytes as counted and by formula."""
    rows, cases = {}, [(pattern, name) for pattern in PATTERNS for name in ("chunks", "queries")]
    for ranks in (1, 2, 4):
        p = Problem(length, ranks, **SMALL)
        with tempfile.TemporaryDirectory() as folder:
            every = counting.run(p, cases, Path(folder))
        for (pattern, exchange), found in zip(cases, every, strict=True):
            name = f"parity/{pattern}/{exchange}/L{length}/W{ranks}"
            rows[name] = _compared(p, exchange, found)
    return rows


def _compared(p: Problem, exchange: str, found: tuple[dict, ...]) -> dict:
    of_one = {"chunks": bytes_of_chunk, "queries": bytes_of_query}[exchange](p.sizes)
    count = found[0]["planned"] // of_one
    moved = model.exchange_bytes(p, exchange, count)
    fixed = model.fixed_bytes(p)
    return {
        "indices_equal": all(r["indices_equal"] for r in found),
        "out_error": max(r["out"] for r in found),
        "gradient_error": max(r["gradients"] for r in found),
        "collectives": found[0]["calls"],
        "collectives_by_model": model.messages(p, exchange),
        "forward_bytes": sum(r["forward"] for r in found),
        "forward_bytes_by_model": fixed["agreement"] + fixed["embeddings"] + moved["forward"],
        "backward_bytes": sum(r["backward"] for r in found),
        "backward_bytes_by_model": moved["backward"],
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("build/benchmarks/scaling"))
    parser.add_argument(
        "--length", type=int, default=2**17, help="tokens whose selection is counted"
    )
    parser.add_argument("--parity-length", type=int, default=4133, help="tokens of the processes")
    arguments = parser.parse_args(argv)
    given = argv if argv is not None else sys.argv[1:]
    header = {
        **record.header(given, "cpu"),
        "command": f"python -m benchmarks.scaling {shlex.join(given)}",
    }
    constants, rows = calibrate(arguments.length)
    rows |= parity(arguments.parity_length)
    rows |= plot.table(constants)
    for name, row in rows.items():
        print(f"{name:44s}", *(f"{key} {_short(value)}" for key, value in row.items()))
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    result = {"schema": record.SCHEMA, "complete": True, "machine": header}
    result |= {"constants": constants, "rows": rows}
    arguments.output.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    plot.draw(constants, arguments.output.with_suffix(".png"))
    return 0


def _short(value) -> str:
    return f"{value:.4g}" if isinstance(value, (float, np.floating)) else str(value)


if __name__ == "__main__":
    sys.exit(main())
