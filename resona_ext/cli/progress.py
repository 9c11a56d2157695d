"""A progress bar: redrawn in place on a terminal, a line per quarter elsewhere (logs, CI)."""

from __future__ import annotations

import sys
import time
from typing import TextIO

WIDTH = 24
QUARTERS = 4


class ProgressBar:
    def __init__(self, label: str, total: int, stream: TextIO | None = None):
        self.label, self.total = label, total
        self.stream = sys.stderr if stream is None else stream
        self.start = time.perf_counter()
        self.quarters_told = 0
        self.drawn = 0  # characters on the terminal's line, to be overwritten

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.start

    def update(self, done: int, note: str = "") -> None:
        filled = WIDTH * done // self.total
        bar = "#" * filled + "." * (WIDTH - filled)
        line = f"{self.label} [{bar}] {done}/{self.total}  {self.seconds:.0f} s  {note}".rstrip()
        last = done == self.total
        if self.stream.isatty():
            self.stream.write("\r" + line.ljust(self.drawn) + ("\n" if last else ""))
            self.drawn = len(line)
        elif QUARTERS * done // self.total > self.quarters_told:
            self.quarters_told = QUARTERS * done // self.total
            self.stream.write(line + "\n")
        self.stream.flush()
