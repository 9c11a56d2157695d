"""Sweep the numbers by which CUDA plans choose between kernels and size their grids.

    python -m benchmarks.kernels.tune                   all sweeps, into build/benchmarks/tune.json
    python -m benchmarks.kernels.tune item_rows         one of them

csrc/common/cuda_tuning.h says what each number means; it decides how fast a call is, never what it computes.
For each case all values take turns in one process, the default among them, after a check of the result of
each. The record is written after every case: stop when you like. A default is worth changing where another
value wins in all its cases, by more than the spread of both; the tool prints, you decide.

Not yet run on a GPU. On a CPU the numbers decide nothing: `--device cpu` only shows that the tool works.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from resona_ext.cli.errors import CliError

from . import record, shapes, timer
from .__main__ import DEVICE_LOST, gpu_obstacle
from .data import Case
from .operators import OPERATORS
from .table import duration

LONG = shapes.GPU
SMALL = replace(shapes.GPU, chunk_size=16, top_k=4)
PAIRS = replace(shapes.GPU, chunk_size=2, top_k=1)
GROUPED = shapes.GPU_GROUPED
NEVER = 1 << 40  # no chunk is so long: that path is not taken


@dataclass(frozen=True)
class Sweep:
    field: str
    values: tuple[int, ...]
    operator: str
    cases: tuple[shapes.Shape, ...]


def _at(shape: shapes.Shape, *lengths: int) -> tuple[shapes.Shape, ...]:
    return tuple(shape.with_length(length) for length in lengths)


# In the order of what a wrong default would cost most.
SWEEPS = (
    Sweep("dense_context", (0, 1024, 4096, 8192), "attend", _at(LONG, 1024, 2048, 4096, 8192)),
    Sweep("chunk_tokens", (8, NEVER), "attend", _at(LONG, 16384) + _at(SMALL, 16384)),
    Sweep("chunk_tokens", (8, 64, NEVER), "attend", _at(GROUPED, 16384, 65536)),
    Sweep("chunk_rows", (0, 16, 64), "attend", _at(SMALL, 16384, 65536)),
    Sweep("item_rows", (64, 128, 256, 512), "attend", _at(LONG, 16384, 65536)),
    Sweep("chunk_blocks", (1, 2, 3, 4, 8), "attend", _at(LONG, 16384, 65536)),
    Sweep("merge_blocks", (4, 8, 16, 32), "attend", _at(LONG, 65536) + _at(SMALL, 65536)),
    Sweep("query_blocks", (4, 8, 16, 32, 64), "attend", _at(PAIRS, 16384, 65536)),
    Sweep("search_splits", (1, 2, 4, 8, 16), "search", _at(LONG, 1024, 4096)),
    Sweep("search_finish", (1, 2, 4, 8), "search", _at(PAIRS, 1024, 4096)),
    Sweep("attended_keys", (0, 4), "fused", _at(PAIRS, 65536, 262144)),
    Sweep("attended_tiles", (0, 1, 2, 4), "fused", _at(PAIRS, 4096, 16384, 32768, 65536)),
    Sweep("pool_blocks", (8, 20, 40, 80), "pool", _at(LONG, 16384, 262144)),
    Sweep("index_blocks", (4, 8, 16), "attend", _at(PAIRS, 65536) + _at(SMALL, 262144)),
    Sweep("lane_rows", (0, 16, 64, 256), "backward", _at(PAIRS, 16384, 65536)),
    Sweep("backward_item_blocks", (4, 8, 16, 32), "backward", _at(LONG, 16384)),
    Sweep("backward_row_blocks", (8, 16, 32, 64), "backward", _at(LONG, 16384)),
    Sweep("decode_blocks", (1, 2, 4), "decode", _at(replace(PAIRS, queries=1), 65536, 1 << 20)),
)
FIELDS = tuple(dict.fromkeys(sweep.field for sweep in SWEEPS))


@contextmanager
def tuned(field: str, value: int) -> Iterator[int]:
    """Plans made inside use this value; gives the one before."""
    before = torch.ops.resona._tune_cuda(field, value)
    try:
        yield before
    finally:
        torch.ops.resona._tune_cuda(field, before)


class Tuned:
    """A call whose plan is made with one value, also while a graph captures it."""

    def __init__(self, call: timer.Call, field: str, value: int):
        self.call, self.field, self.value = call, field, value
        self.capturable = getattr(call, "capturable", True)

    def __call__(self) -> object:
        with tuned(self.field, self.value):
            return self.call()


def sweep_case(sweep: Sweep, case: Case, clock, budget: timer.Budget) -> list[dict]:
    """One row per value: what it took, and as a multiple of the default's time."""
    contender = next(iter(OPERATORS[sweep.operator].ours(case)))
    with tuned(sweep.field, sweep.values[0]) as default:
        pass
    rows: dict[str, dict] = {}
    calls: dict[str, timer.Call] = {}
    for value in sorted({*sweep.values, default}):
        call = Tuned(contender.call, sweep.field, value)
        row = {"field": sweep.field, "value": value, "default": default, "case": case.id}
        rows[str(value)] = row | {"status": "ok", "reason": ""}
        try:
            contender.check(call()).require()
            calls[str(value)] = call
        except Exception as error:
            rows[str(value)] |= {"status": "failed", "reason": str(error)[:200]}
    checks = dict.fromkeys(calls, lambda result: contender.check(result).require())
    timings, failed = timer.interleaved(calls, clock, budget, checks=checks)
    for name, error in failed.items():
        rows[name] |= {"status": "failed", "reason": str(error)[:200]}
    base = timings[str(default)].median if str(default) in timings else None
    for name, timing in timings.items():
        ms = [1e3 * f(timing.samples) for f in (min, max)]
        rows[name] |= {"median_ms": 1e3 * timing.median, "min_ms": ms[0], "max_ms": ms[1]}
        rows[name] |= {"timer": timing.method, "of_default": base and timing.median / base}
    return list(rows.values())


def lines(rows: list[dict]) -> list[str]:
    text = [f"\n{rows[0]['field']}, default {rows[0]['default']}: {rows[0]['case']}"]
    for row in rows:
        if row["status"] != "ok":
            text.append(f"  {row['value']:>14}  {row['reason']}")
            continue
        times = [duration(row[f"{name}_ms"]) for name in ("median", "min", "max")]
        relative = "" if row["of_default"] is None else f"{row['of_default']:>8.3f}"
        text.append(f"  {row['value']:>14}" + "".join(f"{x:>12}" for x in times) + relative)
    return text


def begin(device: str, output: Path, argv: list[str], resume: bool) -> dict:
    """An empty record, or with the rows of the one that is there, if that is of this build."""
    header = record.header(argv, device)
    header["command"] = header["command"].replace(
        "benchmarks.kernels", "benchmarks.kernels.tune", 1
    )
    done = {"schema": record.SCHEMA, "complete": False, "machine": header, "rows": []}
    output.parent.mkdir(parents=True, exist_ok=True)
    if resume and output.exists():
        earlier = record.load(output)
        if record.same_build(earlier["machine"], header):
            done["rows"] = earlier["rows"]
    return done


def run(
    sweeps: list[Sweep], device: str, output: Path, seconds: float, argv: list[str], resume: bool
) -> int:
    """All sweeps; 1 if a value gave a wrong result or none at all, 3 if the GPU no longer works."""
    clock = timer.clock_for(device)
    budget = timer.Budget(seconds=seconds, min_calls=3, max_calls=50)
    done = begin(device, output, argv, resume)
    known = {(row["field"], row["case"]) for row in done["rows"]}
    for sweep in sweeps:
        for shape in sweep.cases:
            case = Case(sweep.operator, shape, "random", "bfloat16", device)
            if (sweep.field, case.id) in known:
                continue
            try:
                rows = sweep_case(sweep, case, clock, budget)
            except Exception as error:  # out of memory, say: the other cases go on
                rows = [{"field": sweep.field, "value": sweep.values[0], "default": None}]
                rows[0] |= {"case": case.id, "status": "failed", "reason": str(error)[:200]}
            del case
            timer.clean_up(device)
            print(*lines(rows), sep="\n", flush=True)
            done["rows"] += rows
            record.replace_file(output, json.dumps(done, indent=1) + "\n")
            failed = any(row["status"] == "failed" for row in rows)
            if failed and not timer.device_works(device):
                print("the GPU no longer works in this process; --resume goes on behind this case")
                return DEVICE_LOST
    done["complete"] = True
    record.replace_file(output, json.dumps(done, indent=1) + "\n")
    print(f"wrote {output}")
    return 1 if any(row["status"] == "failed" for row in done["rows"]) else 0


def _smoke(sweep: Sweep) -> Sweep:
    queries = sweep.cases[0].queries
    return replace(sweep, cases=(replace(shapes.TINY, length=203, queries=queries),))


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels.tune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("fields", nargs="*", metavar="FIELD", help=f"default: all of {', '.join(FIELDS)}")
    add("--device", choices=("cpu", "cuda"), default="cuda")
    add("--smoke", action="store_true", help="tiny shapes, for function, not for time")
    add("--seconds", type=float, default=0.3, help="per value and case (default: %(default)s)")
    add("--resume", action="store_true", help="go on with the record that is there, of this build")
    add("--output", type=Path, default=Path("build/benchmarks/tune.json"))
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    options = parse(argv)
    try:
        for field in options.fields:
            if field not in FIELDS:
                raise CliError(f"unknown field {field!r}, expected some of {', '.join(FIELDS)}")
        obstacle = gpu_obstacle() if options.device == "cuda" else None
        if obstacle is not None:
            raise CliError(f"--device cuda: {obstacle}")
        chosen = [sweep for sweep in SWEEPS if not options.fields or sweep.field in options.fields]
        if options.smoke or options.device == "cpu":
            chosen = [_smoke(sweep) for sweep in chosen]
        seconds, resume = options.seconds, options.resume
        return run(chosen, options.device, options.output, seconds, argv, resume)
    except CliError as error:
        print(f"benchmarks.kernels.tune: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("benchmarks.kernels.tune: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
