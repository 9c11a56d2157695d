"""Figures in texts stand in a record, and records are whole.

Nothing here looks at a time: these machines are shared and slow, and times belong in records.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import records

ROOT = Path(__file__).resolve().parents[1]

ROW = "fused/random/float32/L65536/S64k8/B1H4x4D64R1E64/sdpa"


@pytest.fixture
def folder(tmp_path) -> Path:
    record = {
        "machine": {"threads": 2},
        "ceilings": {"copy": 24.7e9},
        "rows": {ROW: {"ratio": 12.3456, "median_ms": 1234.5}},
    }
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "cpu.json").write_text(json.dumps(record))
    cells = [{"schema": 1, "suite": "x"}, {"id": "4ee25375850d", "result": {"token": 0.9963}}]
    (tmp_path / "results" / "cells.jsonl").write_text("".join(json.dumps(c) + "\n" for c in cells))
    return tmp_path


def marker(
    figure: str, field: str = "ratio", key: str = ROW, file: str = "results/cpu.json"
) -> str:
    return f"<!-- record: {file}#{key}:{field}={figure} -->"


@pytest.mark.parametrize(
    "text",
    [
        f"It is 12.3 times as fast. {marker('12.3')}",
        f"It is 12x as fast.\n{marker('12')}",
        f"| time | ratio |\n|---|---|\n| 1,234 ms | 12.35x |\n\n{marker('12.35')}\n\n"
        f"{marker('1,234', 'median_ms')}",
        f"On 2 threads. {marker('2', 'threads', 'machine')}",
        f"It copies 24.7 GB/s. {marker('24.7', 'copy/1e9', 'ceilings')}",
        f"It recalls 0.996. {marker('0.996', 'token', '4ee25375850d', 'results/cells.jsonl')}",
        "No figure, no marker.",
        f"```\nan example {marker('99')}\n```",
        f"```\nresona 12.3x\n```\n{marker('12.3')}",
    ],
)
def test_figures_that_stand_in_a_record_pass(text, folder):
    assert records.check(text, folder) == []


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (f"It is 12.4 times as fast. {marker('12.4')}", "the record has 12.3456"),
        (f"It is 12.30 times as fast. {marker('12.30')}", "the record has 12.3456"),
        (f"It is 15 times as fast. {marker('12.3')}", "does not stand in the text"),
        (f"It is 112.3 times as fast. {marker('12.3')}", "does not stand in the text"),
        (f"It is 12.31 times as fast. {marker('12.3')}", "does not stand in the text"),
        (f"12.3\n\nAnother paragraph. {marker('12.3')}", "does not stand in the text"),
        (f"12.3 {marker('12.3', file='results/gone.json')}", "no such record"),
        (f"12.3 {marker('12.3', file='results/cells.jsonl')}", "no such entry"),
        (f"12.3 {marker('12.3', field='speed')}", "no such entry"),
        (f"12.3 {marker('12.3', key='no/such/row')}", "no such entry"),
        ("12.3 <!-- record: results/cpu.json ratio 12.3 -->", "not a marker"),
    ],
)
def test_figures_that_stand_in_no_record_fail(text, problem, folder):
    (found,) = records.check(text, folder)
    assert problem in found


def test_every_marked_figure_of_the_readme_stands_in_a_record():
    for name in ("README.md", "benchmarks/README.md", "benchmarks/recall/README.md"):
        path = ROOT / name
        if path.exists():
            assert records.check(path.read_text(), ROOT / "benchmarks") == []


def test_records_in_the_repository_are_whole_and_name_no_folder():
    for path in (ROOT / "benchmarks" / "results").glob("**/*.json"):
        text = path.read_text()
        record = json.loads(text)
        assert record.get("complete", True), f"{path.name} comes from an interrupted run"
        assert "/home/" not in text and "/root/" not in text and "/tmp/" not in text, path.name
