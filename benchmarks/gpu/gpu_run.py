"""A record of steps and the calls they make; gpu_smoke.py and gpu_record.py are made of it. Imports no torch.

Every call is a process of its own under `timeout`. The record is written while it runs, so that whatever ends
the run leaves what is known.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
POLL = 2  # seconds between two looks at a child
GRACE = 15  # seconds behind its limit after which a child is left alone: no signal ends it


class Stopped(BaseException):
    """A signal asked for the end; no step may take it for a failure of its own."""

    def __init__(self, number: int):
        super().__init__(f"stopped by signal {number}")
        self.status = 128 + number


def stop_on_signals() -> None:
    numbers = (signal.SIGTERM, signal.SIGINT)

    def stop(number: int, frame) -> None:
        for each in numbers:  # `timeout` sends two, and the end must not be stopped
            signal.signal(each, signal.SIG_IGN)
        raise Stopped(number)

    for each in numbers:
        signal.signal(each, stop)


class Run:
    """The record and what is left of the time."""

    program = "benchmarks/gpu_smoke.sh"
    least = 5  # seconds that must be left for a step to begin

    def __init__(self, options: argparse.Namespace):
        self.options, self.begin = options, time.monotonic()
        self.path = Path(options.out)
        self.output = ""  # of the last call
        self.record = {
            "schema": 1,
            "complete": False,
            "passed": False,
            "summary": "under way",
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "command": shlex.join([self.program, *sys.argv[1:]]),
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

    def waiting(self) -> None:
        """Called every other second of a call."""

    def step(self, name: str, body: Callable[[dict], None]) -> dict:
        """Runs one step; `body` fills its entry: status passed, wrong, failed, missing or not reached."""
        entry = {"status": "under way"}
        self.record["steps"][name] = entry
        self.output = ""
        self.write()
        begin = time.monotonic()
        try:
            if self.left() < self.least:
                entry.update(status="not reached", reason="no time left")
            else:
                body(entry)
        except Stopped as stopped:
            entry.update(status="failed", reason=str(stopped))
            raise
        except Exception:  # the steps behind it can still find something
            text = traceback.format_exc(limit=-3)
            entry.update(status="failed", reason=text.strip().splitlines()[-1], output=text)
        finally:
            seconds = entry["seconds"] = round(time.monotonic() - begin, 1)
            self.write()
            print(f"{name}: {entry['status']}, {seconds} s {entry.get('reason', '')}", flush=True)
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
                start_new_session=True,  # one group, which `end` ends
            )
            try:
                status = self._wait(process, seconds + GRACE, tick)
            except BaseException:
                end(process)
                raise
            finally:
                self.output = log.read_text(errors="replace")
                log.unlink()
        return status, self.output

    def _wait(self, process: subprocess.Popen, seconds: float, tick) -> int:
        until = time.monotonic() + seconds
        while True:
            with suppress(subprocess.TimeoutExpired):
                return process.wait(timeout=POLL)
            if time.monotonic() > until:  # it hangs in the driver, say, where no signal reaches it
                end(process)
                return 137
            if tick:
                tick()
            self.waiting()

    def finish(self, status: int) -> int:
        self.write()
        print(f"{self.record['summary']}\nrecord: {self.path}", flush=True)
        return status


def end(process: subprocess.Popen) -> None:
    """Ends the group of a child, which may want to write down what it has."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=4)


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


def find_program(name: str) -> str | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    folders = f"{home}/bin:{home}/{name}"
    return shutil.which(name) or shutil.which(name, path=folders)


def end_of(text: str) -> str:
    return text[-3000:]


def outcome(status: int) -> str:
    return "ran out of time" if status in (124, 137) else f"ended with status {status}"


def summarize(run: Run) -> int:
    """The exit status, and one line of words."""
    by_status: dict[str, list[str]] = {}
    for name, entry in run.record["steps"].items():
        by_status.setdefault(entry["status"], []).append(name)
    bad = [n for s, names in by_status.items() if s not in ("passed", "missing") for n in names]
    run.record.update(
        complete="not reached" not in by_status,
        passed=not bad,
        missing=by_status.get("missing", []),
        summary="; ".join(f"{status}: {', '.join(names)}" for status, names in by_status.items()),
    )
    return 1 if bad else 0


def stopped(run: Run, stop: Stopped) -> int:
    """What summarize does, for a run that a signal ended."""
    summarize(run)
    run.record.update(complete=False, passed=False)
    run.record["summary"] += f"; {stop}"
    return stop.status
