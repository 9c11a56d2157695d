"""Every figure of the README stands in a record: the markers that say where, and their check.

A marker is an HTML comment behind the text that quotes the figure, on the same line or on a line of
its own below it (below a table: below its last row, several in a row if need be):

    The operator is 12.3 times as fast <!-- record: results/cpu.json#ROW:ratio=12.3 -->

The file is relative to benchmarks/, ROW the id of a row, then a field of it, then the figure as the
text has it. The figure must stand in the paragraph or table before the marker, and must equal the
record's value rounded to as many digits as are quoted. Other parts of a record are found by their
path (`#machine:threads=2`). A divisor behind the field changes the unit (`#ceilings:copy/1e9=24.7`).
In a .jsonl file of the recall experiments ROW is the id of a cell.
Markers inside ``` fences are examples; figures inside them may be quoted.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from decimal import ROUND_HALF_EVEN, Decimal, InvalidOperation
from pathlib import Path

MARKER = re.compile(r"<!--\s*record:\s*(?P<body>.*?)\s*-->", re.DOTALL)
FENCE = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
BODY = re.compile(
    r"(?P<file>[^#\s]+)#(?P<key>\S+?):(?P<field>\w+)(?:/(?P<unit>[\d.e+]+))?=(?P<figure>[\d.,-]+)$"
)


@dataclass(frozen=True)
class Quote:
    """One figure and where it is said to come from."""

    file: str
    key: str
    field: str
    unit: Decimal
    figure: str
    before: str  # the paragraph or table in front of the marker


def quotes(text: str) -> tuple[list[Quote], list[str]]:
    """All markers of a text, and a line about each that cannot be read."""
    found, problems = [], []
    fences = [match.span() for match in FENCE.finditer(text)]
    for match in MARKER.finditer(text):
        if any(begin < match.start() < end for begin, end in fences):
            continue  # an example
        body = BODY.match(match["body"])
        if body is None:
            problems.append(f"not a marker: {match[0]}")
            continue
        unit = Decimal(body["unit"] or 1)
        before = _paragraph(text[: match.start()])
        found.append(Quote(body["file"], body["key"], body["field"], unit, body["figure"], before))
    return found, problems


def _paragraph(text: str) -> str:
    """What a reader sees just before: the last block that is more than markers."""
    blocks = [MARKER.sub("", block).strip() for block in re.split(r"\n\s*\n", text)]
    visible = [block for block in blocks if block]
    return visible[-1] if visible else ""


def check(text: str, folder: Path) -> list[str]:
    """One line per figure that its record does not bear out. folder: that of the records' paths."""
    found, problems = quotes(text)
    for quote in found:
        problem = _check_one(quote, folder)
        if problem:
            problems.append(f"{quote.file}#{quote.key}:{quote.field}={quote.figure}: {problem}")
    return problems


def _check_one(quote: Quote, folder: Path) -> str | None:
    number = re.compile(rf"(?<![\d.,]){re.escape(quote.figure)}(?![\d]|[.,]\d)")
    if not number.search(quote.before):
        return f"{quote.figure} does not stand in the text before the marker"
    try:
        record = _read(folder / quote.file)
    except (OSError, ValueError) as error:
        return f"no such record ({type(error).__name__})"
    node = _find(record, quote.key)
    if not isinstance(node, dict) or quote.field not in node:
        return "no such entry in the record"
    try:
        value = Decimal(str(node[quote.field])) / quote.unit
        figure = Decimal(quote.figure.replace(",", ""))
    except InvalidOperation:
        return f"the record has {node[quote.field]!r}, which is no number"
    if value.quantize(figure, rounding=ROUND_HALF_EVEN) != figure:
        return f"the record has {value}"
    return None


def _read(path: Path) -> dict:
    """A record, or the finished cells of the recall experiments: one line each behind a head."""
    text = path.read_text()
    if path.suffix != ".jsonl":
        return json.loads(text)
    cells = [json.loads(line) for line in text.splitlines()[1:]]
    return {"rows": {cell["id"]: cell["result"] for cell in cells}}


def _find(record: dict, key: str):
    """A row by its id, or anything by its path with slashes."""
    rows = record.get("rows")
    if isinstance(rows, dict) and key in rows:
        return rows[key]
    node = record
    for part in key.split("/"):
        node = node.get(part) if isinstance(node, dict) else None
    return node
