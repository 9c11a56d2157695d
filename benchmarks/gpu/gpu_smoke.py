"""The steps of gpu_smoke.sh, each in a process of its own under `timeout`; imports no torch.

gpu_run.py has the record and the calls, gpu_jobs.py the jobs, gpu_sanitizer.py the tools.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from collections.abc import Callable

from gpu_jobs import WORKER, failures, run_jobs
from gpu_run import ROOT, Run, Stopped, end_of, outcome, stop_on_signals, stopped, summarize
from gpu_sanitizer import TOOLS, sanitizer

LIBRARY = ROOT / "resona_ext" / "libresona.so"
NEEDED = {"libtorch", "libtorch_cpu", "libstdc++", "libgcc_s", "libm", "libc", "ld-linux-x86-64"}
WEAK = "aoti_torch_get_current_cuda_stream"
# Most seconds of a step; the whole run has --seconds. On a machine that has just started, torch comes slowly.
LIMITS = {"machine": 180, "load": 180, "cases": 300, "debug": 120}
NO_DEVICE = 2  # exit status


def ask_worker(run: Run, entry: dict, question: str) -> dict | None:
    """The JSON object that it prints on a line, or None and the reason in the entry."""
    status, text = run.call([sys.executable, WORKER, question], LIMITS[question])
    found = [line for line in text.splitlines() if line.startswith("{")]  # warnings stand around it
    if status == 0 and found:
        return json.loads(found[-1])
    entry.update(status="failed", reason=outcome(status), output=end_of(text))
    return None


def machine(run: Run) -> Callable[[dict], None]:
    def body(entry: dict) -> None:
        facts = ask_worker(run, entry, "machine")
        if facts is not None:
            run.record["machine"] = facts
            entry.update(status="passed")
        asked = "driver_version,memory.total,clocks.sm,clocks.max.sm,power.limit"
        smi = ["nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader"]
        if shutil.which("nvidia-smi"):
            status, text = run.call(smi, 30)
            run.record["machine"][asked] = text.strip() if status == 0 else outcome(status)

    return body


def binary(run: Run) -> Callable[[dict], None]:
    def body(entry: dict) -> None:
        if not LIBRARY.exists():
            entry.update(
                status="failed", reason=f"expected {LIBRARY}, got no file; `make build` makes it"
            )
            return
        if shutil.which("readelf") is None:
            entry.update(status="missing", reason="readelf (binutils) is not installed")
            return
        _, dynamic = run.call(["readelf", "-d", LIBRARY], 15)
        _, symbols = run.call(["readelf", "-W", "--dyn-syms", LIBRARY], 15)
        needed = {re.sub(r"\.so.*", "", n) for n in re.findall(r"\(NEEDED\).*\[(.*?)\]", dynamic)}
        weak = [line.split()[4] for line in symbols.splitlines() if WEAK in line]
        problems = []
        if not {"libtorch", "libtorch_cpu"} <= needed <= NEEDED:
            problems.append(f"NEEDED: expected libtorch and libtorch_cpu among {sorted(NEEDED)}")
        if weak and weak != ["WEAK"]:
            problems.append(f"{WEAK}: expected a weak symbol, got {weak}")
        entry.update(needed=sorted(needed), stream_symbol=weak[0] if weak else "not used")
        entry.update(status="failed" if problems else "passed", reason="; ".join(problems))

    return body


def load(run: Run) -> Callable[[dict], None]:
    def body(entry: dict) -> None:
        facts = ask_worker(run, entry, "load")
        if facts is not None:
            problems = facts.pop("problems") if run.options.device != "cpu" else []
            entry.update(
                facts, status="failed" if problems else "passed", reason="; ".join(problems)
            )

    return body


def cases(run: Run, share: float) -> Callable[[dict], None]:
    """share: of the time that is left, so that one operator that hangs leaves some for the next step."""
    chosen = ["--small"] if run.options.small else []
    return lambda entry: run_jobs(run, entry, min(LIMITS["cases"], share * run.left()), chosen)


def debug(run: Run) -> Callable[[dict], None]:
    """With RESONA_DEBUG=1 wrong values are refused on CUDA too."""
    return lambda entry: run_jobs(run, entry, LIMITS["debug"], ["--wrong"], RESONA_DEBUG="1")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks/gpu_smoke.sh", description=__doc__)
    parser.add_argument("--out", default=str(ROOT / "build" / "gpu-smoke.json"), help="the record")
    parser.add_argument(
        "--seconds", type=float, default=540, help="for the whole run (default: 540)"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a dry run")
    parser.add_argument(
        "--small", action="store_true", help="the few cases that the sanitizer runs"
    )
    parser.add_argument(
        "--steps",
        default="cases,debug,sanitizer",
        help="after machine, binary and load: cases, debug, sanitizer or its tools by name (default: all)",
    )
    return parser.parse_args(arguments)


def has_no_device(run: Run) -> bool:
    """It was asked and said no. A machine that did not answer may still do what it must."""
    return run.options.device == "cuda" and "why_no_gpu" in run.record["machine"]


def steps(run: Run, wanted: list[str]) -> int:
    on_cuda = run.options.device == "cuda"
    if run.step("machine", machine(run))["status"] == "failed":
        run.step("machine", machine(run))  # cold, it may take longer than once is given
    run.step("binary", binary(run))
    if has_no_device(run):
        summarize(run)
        run.record["passed"] = False
        run.record["summary"] = f"no CUDA device: {run.record['machine']['why_no_gpu']}"
        return NO_DEVICE
    if run.step("load", load(run))["status"] == "passed":
        debugs = "debug" in wanted and on_cuda
        if "cases" in wanted:
            show(run.step("cases", cases(run, 2 / 3 if debugs else 1)))
        if debugs:
            show(run.step("debug", debug(run)))
        tools = [tool for tool in TOOLS if on_cuda and {tool, "sanitizer"} & set(wanted)]
        for i, tool in enumerate(tools):
            after = len(tools) - i  # which share what is left
            show(run.step(tool, sanitizer(run, tool, lambda after=after: run.left() / after)))
    return summarize(run)


def show(entry: dict) -> None:
    if text := failures(entry):
        print(text, flush=True)


def main() -> int:
    run = Run(parse())
    stop_on_signals()
    try:
        status = steps(run, run.options.steps.split(","))
    except Stopped as stop:
        status = stopped(run, stop)
    return run.finish(status)


if __name__ == "__main__":
    sys.exit(main())
