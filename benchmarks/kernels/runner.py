"""The loop: for each case build the contenders, check them, time them in turns, write them down."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from . import ceilings, data, model, parts
from .baselines import Baseline, Checkouts
from .data import Case
from .operators import OPERATORS, OURS, Contender
from .record import Record, count_failures
from .shapes import Sweep
from .timer import (
    Budget,
    Timing,
    clean_up,
    clock_for,
    device_works,
    interleaved,
    is_out_of_memory,
)

# How the time of a contender grows with the length, to foresee calls that would take too long.
GROWTH = {"dense": 2, "stage": 2}


@dataclass
class Plan:
    """Everything that a run was asked to do."""

    sweeps: list[Sweep]
    device: str
    baselines: dict[str, Baseline]  # those that can be used here
    reasons: dict[str, str]  # the others, and why not
    budget: Budget
    patience: float  # seconds that one call may take
    scale: str  # of the ceilings
    output: Path
    checkouts: Checkouts = field(default_factory=Checkouts)
    seed: int = 0
    ceilings: dict = field(default_factory=dict)  # what benchmarks/gpu/ceilings.cu found
    parts: bool = True  # of one more call of ours; on a GPU the profiler stays attached behind it

    def cases(self) -> Iterator[tuple[Sweep, Case]]:
        for sweep in self.sweeps:
            for pattern in sweep.patterns:
                for dtype in sweep.dtypes:
                    for length in sweep.lengths:
                        shape = sweep.shape.with_length(length)
                        yield (
                            sweep,
                            Case(sweep.operator, shape, pattern, dtype, self.device, self.seed),
                        )


class DeviceLost(RuntimeError):
    """A kernel of the case before did something that no kernel of this process survives."""


class Runner:
    def __init__(self, plan: Plan, header: dict, note: Callable[[str], None] = lambda text: None):
        self.plan, self.note = plan, note
        self.clock = clock_for(plan.device)
        self.record = Record(header, baselines={name: "used" for name in plan.baselines})
        self.record.baselines |= plan.reasons
        self.history: dict[tuple, tuple[int, float]] = {}  # length and seconds of the last call
        self.failures = 0  # results of ours that were wrong or raised; being out of memory is none

    def measure_ceilings(self) -> None:
        dtypes = list(dict.fromkeys(d for sweep in self.plan.sweeps for d in sweep.dtypes))
        self.note("measuring copy, gather and matmul")
        known = self.plan.ceilings
        if not self.record.ceilings:  # else those of the record that is gone on with
            self.record.ceilings = ceilings.measure(self.clock, dtypes, self.plan.scale, known)

    def run(self) -> Iterator[tuple[str, list[dict]]]:
        """One case at a time, its id and its finished rows; the record on disk is up to date by then."""
        for sweep, case in self.plan.cases():
            if self.record.has(case.id):
                continue
            rows, id = self.run_case(sweep, case), case.id
            for row in rows:
                self.record.add(row)
            self.record.write(self.plan.output)
            del case  # its tensors go before those of the next one come
            clean_up(self.plan.device)
            yield id, rows
            if any(row["status"] == "error" for row in rows) and not device_works(self.plan.device):
                raise DeviceLost(id)
        self.record.complete = True
        self.record.write(self.plan.output)

    def run_case(self, sweep: Sweep, case: Case) -> list[dict]:
        rows: dict[str, dict] = {}
        ready: dict[str, Contender] = {}
        for name, make in self._entrants(sweep, case, rows):
            row = rows[name] = self._row(case, name)
            self.note(f"checking {name}")
            try:
                contender = make()
                begin = time.perf_counter()
                result, peak = self.clock.peak_bytes(contender.call)
                took = time.perf_counter() - begin
                if took > self.plan.patience and case.device == "cuda":
                    begin = time.perf_counter()  # the first call also compiled it
                    self.clock.peak_bytes(contender.call)
                    took = time.perf_counter() - begin
                check = contender.check(result)
                del result
                row |= {"computes": contender.computes, "note": contender.note}
                row |= {"error": check.error, "tolerance": check.tolerance}
                row["peak_mib"] = None if peak is None else peak / 2**20
                if not check.passed:
                    row["status"] = "wrong"
                    row["reason"] = check.reason
                elif name in self.plan.baselines and took > self.plan.patience:
                    row["status"] = "skipped"
                    row["reason"] = (
                        f"a call takes {took:,.0f} s (--patience {self.plan.patience:g})"
                    )
                    self.history[self._key(case, name)] = (case.shape.length, took)
                else:
                    ready[name] = contender
            except Exception as error:
                self._fail(row, error)
        calls = {name: contender.call for name, contender in ready.items()}
        checks = {name: _required(contender) for name, contender in ready.items()}
        timings, failed = interleaved(calls, self.clock, self.plan.budget, self.note, checks)
        for name, error in failed.items():
            self._fail(rows[name], error)
        for name, timing in timings.items():
            rows[name] |= self._times(case, ready[name], timing, timings.get(OURS))
            self.history[self._key(case, name)] = (case.shape.length, timing.median)
        if OURS in timings and self.plan.parts:
            rows[OURS] |= self._parts(ready[OURS])
        self.failures += count_failures(rows.values(), self.plan.baselines)
        if "indices" in vars(case):
            self.record.selection[case.id] = data.locality(case.indices)
        return list(rows.values())

    def _parts(self, contender: Contender) -> dict:
        """What the parts of one more call take. It is an extra: where it fails, the times stay."""
        try:
            found = parts.measure(contender.call, self.plan.device)
        except Exception as error:
            return {"parts_missing": f"{type(error).__name__}: {error}"[:200]}
        return {f"part_{part}_ms": 1e3 * seconds for part, seconds in found.items()}

    def _entrants(
        self, sweep: Sweep, case: Case, rows: dict[str, dict]
    ) -> Iterator[tuple[str, Callable[[], Contender]]]:
        """Names and makers of all that take part; the others leave a row that says why not."""
        operator = OPERATORS[case.operator]
        reason = operator.missing(case.device)
        if reason is not None:
            rows[OURS] = self._row(case, OURS) | {"status": "skipped", "reason": reason}
            return
        try:
            ours = list(operator.ours(case))
        except Exception as error:
            rows[OURS] = self._row(case, OURS)
            self._fail(rows[OURS], error)
            ours = []
        for contender in ours:
            yield contender.name, lambda contender=contender: contender
        for baseline in self.plan.baselines.values():
            if case.operator not in baseline.operators:
                continue
            reason = self._why_not(sweep, case, baseline)
            if reason is not None:
                rows[baseline.name] = self._row(case, baseline.name)
                rows[baseline.name] |= {"status": "skipped", "reason": reason}
                continue
            yield (
                baseline.name,
                lambda baseline=baseline: operator.theirs(case, baseline, self.plan.checkouts),
            )

    def _why_not(self, sweep: Sweep, case: Case, baseline: Baseline) -> str | None:
        reason = baseline.unfit(case)
        if reason is not None:
            return reason
        if sweep.baselines is not None and baseline.name not in sweep.baselines:
            return "not part of the suite here"
        known = self.history.get(self._key(case, baseline.name))
        if known is None:
            return None
        length, seconds = known
        growth = GROWTH.get(baseline.computes, 1)
        expected = seconds * (case.shape.length / length) ** growth
        if expected > self.plan.patience:
            return f"a call would take about {expected:,.0f} s (--patience {self.plan.patience:g})"
        return None

    def _row(self, case: Case, contender: str) -> dict:
        row = {"id": f"{case.id}/{contender}", "status": "ok", "reason": "", "contender": contender}
        row |= {"operator": case.operator, "pattern": case.pattern, "dtype": case.dtype_name}
        return row | asdict(case.shape) | {"queries": case.shape.rows}

    @staticmethod
    def _key(case: Case, contender: str) -> tuple:
        sizes = asdict(case.shape) | {"length": None}
        return (case.operator, case.pattern, case.dtype_name, contender, *sizes.values())

    @staticmethod
    def _fail(row: dict, error: Exception) -> None:
        row["status"] = "oom" if is_out_of_memory(error) else "error"
        text = str(error).strip().splitlines()
        row["reason"] = text[0][:200] if text else type(error).__name__
        if row["status"] == "oom" and row.get("peak_mib") is None and torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _times(self, case: Case, contender: Contender, timing: Timing, ours: Timing | None) -> dict:
        seconds = timing.median
        facts = {
            "median_ms": seconds * 1e3,
            "min_ms": min(timing.samples) * 1e3,
            "max_ms": max(timing.samples) * 1e3,
            "calls": len(timing.samples),
            "timer": timing.method,
            "ratio": seconds / ours.median if ours else None,
        }
        if not contender.stages:
            return facts
        work = sum(contender.stages, model.Work())
        facts |= {
            "flops": work.flops,
            "compulsory_bytes": work.compulsory,
            "cached_bytes": work.cached,
            "flops_per_s": work.flops / seconds,
            "bytes_per_s": work.compulsory / seconds,
        }
        speeds = ceilings.speeds(self.record.ceilings, case.dtype_name, case.device)
        if speeds is not None:
            floor = model.floor_seconds(contender.stages, speeds)
            facts |= {
                "percent_of_matmul": 100 * work.flops / seconds / speeds.matmul,
                "percent_of_copy": 100 * work.compulsory / seconds / speeds.copy,
                "floor_ms": floor * 1e3,
                "percent_of_floor": 100 * floor / seconds,
            }
            if speeds.cache:
                facts["percent_of_cache"] = 100 * work.cached / seconds / speeds.cache
        return {name: x for name, x in facts.items() if x is None or _is_finite(x)}


def _required(contender: Contender) -> Callable[[object], None]:
    """Of what its graph computes: raises where that is wrong."""
    return lambda result: contender.check(result).require()


def _is_finite(value: object) -> bool:
    return not isinstance(value, float) or math.isfinite(value)
