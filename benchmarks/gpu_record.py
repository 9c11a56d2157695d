"""The steps of gpu_record.sh; imports no torch. gpu_smoke.py has the machinery.

Every step is a process of its own with a bound in seconds. OUT/record.json says what became of each, and
OUT/NAME.json is what the step found. Steps that passed are not run again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from gpu_smoke import ROOT, Run, end_of, outcome, summarize

CEILINGS = ROOT / "benchmarks" / "gpu" / "ceilings.cu"
NO_DEVICE = 2  # exit status of gpu_smoke.py


@dataclass(frozen=True)
class Step:
    name: str
    seconds: int  # at most
    arguments: tuple[str, ...]  # of python -m benchmarks.kernels
    what: str


# In the order of what is wanted most. Ratios hold within a step: its contenders take turns in one process.
RECORDS = (
    Step("fused-16K", 150, ("fused", "--max-length", "16384"), "forward beside its peers, to 16K"),
    Step("backward-16K", 120, ("backward", "--max-length", "16384"), "gradients, to 16K"),
    Step("fused-64K", 150, ("fused", "--lengths", "65536"), "forward at 64K"),
    Step("decode", 90, ("decode",), "one token, 16K to 1M"),
    Step("stages", 120, ("pool", "search", "attend", "--max-length", "65536"), "stages apart"),
    Step("backward-64K", 150, ("backward", "--lengths", "65536"), "gradients at 64K"),
    Step("fused-256K", 200, ("fused", "--lengths", "262144"), "forward at 256K"),
    Step("backward-256K", 200, ("backward", "--lengths", "262144"), "gradients at 256K"),
    Step("layer", 120, ("layer-forward", "layer-train", "layer-decode"), "a Mamba-2 block"),
)
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
TUNING_SECONDS = 300
STEPS = ("smoke", "ceilings", *(step.name for step in RECORDS), "tuning", "sanitizer")


def finished(out: Path) -> dict:
    """The entries of an earlier call that need no second run."""
    path = out / "record.json"
    steps = json.loads(path.read_text())["steps"] if path.exists() else {}
    return {name: entry for name, entry in steps.items() if entry["status"] == "passed"}


def smoke(run: Run, out: Path, seconds: int, *arguments: str):
    """gpu_smoke.py with a record of its own."""
    name = "sanitizer" if "sanitizer" in arguments else "smoke"

    def body(entry: dict) -> None:
        path = out / f"{name}.json"
        command = [sys.executable, ROOT / "benchmarks" / "gpu_smoke.py", "--out", path]
        command += ["--device", run.options.device, "--seconds", str(seconds), *arguments]
        status, text = run.call(command, seconds + 20)
        summary = json.loads(path.read_text())["summary"] if path.exists() else end_of(text)
        entry.update(status="failed" if status else "passed", reason=summary, exit=status)

    return body


def ceilings(run: Run, out: Path):
    def body(entry: dict) -> None:
        if shutil.which("nvcc") is None:
            entry.update(status="missing", reason="nvcc is not on PATH")
            return
        program = out / "ceilings"
        flags = ["-O3", "-std=c++17", "-arch=native", "-I", ROOT / "csrc"]
        status, text = run.call(["nvcc", *flags, CEILINGS, "-o", program], 90)
        if status == 0:
            status, text = run.call([program], 90)
            program.unlink()
        if status == 0:
            (out / "ceilings.json").write_text(text)
        entry.update(status="failed" if status else "passed")
        if status:
            entry.update(reason=outcome(status), output=end_of(text))

    return body


def kernels(run: Run, out: Path, step: Step):
    def body(entry: dict) -> None:
        prefix = out / step.name
        command = [sys.executable, "-m", "benchmarks.kernels", *step.arguments]
        command += ["--device", run.options.device, "--output", prefix, "--seconds", "0.3"]
        for name in ("nsa", "flashmoba"):
            if getattr(run.options, name):
                command += [f"--{name}", getattr(run.options, name)]
        if run.options.device == "cpu":
            command += ["--smoke", "--baselines", "none"]
        status, text = run.call(command, step.seconds)
        path = prefix.with_name(prefix.name + ".json")
        record = json.loads(path.read_text()) if path.exists() else {"rows": {}, "complete": False}
        bad = [id for id, row in record["rows"].items() if row["status"] in ("wrong", "error")]
        entry.update(rows=len(record["rows"]), whole=record["complete"], wrong_or_error=bad)
        passed = status == 0 and record["complete"]
        entry.update(status="passed" if passed else "failed", reason=step.what)
        if not passed:
            entry.update(reason=f"{step.what}: {outcome(status)}", output=end_of(text))

    return body


def tuning(run: Run, out: Path):
    """What plans weigh kernels with, value beside value; nothing is changed by it."""

    def body(entry: dict) -> None:
        path = out / "tuning.json"
        command = [sys.executable, "-m", "benchmarks.kernels.tune", "--output", path]
        command += ["--device", run.options.device]
        if run.options.device == "cpu":
            command += ["--smoke", "--seconds", "0"]
        status, text = run.call(command, TUNING_SECONDS)
        record = json.loads(path.read_text()) if path.exists() else {"rows": [], "complete": False}
        failed = [row for row in record["rows"] if row["status"] != "ok"]
        entry.update(rows=len(record["rows"]), whole=record["complete"], failed=failed)
        passed = status == 0 and record["complete"]
        entry.update(status="passed" if passed else "failed", reason="sweeps of the plans' numbers")
        if not passed:
            entry.update(reason=f"sweeps: {outcome(status)}", output=end_of(text))

    return body


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    lines = "\n".join(f"  {s.name:<14}{s.what}, at most {s.seconds} s" for s in RECORDS)
    parser = argparse.ArgumentParser(
        prog="benchmarks/gpu_record.sh",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=f"steps, in this order:\n  smoke\n  ceilings\n{lines}\n  tuning\n  sanitizer",
    )
    add = parser.add_argument
    add("--out", type=Path, default=ROOT / "build" / "gpu-record", help="folder of the records")
    add("--seconds", type=float, default=540, help="for the whole call (default: %(default)s)")
    add("--steps", default=",".join(STEPS), help="only these (default: all)")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a dry run, tiny shapes")
    add("--nsa", type=Path, help="checkout of native-sparse-attention-triton")
    add("--flashmoba", type=Path, help="checkout of flash-moba, built")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.steps.split(",") if name not in STEPS]
    if unknown:
        parser.error(f"--steps: expected some of {', '.join(STEPS)}, got {', '.join(unknown)}")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    out, wanted = options.out, options.steps.split(",")
    before = finished(out)
    options.out = out / "record.json"
    run = Run(options)
    run.record["command"] = run.record["command"].replace("gpu_smoke.sh", "gpu_record.sh")
    run.record["steps"].update(before)
    bodies = {
        "smoke": smoke(run, out, 150, "--small", "--steps", "cases,debug"),
        "ceilings": ceilings(run, out),
        **{step.name: kernels(run, out, step) for step in RECORDS},
        "tuning": tuning(run, out),
        "sanitizer": smoke(run, out, 500, "--small", "--steps", "sanitizer"),
    }
    status = None
    for name in STEPS:
        if name not in wanted or name in before:
            continue
        entry = run.step(name, bodies[name])
        if name == "smoke" and entry["status"] == "failed":
            # Wrong kernels are not worth timing.
            status = 2 if entry.get("exit") == NO_DEVICE else 1
            break
    found = summarize(run)
    run.write()
    print(f"{run.record['summary']}\nrecord: {run.path}")
    return found if status is None else status


if __name__ == "__main__":
    sys.exit(main())
