"""The benchmarks of JRT at toy size: records are whole, resumable, and say what was run."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from benchmarks import records
from benchmarks.kernels import prefill
from benchmarks.recall import set_disjointness
from resona_ext.jrt import LayerStates


@pytest.fixture(autouse=True)
def _one_thread(threads):
    threads(1)


@pytest.fixture
def tiny(monkeypatch):
    sweep = set_disjointness.Sweep(
        16, (8,), (2,), set_disjointness.both((1, 2)), ((2, 3),), 20, 4, 12, 1e-2, reduced=True
    )
    monkeypatch.setitem(set_disjointness.PRESETS, "cpu", sweep)
    return sweep


def test_prefill_record(tmp_path, threads, capsys):
    arguments = (
        "--lengths 64,130 --heads 2 --seconds 0 --threads 1 --processor-time --device cpu --out"
    )
    assert prefill.main([*arguments.split(), str(tmp_path / "p")]) == 0
    record = json.loads((tmp_path / "p.json").read_text())
    assert record["complete"] and record["machine"]["threads"] == 1
    names = ("jrt-rnn", "jrt-prompt", "sdpa", "jrt-rnn-layer", "attention-layer")
    assert list(record["rows"]) == [f"{name}/{n}" for n in (64, 130) for name in names]
    for row in record["rows"].values():
        assert (row["status"], row["method"], row["dtype"]) == ("ok", "processor", "float32")
    ours, anchor = (record["rows"][f"{name}/64"] for name in ("jrt-rnn", "sdpa"))
    assert ours["ratio"] == pytest.approx(anchor["median_ms"] / ours["median_ms"], rel=0.05)
    assert ours["paper_ratio"] == 19.2 and anchor["ratio"] == 1
    assert set(record["baselines"]) == {"flash-attn", "fla-based", "fla-linear"}
    assert (tmp_path / "p.png").stat().st_size > 1000


def test_prefill_checks_before_it_times(monkeypatch):
    shape = prefill.Shape(1, 2, 40, torch.float32, "cpu")
    wrong = prefill._linear("jrt-rnn", shape, 40, 20)
    assert wrong.check(wrong.call()) < 1e-5
    assert wrong.check(wrong.call() * 1.01) > 1e-3


@pytest.mark.parametrize("arguments", ["--processor-time", "--processor-time --threads 2"])
def test_processor_time_is_that_of_one_thread(arguments, threads, capsys):
    with pytest.raises(SystemExit):
        prefill.main([*arguments.split(), "--device", "cpu", "--out", "x"])
    assert "--processor-time: expected --device cpu --threads 1" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_prefill_on_cuda_says_what_is_missing(capsys):
    with pytest.raises(SystemExit):
        prefill.main(["--device", "cuda", "--out", "x"])
    error = capsys.readouterr().err
    assert "--device cuda: " in error
    assert "has no CUDA kernels" in error or "torch sees no GPU" in error


def test_the_state_is_counted_right(tiny):
    cell = set_disjointness.Cell("causal", 8, 2, 0)
    model, states = set_disjointness.build(cell, tiny), LayerStates()
    model(torch.zeros(1, 5, dtype=torch.long), None, states)
    held = sum(t.numel() for layer in states.states for t in layer.get("recurrent_state", ()))
    assert set_disjointness.state_elements(cell, tiny) == held


def test_both_kinds_of_model_have_the_same_state_and_see_what_they_should(tiny):
    tokens = torch.randint(4, 16, (1, 6))
    other = tokens.clone()
    other[0, 5] = (other[0, 5] - 3) % 12 + 4
    for kind, sees_ahead in (("causal", False), ("prefix", True)):
        model = set_disjointness.build(set_disjointness.Cell(kind, 8, 2, 0), tiny)
        assert bool((model(tokens)[0, 0] != model(other)[0, 0]).any()) == sees_ahead


def test_a_cell_is_the_same_whenever_it_runs(tiny):
    cell = set_disjointness.Cell("prefix", 8, 2, 0)
    first, second = (set_disjointness.train(cell, tiny) for _ in range(2))
    assert {**first, "cpu_seconds": 0} == {**second, "cpu_seconds": 0}
    assert {"accuracy_1_2", "accuracy_2_1", "accuracy_2_3"} <= set(first)


def test_a_sweep_goes_on_where_it_ended(tiny, tmp_path):
    path = tmp_path / "s.json"
    row = {"kind": "causal", "state": 5, "accuracy_1_2": 0.5, "accuracy_2_1": 0.25}
    done = {cell.id: {**row, "kind": cell.kind} for cell in set_disjointness.cells(tiny, 1)}
    settings = json.loads(json.dumps(dataclasses.asdict(tiny)))
    path.write_text(json.dumps({"machine": {}, "sweep": settings, "rows": done}))
    assert set_disjointness.main(["--out", str(tmp_path / "s")]) == 0  # nothing was left to train
    record = json.loads(path.read_text())
    assert record["complete"] and record["rows"] == done
    assert (tmp_path / "s.png").stat().st_size > 1000


def test_every_figure_of_the_documentation_stands_in_a_record():
    root = Path(__file__).parents[1]
    text = (root / "docs" / "jrt.md").read_text()
    assert records.quotes(text)[0] and records.check(text, root / "benchmarks") == []
