"""What gpu_record.py runs: its steps in the order of what is wanted most, and how each is done."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gpu_run import ROOT, Run, end_of, find_program, outcome
from gpu_sanitizer import TOOLS, sanitizer

CEILINGS = ROOT / "benchmarks" / "gpu" / "ceilings.cu"
FINISHED = ("passed", "wrong")  # wrong: all of it ran, and not all of it was right
DEVICE_LOST = 3  # exit status of the benchmarks: nothing works on the GPU until the process ends
MORE_PROCESSES = 5  # after such ends
# FlexAttention compiles for a minute and has a step of its own; plain SDPA holds all scores.
BESIDE_PEERS = ("--without", "flex,sdpa-math")


@dataclass(frozen=True)
class Step:
    name: str
    seconds: int  # at most
    what: str
    operators: tuple[str, ...] = ()  # of python -m benchmarks.kernels
    lengths: tuple[str, ...] = ()
    flags: tuple[str, ...] = BESIDE_PEERS


def _timed(name: str, seconds: int, what: str, operators: str, *lengths: str, **more) -> Step:
    return Step(name, seconds, what, tuple(operators.split()), lengths, **more)


_TO_16K, _TO_64K = ("--max-length", "16384"), ("--max-length", "65536")
# Ratios hold within a step: its contenders take turns in one process. The first five fit into one call of
# nine minutes, and so do the next five; what comes last is long or may be missing.
STEPS = (
    Step(
        "smoke", 180, "do the operators compute what they must: the small cases, and wrong values"
    ),
    Step("ceilings", 70, "what the machine can do"),
    _timed("fused-16K", 130, "forward beside its peers, to 16K", "fused", *_TO_16K),
    _timed("decode", 60, "one token, 16K to 1M", "decode"),
    _timed("backward-16K", 95, "gradients, to 16K", "backward", *_TO_16K),
    Step("cases", 110, "all cases on the device, on streams of their own and in graphs"),
    _timed("fused-64K", 130, "forward at 64K", "fused", "--lengths", "65536"),
    _timed("backward-64K", 100, "gradients at 64K", "backward", "--lengths", "65536"),
    _timed("stages", 80, "stages apart", "pool search attend", *_TO_64K),
    Step("tuning", 115, "sweeps of the plans' numbers"),
    _timed(
        "parts",
        60,
        "what our kernels take, by torch's profiler",
        "fused backward",
        *("--lengths", "16384,65536"),
        flags=("--parts", "--baselines", "none"),
    ),
    Step("memcheck", 140, "reads and writes out of bounds"),
    Step("racecheck", 140, "races in shared memory"),
    _timed("fused-256K", 90, "forward at 256K", "fused", "--lengths", "262144"),
    _timed("backward-256K", 90, "gradients at 256K", "backward", "--lengths", "262144"),
    _timed(
        "flex",
        150,
        "FlexAttention, which compiles for long",
        "attend backward",
        *("--lengths", "16384"),
        flags=("--baselines", "flex"),
    ),
    Step("initcheck", 140, "reads of what nobody wrote"),
    Step("synccheck", 140, "barriers that not all reach"),
)

Body = Callable[[dict], None]


def bodies(run: Run, out: Path) -> dict[str, Body]:
    steps = {step.name: step for step in STEPS}
    found = {step.name: kernels(run, out, step) for step in STEPS if step.operators}
    for tool in TOOLS:
        found[tool] = sanitizer(run, tool, lambda tool=tool: steps[tool].seconds)
    small = ("--small", "--steps", "cases,debug")
    found["smoke"] = smoke(run, out, steps["smoke"], *small)
    found["cases"] = smoke(run, out, steps["cases"], "--steps", "cases")
    found["ceilings"] = ceilings(run, out, steps["ceilings"].seconds)
    found["tuning"] = tuning(run, out, steps["tuning"].seconds)
    return found


# --- smoke test, ceilings -------------------------------------------------------------------------


def smoke(run: Run, out: Path, step: Step, *arguments: str) -> Body:
    """gpu_smoke.py with a record of its own."""

    def body(entry: dict) -> None:
        path = out / f"{step.name}.json"
        path.unlink(missing_ok=True)
        limit = min(step.seconds, run.left())
        command = [
            sys.executable,
            ROOT / "benchmarks" / "gpu" / "gpu_smoke.py",
            "--out",
            path,
            *arguments,
        ]
        command += ["--device", run.options.device]
        status, text = run.call([*command, "--seconds", limit - 8], limit)
        record = json.loads(path.read_text()) if path.exists() else {"summary": end_of(text)}
        entry.update(exit=status, reason=record["summary"])
        if status == 0:
            entry["status"] = "passed"
        else:
            entry["status"] = "wrong" if is_whole(record) else "failed"

    return body


def is_whole(record: dict) -> bool:
    """A smoke test all of whose jobs ran, or were left out for what others of their operator did."""
    steps = record.get("steps", {})
    ran = [entry for name, entry in steps.items() if name in ("cases", "debug")]
    return bool(ran and record["complete"]) and all(
        entry["passed"] + entry["failed"] + len(entry.get("skipped", ())) == entry.get("of")
        for entry in ran
    )


def ceilings(run: Run, out: Path, seconds: int) -> Body:
    def body(entry: dict) -> None:
        nvcc = find_program("nvcc")
        if nvcc is None or run.options.device != "cuda":
            why = "it measures a GPU" if nvcc else "nvcc is not on PATH nor under CUDA_HOME"
            entry.update(status="missing", reason=why)
            return
        until = time.monotonic() + seconds
        program = out / "ceilings"
        flags = ["-O3", "-std=c++17", "-arch=native", "-I", ROOT / "csrc"]
        status, text = run.call([nvcc, *flags, CEILINGS, "-o", program], seconds)
        if status:
            entry.update(status="failed", reason=f"nvcc {outcome(status)}", output=end_of(text))
            return
        status, text = run.call([program], until - time.monotonic())
        program.unlink()
        figures = read_figures(text)
        if figures:
            (out / "ceilings.json").write_text(json.dumps(figures, indent=1) + "\n")
        entry.update(reason=f"{len(figures)} figures", figures=len(figures))
        entry["status"] = "passed" if figures else "failed"
        if status:
            entry.update(reason=f"{len(figures)} figures, then it {outcome(status)}")
            entry.update(status="wrong" if figures else "failed", output=end_of(text))

    return body


def read_figures(text: str) -> dict:
    """One object out of those that stand on lines of their own; the last may be cut off."""
    figures: dict = {}
    for line in text.splitlines():
        if line.startswith("{"):
            try:
                figures |= json.loads(line)
            except ValueError:
                continue
    return figures


# --- timed steps ----------------------------------------------------------------------------------


def kernels(run: Run, out: Path, step: Step) -> Body:
    def body(entry: dict) -> None:
        prefix = out / step.name
        command = [sys.executable, "-m", "benchmarks.kernels", *step.operators]
        command += ["--device", run.options.device, "--output", prefix]
        command += ["--seconds", "0.3", "--no-plots", *step.flags]
        if run.options.device == "cpu":
            command += ["--smoke", "--baselines", "none"]
        else:
            command += step.lengths
        for name in ("nsa", "flashmoba"):
            if getattr(run.options, name):
                command += [f"--{name}", getattr(run.options, name)]
        if (out / "ceilings.json").exists():
            command += ["--ceilings", out / "ceilings.json"]
        path = out / f"{step.name}.json"
        status, text = timed(run, entry, command, step.seconds, path)
        record = json.loads(path.read_text()) if path.exists() else {"rows": {}, "complete": False}
        bad = [id for id, row in record["rows"].items() if row["status"] in ("wrong", "error")]
        entry.update(rows=len(record["rows"]), whole=record["complete"], wrong_or_error=bad)
        judge(entry, step.what, status, text)

    return body


def tuning(run: Run, out: Path, seconds: int) -> Body:
    """What plans weigh kernels with, value beside value; nothing is changed by it."""

    def body(entry: dict) -> None:
        path = out / "tuning.json"
        command = [sys.executable, "-m", "benchmarks.kernels.tune", "--output", path]
        command += ["--device", run.options.device]
        if run.options.device == "cpu":
            command += ["--smoke", "--seconds", "0"]
        status, text = timed(run, entry, command, seconds, path)
        record = json.loads(path.read_text()) if path.exists() else {"rows": [], "complete": False}
        failed = [row for row in record["rows"] if row["status"] != "ok"]
        entry.update(rows=len(record["rows"]), whole=record["complete"], wrong_or_error=failed)
        judge(entry, "sweeps of the plans' numbers", status, text)

    return body


def timed(run: Run, entry: dict, command: list, seconds: float, path: Path) -> tuple[int, str]:
    """Status and output of a benchmark that goes on with the record at path, in a new process where the GPU
    was lost."""
    until = time.monotonic() + min(seconds, run.left())
    if run.options.again:
        path.unlink(missing_ok=True)
    entry["processes"] = 0
    while True:
        resume = ["--resume"] if path.exists() else []
        status, text = run.call([*command, *resume], until - time.monotonic())
        entry["processes"] += 1
        if status != DEVICE_LOST or entry["processes"] > MORE_PROCESSES:
            return status, text
        if until - time.monotonic() < 10:
            return status, text


def judge(entry: dict, what: str, status: int, text: str) -> None:
    if not entry["whole"]:
        entry.update(status="failed", reason=f"{what}: {outcome(status)}", output=end_of(text))
        return
    bad = len(entry["wrong_or_error"])
    entry.update(status="wrong" if bad else "passed", reason=what)
    if bad:
        entry["reason"] += f": {bad} of {entry['rows']} rows wrong or in error"
