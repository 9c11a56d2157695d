"""Rows as text, and the one line that tells what is going on."""

from __future__ import annotations

import sys
import textwrap
import time
from typing import TextIO

HEAD = (
    f"  {'contender':<13}{'median':>11}{'min':>11}{'max':>11}{'calls':>6}{'ratio':>9}"
    f"{'GFLOP/s':>10}{'GB/s':>8}{'floor':>7}{'MiB':>9}"
)


def lines(rows: list[dict], width: int = 110) -> list[str]:
    """The rows of one case: times first, then what was left out and why."""
    timed = [row for row in rows if row["status"] == "ok"]
    text = [HEAD, *map(_line, timed)] if timed else []
    for row in timed:
        text += _wrap(_parts(row), width)
    for row in rows:
        if row["status"] in ("wrong", "error", "oom"):
            text += _wrap(f"  {row['contender']:<13}{row['status']}: {row['reason']}", width)
    left_out: dict[str, list[str]] = {}
    for row in rows:
        if row["status"] == "skipped":
            left_out.setdefault(row["reason"], []).append(row["contender"])
    for reason, names in left_out.items():
        text += _wrap(f"  skipped: {', '.join(names)} ({reason})", width)
    notes = dict.fromkeys(row["note"] for row in timed if row.get("note"))
    return text + [f"  mixer: {note}" for note in notes]


def _wrap(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, subsequent_indent=" " * 15)


def _line(row: dict) -> str:
    ratio = row.get("ratio")
    return (
        f"  {row['contender']:<13}{duration(row['median_ms']):>11}{duration(row['min_ms']):>11}"
        f"{duration(row['max_ms']):>11}{row['calls']:>6}"
        f"{'' if ratio is None else f'{ratio:.2f}x':>9}"
        f"{_number(row.get('flops_per_s'), 1e9):>10}{_number(row.get('bytes_per_s'), 1e9):>8}"
        f"{_percent(row.get('percent_of_floor')):>7}{_number(row.get('peak_mib'), 1):>9}"
    )


def _parts(row: dict) -> str:
    """Shares of the time inside the kernels, the largest first; nothing for who does not tell."""
    parts = {key[5:-3]: ms for key, ms in row.items() if key.startswith("part_")}
    ordered = sorted(parts.items(), key=lambda item: -item[1])
    total = sum(parts.values())
    shares = ", ".join(f"{name} {_percent(100 * ms / total)}" for name, ms in ordered)
    return f"  {row['contender']} spends: {shares}" if parts else ""


def duration(milliseconds: float) -> str:
    if milliseconds >= 1000:
        return f"{milliseconds / 1e3:.2f} s"
    return f"{milliseconds:.2f} ms" if milliseconds >= 0.1 else f"{milliseconds * 1e3:.1f} us"


def _number(value: float | None, unit: float) -> str:
    if value is None:
        return "-"
    return f"{value / unit:,.1f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f} %"


def ceilings(rates: dict) -> str:
    parts = []
    for name, rate in rates.items():
        unit = "GFLOP/s" if name.startswith("matmul") else "GB/s"
        known = "failed" if rate is None else f"{rate / 1e9:,.1f} {unit}"
        parts.append(f"{name.replace('_', ' ')} {known}")
    return "ceilings: " + ", ".join(parts)


class Status:
    """What is being done just now: one line on a terminal, nothing in a log."""

    INTERVAL = 0.1  # seconds between two changes of the line

    def __init__(self, total: int, stream: TextIO | None = None):
        self.total, self.done = total, 0
        self.stream = sys.stderr if stream is None else stream
        self.is_visible = self.stream.isatty()
        self.begin, self.shown, self.width = time.monotonic(), 0.0, 0

    def __call__(self, text: str) -> None:
        now = time.monotonic()
        if self.is_visible and now - self.shown >= self.INTERVAL:
            line = f"[{self.done + 1}/{self.total}] {now - self.begin:.0f} s  {text}"
            self.stream.write("\r" + line.ljust(self.width))
            self.stream.flush()
            self.shown, self.width = now, len(line)

    def clear(self) -> None:
        if self.is_visible and self.width:
            self.stream.write("\r" + " " * self.width + "\r")
            self.stream.flush()
            self.width = 0
