"""Jobs of gpu_smoke_worker.py in as many processes as it takes; imports no torch.

A job that crashes or hangs its process counts as failed; the jobs after it run in a new one. An operator that
did so twice is left out from then on: it must not eat the time of the others.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from gpu_run import ROOT, Run, end_of, outcome

WORKER = ROOT / "benchmarks" / "gpu" / "gpu_smoke_worker.py"
MAX_RESTARTS = 25
MAX_CRASHES = 2  # of one operator


def read_progress(path: Path) -> tuple[list[dict], dict | None]:
    """Finished and skipped jobs, and the one that had begun when the process ended."""
    lines = path.read_text().splitlines() if path.exists() else []
    finished, begun = [], None
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:
            break  # cut off in the middle of a line
        if "ok" in event or "skipped" in event:
            finished.append(event)
            begun = None
        else:
            begun = event
    return finished, begun


def count(entry: dict, finished: list[dict]) -> None:
    ran = [event for event in finished if "ok" in event]
    failures = [event for event in ran if not event["ok"]]
    entry.update(passed=len(ran) - len(failures), failed=len(failures), failures=failures)
    skipped = [event["job"] for event in finished if "skipped" in event]
    if skipped:
        entry["skipped"] = skipped
    if finished:
        entry["of"] = finished[-1]["of"]


class Jobs:
    """One step's jobs: what is known of them, and the processes that run them."""

    def __init__(self, run: Run, entry: dict, limit: float, margin: float):
        self.run, self.entry, self.margin = run, entry, margin
        self.progress = run.path.with_name(run.path.name + ".progress")
        self.until = time.monotonic() + min(limit, run.left())
        self.finished: list[dict] = []
        self.crashes: Counter[str] = Counter()
        count(entry, [])

    def left(self) -> float:
        return self.until - time.monotonic()

    def all_done(self) -> bool:
        return bool(self.finished) and len(self.finished) == self.entry["of"]

    def process(self, arguments: list, prefix: list, environment: dict) -> tuple[int, str, bool]:
        """One process: its status, its output, and whether it got anywhere."""
        command = [*prefix, sys.executable, WORKER, "jobs", "--device", self.run.options.device]
        command += ["--progress", self.progress, "--until", time.time() + self.left() - self.margin]
        command += ["--first", self.finished[-1]["index"] + 1 if self.finished else 0, *arguments]
        for operator, crashes in self.crashes.items():
            command += ["--skip-op", operator] if crashes >= MAX_CRASHES else []
        self.progress.unlink(missing_ok=True)
        status, text = self.run.call(command, self.left(), self._tick, **environment)
        more, begun = read_progress(self.progress)
        self.progress.unlink(missing_ok=True)
        if begun is not None:
            why = f"crashed, hung or ran out of time: the process {outcome(status)}"
            more.append({**begun, "ok": False, "error": why, "output": end_of(text)})
        self.finished += more
        count(self.entry, self.finished)
        # Who fails as the last one of a process that still had jobs took the process or the GPU with it.
        if more and not more[-1].get("ok", True) and not self.all_done():
            self.crashes[more[-1].get("op", "")] += 1
        self.run.write()
        return status, text, bool(more)

    def _tick(self) -> None:
        count(self.entry, self.finished + read_progress(self.progress)[0])
        self.run.write()

    def conclude(self, status: int, text: str) -> None:
        entry, ran = self.entry, len(self.finished)
        if entry["failed"]:
            skipped = len(entry.get("skipped", ()))
            reason = f"{entry['failed']} of {ran - skipped} jobs failed"
            reason += f", {skipped} skipped behind crashes of their operator" if skipped else ""
            entry.update(status="failed", reason=reason)
            if not self.all_done():
                entry["reason"] += f"; {entry['of'] - ran} not reached"
        elif not self.all_done():
            got = f"{ran} of {entry.get('of', 'all')} jobs ran: the process {outcome(status)}"
            entry.update(status="failed", reason=got, output=end_of(text))
        else:
            entry.update(status="passed", reason=f"{ran} jobs")


def run_jobs(
    run: Run,
    entry: dict,
    limit: float,
    arguments: list[str],
    prefix: list | tuple = (),
    margin: float = 3,
    seen: Callable[[int, str], None] = lambda status, text: None,
    **environment: str,
) -> None:
    """Fills the entry. margin: seconds before the limit after which no job begins, so that the process ends
    by itself; seen: told the status and the output of every process."""
    jobs = Jobs(run, entry, limit, margin)
    for _ in range(MAX_RESTARTS + 1):
        status, text, got_on = jobs.process(arguments, list(prefix), environment)
        seen(status, text)
        if not got_on or jobs.all_done() or jobs.left() < margin + 2:
            break
    jobs.conclude(status, text)


def failures(entry: dict, most: int = 10) -> str:
    """The last line of what each of the failed jobs said, for whoever sees the terminal only."""
    lines = []
    for event in entry.get("failures", [])[:most]:
        error = event["error"].strip().splitlines() or [""]
        lines.append(f"  {event['job']}: {error[-1][:200]}")
    return "\n".join(lines)
