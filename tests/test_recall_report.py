"""The report: runs that belong together, the paper's figures beside ours, and the records themselves."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest
import torch

from benchmarks.recall import __main__ as cli
from benchmarks.recall import capacity, config, paper, report, store

TINY = {
    "task": {"name": "mqar", "vocabulary": 64, "length": 16, "pairs": 2},
    "backbone": "baseconv",
    "width": 16,
    "branch": {"kind": "resona", "options": {"chunk_size": 2, "top_k": 1}},
    "training": {"examples": 40, "steps": 12, "batch": 8, "test_examples": 20, "held_out": 10}
    | {"evaluate_every": 5},
}


@pytest.fixture(autouse=True)
def _one_thread(threads):
    threads(1)


def cell(**changes) -> config.Cell:
    return config.make_cell(config.merge(TINY, changes))


def test_read_errors_are_those_of_the_states():
    """Both states written and read in loops."""
    dim, pairs = 8, 6
    got = capacity.read_errors(dim, pairs, 3, torch.Generator().manual_seed(1))
    draws = torch.randn(2, 3, pairs, dim, generator=torch.Generator().manual_seed(1))
    keys, values = torch.nn.functional.normalize(draws, dim=-1)
    errors = {"sum": [], "delta": [], "bound": []}
    for key, value in zip(keys, values, strict=True):
        hebb, delta = torch.zeros(2, dim, dim)
        for k, v in zip(key, value, strict=True):
            hebb = hebb + torch.outer(v, k)
            delta = delta + torch.outer(v - delta @ k, k)
        for i in range(pairs):
            errors["sum"].append((hebb @ key[i] - value[i]).norm().item())
            errors["delta"].append((delta @ key[i] - value[i]).norm().item())
            errors["bound"].append((key @ key[i]).abs().sum().item() - 1)
    for name, found in errors.items():
        assert got[name] == pytest.approx(sum(found) / len(found), abs=1e-5)
    assert got["sum"] <= got["bound"]
    # In 8 dimensions a value may look like another's key; in 64 none does.
    wide = capacity.read_errors(64, pairs, 3, torch.Generator().manual_seed(1))
    assert got["retrieval"] > 0 == wide["retrieval"]


def test_the_record_of_read_errors_is_what_the_command_measures(tmp_path, capsys):
    assert cli.main(["capacity", "--output", str(tmp_path)]) == 0
    assert "retrieval" in capsys.readouterr().out
    measured = json.loads((tmp_path / "capacity.json").read_text())
    recorded = json.loads((cli.RECORDS / "capacity.json").read_text())
    for name, errors in recorded["rows"].items():
        assert measured["rows"][name] == pytest.approx(errors, abs=1e-3)


def row(made: config.Cell, token: float, exact: float = 0.5) -> dict:
    result = {"token": token, "exact": exact, "macro": token, "steps": 7, "curve": [], "at": {}}
    return {"id": made.id, "cell": asdict(made), "result": result}


def test_the_best_learning_rate_counts_and_random_states_are_averaged():
    rates = {1e-3: (0.2, 0.4), 1e-2: (0.5, 0.7)}
    rows = [
        row(cell(seed=seed, training={"learning_rate": rate}), token)
        for rate, tokens in rates.items()
        for seed, token in enumerate(tokens)
    ]
    (runs,) = report.group(rows)
    assert runs.show("token") == "0.600 ±0.100"
    (other,) = runs.others
    assert other.show("token") == "0.300 ±0.100"


def test_many_branches_stand_below_each_other_with_their_hits():
    kinds = [{"kind": "none"}, {"kind": "window"}, {"kind": "mlp"}, {"layer": 0}, {"layer": 1}]
    rows = [row(cell(branch=branch), 0.5) for branch in kinds]
    rows[-1]["result"]["hit"] = 0.75
    (text,) = report.tables(report.group(rows))
    lines = text.splitlines()
    assert lines[2].endswith("hit") and len(lines) == 4 + len(kinds)
    assert lines[-1].endswith("0.750") and all(line.endswith("-") for line in lines[4:-1])


@pytest.mark.parametrize("count", [2, 6])
def test_few_branches_are_curves_and_many_are_bars(tmp_path, monkeypatch, count):
    plots = pytest.importorskip("benchmarks.recall.plots")
    pytest.importorskip("matplotlib")
    drawn = []
    for name in ("_draw_curves", "_draw_bars"):
        draw = getattr(plots, name)
        monkeypatch.setattr(plots, name, lambda *a, d=draw, n=name: (drawn.append(n), d(*a)))
    branches = [{"options": {"top_k": k}} for k in range(1, count)] + [{"kind": "none"}]
    rows = [row(cell(branch=branch, seed=seed), 0.5) for branch in branches for seed in (0, 1)]
    for one in rows[:2]:
        one["result"] |= {"hit": 0.7, "hits": [[0, 0.6], [5, 0.7]]}
    head = {"suite": "x", "about": "a test", "reduced": ["everything"]}
    plots.save(head, report.group(rows), tmp_path / "x.png")
    assert drawn == ["_draw_curves" if count == 2 else "_draw_bars"]
    assert (tmp_path / "x.png").stat().st_size > 5_000


def test_figures_of_the_paper():
    task = {"name": "mqar", "vocabulary": 8192, "length": 128, "pairs": 8}
    plain = cell(task=task, width=32, backbone="mamba2", branch={"kind": "none"})
    assert paper.figure(plain) == 0.974
    theirs = {"chunk_size": 2, "top_k": 1}
    assert paper.figure(replace(plain, branch=config.Branch("resona", options=theirs))) == 1.0
    ours = {**theirs, "key_conv": 2}
    assert paper.figure(replace(plain, branch=config.Branch("resona", options=ours))) is None
    assert paper.figure(replace(plain, branch=config.Branch("window"))) is None
    assert paper.figure(replace(plain, backbone="rwkv5", width=256)) == 0.986
    assert paper.figure(replace(plain, backbone="gla")) is None
    assert paper.figure(replace(plain, task={**task, "pairs": 4})) is None
    mad = replace(plain, task={"name": "fuzzy-recall"})
    assert paper.figure(mad) == pytest.approx(0.211)
    assert paper.figure(replace(mad, task={"name": "fuzzy-recall", "vocabulary": 32})) is None


def test_differences_name_every_cell_that_falls_short():
    task = {"name": "mqar", "vocabulary": 8192, "length": 64, "pairs": 4}
    base = cell(task=task, width=64)
    rows = [
        row(base, 0.98),
        row(replace(base, branch=config.Branch("none")), 0.40),  # 0.439 in the paper: near enough
        row(replace(base, branch=config.Branch("none"), width=32), 0.30),
    ]
    lines = report.differences(report.group(rows))
    assert len(lines) == 2
    assert "0.980 after 7 steps, 1.000 in the paper" in lines[0]
    assert "0.300 after 7 steps, 0.401 in the paper" in lines[1]


def test_records_hold_what_their_grids_ask_for():
    for path in sorted(cli.RECORDS.glob("*.jsonl")):
        head, rows = store.read(path)
        grid = config.read_grid(cli.CONFIGS / f"{head['suite']}.json")
        assert head["about"] == grid.about and head["reduced"] == list(grid.reduced)
        assert {r["id"] for r in rows} <= {made.id for made in grid.cells}
        for r in rows:
            assert config.cell_from_json(r["cell"]).id == r["id"]


def test_recorded_mqar_with_resona_reaches_what_is_claimed():
    _, rows = store.read(cli.RECORDS / "mqar-cpu.jsonl")
    with_resona = [g for g in report.group(rows) if g.cell.branch.kind == "resona"]
    assert len(with_resona) >= 4
    for runs in with_resona:
        assert runs.value("token") >= report.ENOUGH, runs.cell.label
