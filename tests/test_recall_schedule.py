"""Several cells at once end as one by one: taking turns in a process, or in processes of their own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.recall import __main__ as cli
from benchmarks.recall import schedule, store, train
from benchmarks.recall.config import Cell, make_cell, merge

TINY = {
    "task": {"name": "mqar", "vocabulary": 64, "length": 16, "pairs": 2},
    "backbone": "baseconv",
    "width": 16,
    "dropout": 0.2,  # each run needs random numbers of its own
    "branch": {"kind": "resona", "options": {"chunk_size": 2, "top_k": 1}},
    "training": {"examples": None, "steps": 6, "batch": 8, "test_examples": 20, "held_out": 10}
    | {"evaluate_every": 2},
}
TIMES = ("seconds", "test_seconds", "together", "threads")


@pytest.fixture(autouse=True)
def _one_thread(threads):
    threads(1)


def cells(count: int = 3) -> list[Cell]:
    """Of different lengths, so that they end in another order than they begin."""
    steps = (6, 3, 5, 4)
    return [
        make_cell(merge(TINY, {"seed": n, "training": {"steps": steps[n]}})) for n in range(count)
    ]


def figures(result: dict) -> dict:
    return {name: value for name, value in result.items() if name not in TIMES}


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict[str, dict]:
    """What each cell ends with when nothing runs beside it, by its id."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("alone")
    found = {cell.id: figures(train.Run(cell, folder).train()) for cell in cells(4)}
    torch.set_num_threads(before)
    return found


@pytest.mark.parametrize("together", [1, 2, 3])
def test_taking_turns_changes_nothing(together, alone, tmp_path):
    torch.manual_seed(5)
    outside = torch.get_rng_state()
    ended = list(schedule.taking_turns(iter(cells(4)), together, tmp_path, "cpu"))
    assert {cell.id: figures(result) for cell, result in ended} == alone
    assert all(result.get("together", 1) == together for _, result in ended)
    assert torch.equal(torch.get_rng_state(), outside)
    if together == 2:  # 6 and 3 steps begin, then 5 and 4 in the place of the shorter
        assert [cell.seed for cell, _ in ended] == [1, 0, 2, 3]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_taking_turns_on_streams_changes_nothing(tmp_path):
    """Three runs on three streams, beside the same one by one; dropout draws on the GPU."""
    found = [
        {cell.id: r for cell, r in schedule.taking_turns(cells(3), n, tmp_path, "cuda")}
        for n in (1, 3)
    ]
    assert found[0].keys() == found[1].keys() == {cell.id for cell in cells(3)}
    for name, result in found[0].items():
        losses, beside = ([point[-1] for point in r["curve"]] for r in (result, found[1][name]))
        assert losses == pytest.approx(beside, rel=1e-3)  # sums on a GPU have no fixed order
        assert result["steps"] == found[1][name]["steps"]


def test_runs_do_take_turns(monkeypatch, tmp_path):
    order, step = [], train.Run._step

    def noted(self, batch):
        order.append(self.cell.seed)
        return step(self, batch)

    monkeypatch.setattr(train.Run, "_step", noted)
    list(schedule.taking_turns(cells(), 2, tmp_path, "cpu"))
    assert order[:7] == [0, 1, 0, 1, 0, 1, 0] and order.count(2) == 5


def test_processes_change_nothing(alone, tmp_path):
    """Three cells in two processes, and one whose model the process that makes it does not find."""
    task = {"name": "qa", "train": "x.json", "test": "x.json", "model": str(tmp_path / "none")}
    wrong = make_cell({"task": task, "backbone": "pretrained"})
    ended = schedule.run_cells([wrong, *cells()], 2, tmp_path, "cpu", threads=1)
    found = {cell.id: result for cell, result in ended}
    assert isinstance(found.pop(wrong.id), (ValueError, RuntimeError))
    assert {name: figures(result) for name, result in found.items()} == {
        cell.id: alone[cell.id] for cell in cells()
    }
    assert {(result["together"], result["threads"]) for result in found.values()} == {(2, 1)}


def test_one_that_fails_leaves_the_others(monkeypatch, alone, tmp_path):
    step = train.Run._step

    def fails(self, batch):
        if self.cell.seed == 1 and self.state.step == 1:
            raise RuntimeError("out of memory")
        return step(self, batch)

    monkeypatch.setattr(train.Run, "_step", fails)
    ended = {cell.seed: r for cell, r in schedule.taking_turns(cells(), 3, tmp_path, "cpu")}
    assert str(ended[1]) == "out of memory"
    for cell in (cells()[0], cells()[2]):
        assert figures(ended[cell.seed]) == alone[cell.id]


def test_an_interrupted_turn_goes_on(monkeypatch, alone, tmp_path):
    """Two runs taking turns, killed in the middle, end as if nothing had been."""
    monkeypatch.setattr(train, "CHECKPOINT_SECONDS", 0.0)
    turns = [train.Run(cell, tmp_path, has_bar=False).turns() for cell in cells(2)]
    for _ in range(3):
        assert [next(run) for run in turns] == [None, None]
    assert len(list(Path(tmp_path).glob("*.pt"))) == 2
    ended = schedule.taking_turns(cells(2), 2, tmp_path, "cpu")
    assert {cell.id: figures(r) for cell, r in ended} == {c.id: alone[c.id] for c in cells(2)}


def test_a_grid_in_company_is_stored_once(tmp_path, monkeypatch, capsys):
    """By turns, as on a GPU: of the CPU's processes the tests above see enough."""
    monkeypatch.setattr(cli, "BUILD", tmp_path)
    monkeypatch.setattr(schedule, "in_processes", lambda cells, together, folder, threads: (
        schedule.taking_turns(cells, together, folder, "cpu")))  # fmt: skip
    path, output = tmp_path / "grid.json", tmp_path / "out.jsonl"
    grid = {"suite": "company", "about": "a test", "defaults": TINY, "cells": [{"seed": [0, 1, 2]}]}
    path.write_text(json.dumps(grid))
    arguments = ["run", str(path), "--output", str(output), "--together", "2"]
    assert cli.main(arguments) == 0 and cli.main(arguments) == 0
    out = capsys.readouterr().out
    assert "3 cells to run of 3" in out and "0 cells to run of 3" in out and "[3/3]" in out
    rows = store.read(output)[1]
    assert len({row["id"] for row in rows}) == 3
    assert all(row["result"]["together"] == 2 for row in rows)
