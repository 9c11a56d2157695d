"""The steps of gpu_smoke.sh, each in a process of its own under `timeout`; imports no torch.

The record is written every other second, so that whatever ends the run leaves what is known. A job that
crashes or hangs its process counts as failed; the jobs after it run in a new one.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = ROOT / "resona_ext" / "libresona.so"
WORKER = ROOT / "benchmarks" / "gpu_smoke_worker.py"
NEEDED = {"libtorch", "libtorch_cpu", "libstdc++", "libgcc_s", "libm", "libc", "ld-linux-x86-64"}
WEAK = "aoti_torch_get_current_cuda_stream"
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
# Most seconds of a step; the whole run has --seconds.
LIMITS = {"machine": 90, "binary": 30, "load": 90, "cases": 300, "debug": 120, "sanitizer": 150}
MAX_RESTARTS = 8
SANITIZER_FOUND = 86  # the exit status that compute-sanitizer is told to use


class Run:
    """The record and what is left of the time."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.begin = options, time.monotonic()
        self.path = Path(options.out)
        self.record = {
            "schema": 1,
            "complete": False,
            "passed": False,
            "summary": "under way",
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "command": shlex.join(["benchmarks/gpu_smoke.sh", *sys.argv[1:]]),
            "commit": commit(),
            "device": options.device,
            "machine": {},
            "steps": {},
        }

    def left(self) -> float:
        return self.options.seconds - (time.monotonic() - self.begin)

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_name(self.path.name + ".part")
        part.write_text(json.dumps(self.record, indent=1) + "\n")
        os.replace(part, self.path)

    def step(self, name: str, body: Callable[[dict], None]) -> dict:
        """Runs one step; `body` fills its entry: status passed, failed, missing or not reached."""
        entry = {"status": "under way"}
        self.record["steps"][name] = entry
        self.write()
        begin = time.monotonic()
        if self.left() < 5:
            entry.update(status="not reached", reason="no time left")
        else:
            body(entry)
        entry["seconds"] = round(time.monotonic() - begin, 1)
        self.write()
        print(
            f"{name}: {entry['status']}, {entry['seconds']} s {entry.get('reason', '')}", flush=True
        )
        return entry

    def call(self, command: list, limit: float, tick=None, **environment) -> tuple[int, str]:
        """Status (124 or 137: out of time) and output of a command; `tick` is called while it runs."""
        log = self.path.with_name(self.path.name + ".log")
        seconds = max(1, int(min(limit, self.left())))
        with log.open("wb") as file:
            process = subprocess.Popen(
                ["timeout", "-k", "5", str(seconds), *map(str, command)],
                stdout=file,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                cwd=ROOT,
                env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **environment},
            )
            while True:
                try:
                    status = process.wait(timeout=2)
                    break
                except subprocess.TimeoutExpired:
                    if tick:
                        tick()
        text = log.read_text(errors="replace")
        log.unlink()
        return status, text


def commit() -> str:
    """A copy without its history may be told by RESONA_COMMIT."""
    if os.environ.get("RESONA_COMMIT"):
        return os.environ["RESONA_COMMIT"]
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        found = subprocess.run(git, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return found.stdout.strip() if found.returncode == 0 else "unknown"


def end_of(text: str) -> str:
    return text[-3000:]


def outcome(status: int) -> str:
    return "ran out of time" if status in (124, 137) else f"ended with status {status}"


def ask_worker(run: Run, entry: dict, question: str) -> dict | None:
    """One JSON object on the last line, or None and the reason in the entry."""
    status, text = run.call([sys.executable, WORKER, question], LIMITS[question])
    lines = text.strip().splitlines()
    if status == 0 and lines and lines[-1].startswith("{"):
        return json.loads(lines[-1])
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


def read_progress(path: Path) -> tuple[list[dict], dict | None]:
    """Finished jobs, and the one that had begun when the process ended."""
    lines = path.read_text().splitlines() if path.exists() else []
    finished, begun = [], None
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:
            break  # cut off in the middle of a line
        if "ok" in event:
            finished.append(event)
            begun = None
        else:
            begun = event
    return finished, begun


def count(entry: dict, finished: list[dict]) -> None:
    failures = [event for event in finished if not event["ok"]]
    entry.update(passed=len(finished) - len(failures), failed=len(failures), failures=failures)
    if finished:
        entry["of"] = finished[-1]["of"]


def run_jobs(
    run: Run, entry: dict, limit: float, arguments: list[str], prefix=(), **environment
) -> None:
    """Runs jobs in as many processes as it takes."""
    progress = run.path.with_name(run.path.name + ".progress")
    until, finished, statuses = time.monotonic() + limit, [], set()
    count(entry, finished)

    def tick() -> None:
        count(entry, finished + read_progress(progress)[0])
        run.write()

    for _ in range(MAX_RESTARTS + 1):
        progress.unlink(missing_ok=True)
        first = finished[-1]["index"] + 1 if finished else 0
        command = [*prefix, sys.executable, WORKER, "jobs", "--device", run.options.device]
        command += ["--progress", progress, "--first", str(first), *arguments]
        status, text = run.call(command, until - time.monotonic(), tick, **environment)
        statuses.add(status)
        more, begun = read_progress(progress)
        progress.unlink(missing_ok=True)
        if begun is not None:
            why = f"crashed, hung or ran out of time: the process {outcome(status)}"
            more.append({**begun, "ok": False, "error": why, "output": end_of(text)})
        finished += more
        count(entry, finished)
        run.write()
        if (
            not more
            or len(finished) == entry["of"]
            or min(until - time.monotonic(), run.left()) < 5
        ):
            break
    if entry["failed"]:
        entry.update(status="failed", reason=f"{entry['failed']} of {len(finished)} jobs failed")
    elif not finished or len(finished) < entry["of"]:
        got = f"{len(finished)} of {entry.get('of', 'all')} jobs ran: the process {outcome(status)}"
        entry.update(status="failed", reason=got, output=end_of(text))
    else:
        entry.update(status="passed", reason=f"{len(finished)} jobs")
    if statuses & {SANITIZER_FOUND}:
        entry.update(status="failed", reason="found errors, see output", output=end_of(text))


def cases(run: Run) -> Callable[[dict], None]:
    chosen = ["--small"] if run.options.small else []
    return lambda entry: run_jobs(run, entry, LIMITS["cases"], chosen)


def debug(run: Run) -> Callable[[dict], None]:
    """With RESONA_DEBUG=1 wrong values are refused on CUDA too."""
    return lambda entry: run_jobs(run, entry, LIMITS["debug"], ["--wrong"], RESONA_DEBUG="1")


def find_sanitizer() -> str | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path=f"{home}/bin:{home}/compute-sanitizer"
    )


def sanitizer(run: Run, tool: str) -> Callable[[dict], None]:
    def body(entry: dict) -> None:
        program = find_sanitizer()
        if program is None:
            entry.update(
                status="missing", reason="compute-sanitizer is not on PATH nor under CUDA_HOME"
            )
            return
        prefix = [program, "--tool", tool, "--error-exitcode", SANITIZER_FOUND, "--print-limit", 20]
        # The slow tools watch our kernels only; the others must also see torch's, which write our inputs.
        if tool in ("racecheck", "synccheck"):
            prefix += ["--kernel-name", "kns=resona"]
        arguments = ["--small", "--job-seconds", "100"]
        uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # else tensors share allocations
        run_jobs(run, entry, LIMITS["sanitizer"], arguments, prefix, **uncached)

    return body


def summarize(run: Run) -> int:
    """The exit status, and one line of words."""
    steps = run.record["steps"]
    by_status: dict[str, list[str]] = {}
    for name, entry in steps.items():
        by_status.setdefault(entry["status"], []).append(name)
    bad = [n for s, names in by_status.items() if s not in ("passed", "missing") for n in names]
    run.record.update(
        complete="not reached" not in by_status,
        passed=not bad,
        missing=by_status.get("missing", []),
        summary="; ".join(f"{status}: {', '.join(names)}" for status, names in by_status.items()),
    )
    return 1 if bad else 0


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


def main() -> int:
    run = Run(parse())
    wanted = run.options.steps.split(",")
    tools = TOOLS if "sanitizer" in wanted else [tool for tool in TOOLS if tool in wanted]
    run.step("machine", machine(run))
    run.step("binary", binary(run))
    on_cuda = run.options.device == "cuda"
    has_device = bool(run.record["machine"].get("gpu"))
    loaded = run.step("load", load(run)) if has_device or not on_cuda else {}
    if on_cuda and not has_device:
        summarize(run)
        reason = run.record["machine"].get("why_no_gpu", "the machine step failed")
        run.record.update(passed=False, summary=f"no CUDA device: {reason}")
        status = 2
    else:
        if loaded["status"] == "passed":
            if "cases" in wanted:
                run.step("cases", cases(run))
            if "debug" in wanted and on_cuda:
                run.step("debug", debug(run))
            for tool in tools if on_cuda else ():
                run.step(tool, sanitizer(run, tool))
        status = summarize(run)
    run.write()
    print(f"{run.record['summary']}\nrecord: {run.path}")
    return status


if __name__ == "__main__":
    sys.exit(main())
