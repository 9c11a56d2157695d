"""Runs a build and watches the memory that its compilers take, from /proc.

What is summed is each process's own memory (anonymous pages), so shared libraries count for nobody. A
compilation is a child of ninja with all its children: nvcc runs a dozen programs, several at a time.
"""

from __future__ import annotations

import subprocess
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

SECONDS_BETWEEN_LOOKS = 0.25


@dataclass
class Compilation:
    seconds: float = 0.0
    peak_bytes: int = 0


@dataclass
class Record:
    """What a build took; `compilations` by source file."""

    status: int = 0
    seconds: float = 0.0
    peak_bytes: int = 0
    compilations: dict[str, Compilation] = field(default_factory=dict)


def run(command: list[str], environment: dict[str, str], cwd: Path) -> Record:
    """Run to the end, with output as it comes."""
    record = Record()
    start = time.monotonic()
    process = subprocess.Popen(command, env=environment, cwd=cwd)
    finished = threading.Event()
    watcher = threading.Thread(target=_watch, args=(process.pid, record, finished), daemon=True)
    watcher.start()
    try:
        record.status = process.wait()
    except KeyboardInterrupt:
        process.wait()  # the terminal has told it too
        raise
    finally:
        finished.set()
        watcher.join()
    record.seconds = time.monotonic() - start
    return record


def _watch(root: int, record: Record, finished: threading.Event) -> None:
    started: dict[int, float] = {}
    while not finished.wait(SECONDS_BETWEEN_LOOKS):
        now = time.monotonic()
        children = _children_of_all()
        total = 0
        for pid in _descendants(root, children):
            if source := _source_compiled_by(pid):
                peak = sum(map(_own_memory, [pid, *_descendants(pid, children)]))
                seconds = now - started.setdefault(pid, now)
                before = record.compilations.setdefault(source, Compilation())
                before.seconds = max(before.seconds, seconds)
                before.peak_bytes = max(before.peak_bytes, peak)
                total += peak
        record.peak_bytes = max(record.peak_bytes, total)


def _children_of_all() -> dict[int, list[int]]:
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = stat.read_text()
        except OSError:
            continue  # it has ended
        parent = int(text.rpartition(")")[2].split()[1])
        children.setdefault(parent, []).append(int(stat.parent.name))
    return children


def _descendants(root: int, children: dict[int, list[int]]) -> list[int]:
    found = list(children.get(root, ()))
    for pid in found:
        found += children.get(pid, ())
    return found


def _source_compiled_by(pid: int) -> str | None:
    """The source file, where `pid` is the shell or the compiler driver that ninja started for it."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")
        parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        by_ninja = Path(f"/proc/{parent}/comm").read_text().strip() == "ninja"
    except OSError:
        return None
    # The command of a shell is one word, in which paths with spaces are quoted.
    words = [part.strip("'\"") for word in words for part in word.split()]
    sources = [word for word in words if word.endswith((".cpp", ".cu"))]
    return sources[-1].rpartition("/csrc/")[2] if by_ninja and sources else None


def _own_memory(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))
