"""The order of gpu_record.sh's steps and what is kept of them; imports no torch. gpu_steps.py has the steps.

Every step is a process of its own with a bound in seconds. OUT/record.json says what became of each, and
OUT/NAME.json is what the step found. A step that is finished is not run again; the others are, those that no
call has tried yet before those that failed.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

from gpu_run import ROOT, Run, Stopped, stop_on_signals, stopped, summarize
from gpu_smoke import NO_DEVICE
from gpu_steps import FINISHED, STEPS, Step, bodies

SHOWN = 2500  # characters of a step's output
PACKED_EVERY = 20  # seconds


class Bundle:
    """The records of a folder as one file, which is whole at any time."""

    def __init__(self, path: Path, folder: Path):
        self.path, self.folder = path, folder
        self.packed = time.monotonic()

    def refresh(self) -> None:
        if time.monotonic() - self.packed >= PACKED_EVERY:
            self.pack()

    def pack(self) -> None:
        part = self.path.with_name(self.path.name + ".part")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with tarfile.open(part, "w:gz") as tar:
                for file in sorted(self.folder.glob("*.json")):
                    self._add(tar, file)
            os.replace(part, self.path)
        except OSError as error:  # what is measured is still in the folder
            print(f"--bundle {self.path}: {error}", flush=True)
        self.packed = time.monotonic()

    @staticmethod
    def _add(tar: tarfile.TarFile, file: Path) -> None:
        """Read first: another file may take its place meanwhile."""
        data = file.read_bytes()
        about = tarfile.TarInfo(file.name)
        about.size, about.mtime = len(data), int(time.time())
        tar.addfile(about, io.BytesIO(data))


class Record(Run):
    """Goes on with an earlier record, shows the end of what each step printed, and keeps the bundle."""

    program = "benchmarks/gpu_record.sh"
    least = 15

    def __init__(self, options: argparse.Namespace):
        super().__init__(options)
        self.bundle = Bundle(options.bundle, self.path.parent) if options.bundle else None
        self.record["steps"].update(earlier(self.path))

    def waiting(self) -> None:
        if self.bundle:
            self.bundle.refresh()

    def step(self, name: str, body: Callable[[dict], None]) -> dict:
        before = self.record["steps"].get(name, {})
        if before.get("attempts") and self.left() < self.least:
            print(f"{name}: {before['status']} before, no time left to run it again", flush=True)
            return before

        def counted(entry: dict) -> None:
            entry.update(attempts=before.get("attempts", 0) + 1, commit=self.record["commit"])
            self.write()
            body(entry)

        try:
            return super().step(name, counted)
        finally:
            if self.output:
                print(self.output[-SHOWN:].rstrip(), flush=True)
            if self.bundle:
                self.bundle.pack()

    def finish(self, status: int) -> int:
        status = super().finish(status)
        if self.bundle:
            self.bundle.pack()
        return status


def earlier(path: Path) -> dict:
    """The entries of an earlier call; one that was killed could not say what became of its step."""
    steps = json.loads(path.read_text())["steps"] if path.exists() else {}
    for entry in steps.values():
        if entry["status"] == "under way":
            entry.update(status="failed", reason="the call ended in it")
        if entry["status"] != "not reached":
            entry.setdefault("attempts", 1)
    return steps


def order(wanted: list[str], before: dict, again: bool) -> list[str]:
    """What is to be done, what was tried least first."""
    todo = [step.name for step in STEPS if step.name in wanted]
    if again:
        return todo
    todo = [name for name in todo if before.get(name, {}).get("status") not in FINISHED]
    return sorted(todo, key=lambda name: before.get(name, {}).get("attempts", 0))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    def line(step: Step) -> str:
        return f"  {step.name:<14}{step.what}, at most {step.seconds} s"

    parser = argparse.ArgumentParser(
        prog="benchmarks/gpu_record.sh",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="steps, in this order:\n" + "\n".join(map(line, STEPS)),
    )
    names = [step.name for step in STEPS]
    add = parser.add_argument
    add("--out", type=Path, default=ROOT / "build" / "gpu-record", help="folder of the records")
    add(
        "--bundle",
        type=Path,
        metavar="PATH.tar.gz",
        help="all records in one file, kept up to date",
    )
    add("--seconds", type=float, default=540, help="for the whole call (default: %(default)s)")
    add("--steps", default=",".join(names), help="only these (default: all)")
    add("--again", action="store_true", help="run these steps anew, finished or not")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a dry run, tiny shapes")
    add("--nsa", type=Path, help="checkout of native-sparse-attention-triton")
    add("--flashmoba", type=Path, help="checkout of flash-moba, built")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.steps.split(",") if name not in names]
    if unknown:
        parser.error(f"--steps: expected some of {', '.join(names)}, got {', '.join(unknown)}")
    return options


def run_steps(run: Record, out: Path) -> int:
    before, again = run.record["steps"], run.options.again
    todo = order(run.options.steps.split(","), before, again)
    body = bodies(run, out)
    for name in todo:
        entry = run.step(name, body[name])
        if name == "smoke" and entry.get("exit") == NO_DEVICE:  # nothing else stops the others
            summarize(run)
            return NO_DEVICE
    return summarize(run)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    out, options.out = options.out, options.out / "record.json"
    run = Record(options)
    stop_on_signals()
    try:
        status = run_steps(run, out)
    except Stopped as stop:
        status = stopped(run, stop)
    return run.finish(status)


if __name__ == "__main__":
    sys.exit(main())
