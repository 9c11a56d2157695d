"""The recall experiments: cells and grids, the model, training that resumes, the store and the report.

What the figures are is not tested here: the records hold them.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from benchmarks.recall import __main__ as cli
from benchmarks.recall import config, model, paper, store, train
from benchmarks.recall.backbones import BACKBONES
from benchmarks.recall.tasks import FEWER_EXAMPLES, IGNORED, TASKS
from resona_ext import Resona
from resona_ext.cli.errors import CliError

TINY = {
    "task": {"name": "mqar", "vocabulary": 64, "length": 16, "pairs": 2},
    "backbone": "baseconv",
    "width": 16,
    "layers": 2,
    "branch": {"kind": "resona", "options": {"chunk_size": 2, "top_k": 1}},
    "training": {
        "examples": 40,
        "steps": 12,
        "batch": 8,
        "test_examples": 20,
        "held_out": 10,
        "evaluate_every": 5,
    },
}


@pytest.fixture(autouse=True)
def one_thread():
    """Models this small only lose by threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def cell(**changes) -> config.Cell:
    return config.make_cell(config.merge(TINY, changes))


# --- cells and grids ------------------------------------------------------------------------------


def test_a_list_is_an_axis_and_the_first_varies_slowest():
    entry = {"width": [1, 2], "branch": [{"kind": "none"}, {"kind": "resona", "layer": [0, 1]}]}
    assert config.expand(entry) == [
        {"width": width, "branch": branch}
        for width in (1, 2)
        for branch in (
            {"kind": "none"},
            {"kind": "resona", "layer": 0},
            {"kind": "resona", "layer": 1},
        )
    ]


def test_lists_of_test_settings_are_no_axes():
    entry = {"training": {"at": {"top_k": [1, 2]}}}
    assert config.expand(entry) == [entry]


def test_merging_keeps_what_is_not_named_but_a_new_task_starts_anew():
    merged = config.merge(TINY, {"task": {"pairs": 4}, "training": {"steps": 3}})
    assert merged["task"] == {**TINY["task"], "pairs": 4}
    assert merged["training"] == {**TINY["training"], "steps": 3}
    assert config.merge(TINY, {"task": {"name": "niah"}})["task"] == {"name": "niah"}


def test_equal_cells_have_equal_names():
    assert cell().id == cell().id != cell(seed=1).id
    assert config.cell_from_json(json.loads(json.dumps(asdict(cell())))) == cell()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbone": "mambo"}, "backbone: expected one of mamba2, .*, got 'mambo'"),
        ({"branch": {"kind": "resonance"}}, "branch.kind: expected one of none, .* 'resonance'"),
        ({"branch": {"layer": 2}}, 'branch.layer: expected 0 to 1 or "spread", got 2'),
        ({"branch": {"deep": 2}}, "branch.deep: unknown setting, expected kind, layer"),
        ({"training": {"steps": 0}}, "training.steps: expected at least 1, got 0"),
        ({"training": {"examples": 0}}, "training.examples: expected at least 1 or null, got 0"),
        ({"heads": 3}, "heads: expected a divisor of width 16, got 3"),
        ({"task": {"pairs": 5}}, "mqar: pairs must be 1 to length / 4 = 4, got 5"),
        ({"depth": 5}, "depth: unknown setting"),
    ],
)
def test_wrong_cells_are_one_line(changes, message):
    with pytest.raises(CliError, match=message) as caught:
        cell(**changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "expected an object"),
        ('{"cells": []}', "'suite' is missing"),
        ('{"suite": "x", "cells": [], "grid": 1}', "unknown entry 'grid'"),
        ('{"suite": "x", "cells": [{"backbone": "gla"}]}', r"cells\[0\]: task: missing"),
    ],
)
def test_wrong_grids_are_one_line(tmp_path, text, message):
    path = tmp_path / "grid.json"
    path.write_text(text)
    with pytest.raises(CliError, match=message):
        config.read_grid(path)
    with pytest.raises(CliError, match=r"cannot read .*nowhere\.json"):
        config.read_grid(tmp_path / "nowhere.json")


@pytest.mark.parametrize("path", sorted(cli.CONFIGS.glob("*.json")), ids=lambda path: path.stem)
def test_every_grid_can_be_read(path):
    grid = config.read_grid(path)
    assert grid.cells and grid.suite == path.stem and grid.about
    if path.stem.endswith("-cpu"):
        assert grid.reduced


# --- the model ------------------------------------------------------------------------------------


def logits(made: config.Cell, tokens: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(0)
    return model.RecallModel(made).eval()(tokens, torch.ones_like(tokens, dtype=torch.bool))


def test_models_with_and_without_a_branch_start_from_one_backbone():
    states = []
    for kind in ("none", "resona", "window", "mlp"):
        torch.manual_seed(0)
        states.append(model.RecallModel(cell(branch={"kind": kind})).state_dict())
    for name, value in states[0].items():
        for state in states[1:]:
            assert torch.equal(state[name], value)


@pytest.mark.parametrize("kind", config.BRANCHES)
@pytest.mark.parametrize("layer", [0, 1, "spread"])
def test_the_model_is_causal(kind, layer):
    made = cell(branch={"kind": kind, "layer": layer})
    tokens = torch.randint(0, 64, (2, 16))
    later = tokens.clone()
    later[:, 9:] = (later[:, 9:] + 1) % 64
    first, second = (logits(made, t).unflatten(0, (2, 16))[:, :9] for t in (tokens, later))
    torch.testing.assert_close(first, second, atol=1e-5, rtol=0)


def test_spread_is_the_first_the_middle_and_the_last():
    made = cell(branch={"layer": "spread"}, layers=5)
    blocks = model.RecallModel(made).blocks
    assert [i for i, block in enumerate(blocks) if block.branch is not None] == [0, 2, 4]
    assert cell(branch={"layer": "spread"}, layers=1).branch_layers == (0,)


def test_the_window_branch_attends_to_the_last_chunks():
    torch.manual_seed(0)
    branch = model.WindowBranch(16, 1, chunk_size=3, top_k=2)
    x, e = torch.randn(2, 1, 14, 16).unbind()
    got = branch(x, e)
    for t in range(14):
        end = 3 * (t // 3)  # chunks that end at or before t
        seen = e[0, max(0, end - 6) : end]
        weight = (branch.k_proj(seen) @ branch.q_proj(x[0, t]) / 4).softmax(dim=0)
        expected = branch.o_proj(weight @ branch.v_proj(seen)) if end else torch.zeros(16)
        torch.testing.assert_close(got[0, t], expected, atol=1e-5, rtol=1e-4)


def test_the_mlp_has_the_size_of_the_branch():
    with_branch, with_mlp = (
        model.trained_parameters(model.make_branch(config.Branch(kind), 64))
        for kind in ("resona", "mlp")
    )
    assert with_branch == model.trained_parameters(Resona(64, 1))
    assert with_mlp == pytest.approx(with_branch, abs=3 * 64 / 2)


@pytest.mark.parametrize("name", [name for name in TASKS if name not in ("text", "qa")])
def test_every_task_can_be_learnt_from(name):
    """One step on one batch lowers the loss on it."""
    made = config.make_cell(
        {**TINY, "task": {"name": name}, "training": {"batch": 4, "learning_rate": 1e-3}}
    )
    made = replace(made, branch=config.Branch("resona"), embedding_std=0.02)
    run = train.Run(made, Path("unused"))
    batch = run.task.generate(4, torch.Generator().manual_seed(0))
    losses = [run._step(batch) for _ in range(4)]
    assert losses[-1] < losses[0]


# --- training -------------------------------------------------------------------------------------


def test_accuracies_of_known_answers(monkeypatch, tmp_path):
    """Two rows of two answers: one right in the first row, both in the second."""
    run = train.Run(cell(), tmp_path)
    labels = torch.full((2, 4), IGNORED)
    labels[:, 1:3] = torch.tensor([[5, 6], [5, 7]])
    batch = train.Batch(torch.zeros_like(labels), labels, labels)
    said = torch.nn.functional.one_hot(torch.tensor([5, 9, 5, 7]), 64)
    monkeypatch.setattr(run, "model", torch.nn.Module())
    monkeypatch.setattr(run.model, "forward", lambda tokens, wanted: said.float())
    # The right token has logit 1 among 64, or 0 with another at 1.
    log_sum = math.log(math.e + 63)
    perplexity = math.exp((3 * (log_sum - 1) + log_sum) / 4)
    # By class: 5 right both times, 6 never, 7 once, 9 only ever answered.
    assert run.evaluate(batch) == pytest.approx((3 / 4, 1 / 2, 2 / 4, perplexity))


@pytest.mark.parametrize("examples", [40, None])
def test_an_interrupted_run_goes_on_to_the_same_end(tmp_path, monkeypatch, examples):
    made = cell(training={"examples": examples}, dropout=0.2)
    whole = train.Run(made, tmp_path / "a").train()

    monkeypatch.setattr(train, "CHECKPOINT_SECONDS", 0.0)
    interrupted = train.Run(made, tmp_path / "b")
    step, taken = interrupted._step, []

    def stop_at_seven(batch):
        if len(taken) == 7:
            raise KeyboardInterrupt
        taken.append(batch)
        return step(batch)

    monkeypatch.setattr(interrupted, "_step", stop_at_seven)
    with pytest.raises(KeyboardInterrupt):
        interrupted.train()
    resumed = train.Run(made, tmp_path / "b")
    result = resumed.train()
    for name in ("curve", "token", "exact", "macro", "steps"):
        assert result[name] == whole[name]
    assert result["steps"] == 12 and [point[0] for point in result["curve"]] == [0, 5, 10]
    assert not resumed.checkpoint.exists()


def test_a_run_ends_where_it_is_good_enough(tmp_path):
    result = train.Run(cell(training={"stop_at": 0.0}), tmp_path).train()
    assert result["steps"] == 0 and len(result["curve"]) == 1


def test_knobs_are_tested_and_put_back(tmp_path):
    run = train.Run(cell(training={"steps": 1, "at": {"top_k": [1, 4], "alpha": [0.5]}}), tmp_path)
    result = run.train()
    assert list(result["at"]) == ["top_k=1", "top_k=4", "alpha=0.5"]
    assert result["at"]["top_k=1"]["token"] == result["token"]
    assert run.model.branches[0].top_k == 1


def test_training_and_test_data_are_apart_and_fixed(tmp_path):
    made = cell()
    first, again = (train.make_data(made.make_task(), made) for _ in range(2))
    assert torch.equal(first.training.tokens, again.training.tokens)
    assert not torch.equal(first.test.tokens[:10], first.held_out.tokens)
    assert not torch.equal(first.test.tokens[:10], first.training.tokens[:10])


def test_an_epoch_shows_every_example_once(tmp_path):
    made = cell()
    task = made.make_task()
    data = train.make_data(task, made)
    source = train.batches(task, made, data)
    for _ in range(2):
        seen = torch.cat([next(source).tokens for _ in range(5)])
        assert torch.equal(seen.unique(dim=0), data.training.tokens.unique(dim=0))


# --- the store and the command line ---------------------------------------------------------------


@pytest.fixture
def grid_file(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(cli, "BUILD", tmp_path / "build")
    path = tmp_path / "tiny.json"
    axes = {"branch": [{"kind": "none"}, {"kind": "resona"}], "seed": [0, 1]}
    defaults = config.merge(TINY, {"training": {"steps": 2}})
    grid = {"suite": "tiny", "about": "a test", "reduced": ["everything"], "defaults": defaults}
    path.write_text(json.dumps({**grid, "cells": [axes]}))
    return path


def test_a_grid_runs_once_and_is_reported(grid_file, tmp_path, capsys):
    output, plots = tmp_path / "out.jsonl", tmp_path / "plots"
    arguments = ["run", str(grid_file), "--output", str(output)]
    assert cli.main([*arguments, "--shard", "2/2"]) == 0
    assert "2 cells to run of 4" in capsys.readouterr().out
    assert cli.main([*arguments, "--minutes", "0"]) == 0
    assert "2 cells to run of 4" in (out := capsys.readouterr().out) and "2 cells are left" in out
    assert cli.main(arguments) == 0
    assert "2 cells to run of 4" in capsys.readouterr().out
    assert cli.main(arguments) == 0
    assert "0 cells to run of 4" in capsys.readouterr().out
    _, rows = store.read(output)
    assert len({row["id"] for row in rows}) == 4

    assert cli.main(["report", str(output), "--plots", str(plots)]) == 0
    out = capsys.readouterr().out
    assert "- everything" in out and "seeds [0, 1]" in out and "±" in out
    assert "below 0.99 with Resona:" in out and "With Resona 0 of 1 cells reach 0.99." in out
    assert (plots / "tiny.png").stat().st_size > 10_000


def test_a_missing_backbone_is_named_and_the_grid_goes_on(grid_file, tmp_path, capsys, monkeypatch):
    absent = replace(BACKBONES["baseconv"], missing=lambda device: "conv_lib cannot be imported")
    monkeypatch.setitem(BACKBONES, "baseconv", absent)
    assert cli.main(["run", str(grid_file), "--output", str(tmp_path / "out.jsonl")]) == 0
    assert capsys.readouterr().out.count("skipped, conv_lib cannot be imported") == 4


def test_a_cell_that_fails_is_named_and_the_grid_goes_on(grid_file, tmp_path, capsys, monkeypatch):
    train_one, calls = train.Run.turns, []

    def fail_first(self):
        calls.append(self)
        if len(calls) == 1:
            raise RuntimeError("out of memory\ntried hard")
        return train_one(self)

    monkeypatch.setattr(train.Run, "turns", fail_first)
    assert cli.main(["run", str(grid_file), "--output", str(tmp_path / "out.jsonl")]) == 1
    captured = capsys.readouterr()
    assert "failed, out of memory\n" in captured.err and "[4/4]" in captured.out


def test_a_single_cell_from_flags(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cli, "BUILD", tmp_path)
    flags = ["--backbone", "baseconv", "--width", "16", "--layers", "1", "--top-k", "2"]
    flags += ["--set", "task.length=16", "--set", "task.pairs=2", "--set", "task.vocabulary=64"]
    flags += ["--set", "training.steps=1", "--set", "training.examples=null"]
    assert cli.main(["mqar", *flags]) == 0
    assert "token 0." in capsys.readouterr().out
    _, rows = store.read(tmp_path / "single.jsonl")
    assert rows[0]["cell"]["branch"]["options"]["top_k"] == 2
    assert rows[0]["result"]["branch_parameters"] == 5 * 16**2 + 16


@pytest.mark.parametrize(("flags", "count"), [([], 6), (["--sweep"], 66)])
def test_mad_is_its_six_tasks_and_their_sweeps(flags, count):
    """The order of the paper; the sweep asks for no less than the grid of its table."""
    arguments = ["mad", "--backbone", "hyena", "--set", "training.steps=7", *flags]
    cells = cli.single(cli.build_parser().parse_args(arguments)).cells
    assert len({made.id for made in cells}) == len(cells) == count
    assert tuple(dict.fromkeys(made.task["name"] for made in cells)) == paper.MAD_TASKS
    assert {made.training.steps for made in cells} == {7}
    grid = config.read_grid(cli.CONFIGS / "mad-table1.json")
    of_grid = {json.dumps([made.task, _examples(made)], sort_keys=True) for made in grid.cells}
    ours = {json.dumps([made.task, _examples(made)], sort_keys=True) for made in cells}
    assert ours <= of_grid and (count < 66 or ours == of_grid)


def _examples(made: config.Cell) -> int | None:
    """The training examples of a cell whose sweep is about them."""
    examples = made.training.examples
    return examples if examples in FEWER_EXAMPLES["examples"] else None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "mqar-gpu"], "no grid 'mqar-gpu', expected a .json file or one of .*mqar-cpu"),
        (["mqar", "--set", "task.pairs=99"], "mqar: pairs must be 1 to length / 4 = 16, got 99"),
        (["mqar", "--set", "steps"], "--set steps: expected PATH=JSON"),
        (["mqar", "--layer", "2"], 'branch.layer: expected 0 to 1 or "spread", got 2'),
        (
            ["run", "mqar-cpu", "--shard", "3/2"],
            "--shard: expected I/N with 1 <= I <= N, got '3/2'",
        ),
        (["mqar", "--threads", "0"], "--threads: expected at least 1, got 0"),
        (["run", "mqar-cpu", "--together", "0"], "--together: expected at least 1, got 0"),
        (["report", "nowhere.jsonl"], "cannot read nowhere.jsonl"),
    ],
)
def test_wrong_arguments_are_one_line(arguments, message, capsys):
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and captured.err.startswith("benchmarks.recall: error: ")
    assert re.search(message, captured.err)


def test_a_results_file_of_another_suite_is_refused(grid_file, tmp_path, capsys):
    output = tmp_path / "out.jsonl"
    output.write_text(json.dumps({"schema": 1, "suite": "other"}) + "\n")
    before = output.read_bytes()
    assert cli.main(["run", str(grid_file), "--output", str(output)]) == 2
    assert "holds results of the suite 'other', expected 'tiny'" in capsys.readouterr().err
    assert output.read_bytes() == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is no results file"),
        ('{"a": 1}\n', "is no results file"),
        ('{"schema": 1, "suite": "x"}\n{"id"\n', "line 2 is not JSON"),
    ],
)
def test_what_is_no_results_file_is_one_line(tmp_path, text, message):
    path = tmp_path / "x.jsonl"
    path.write_text(text)
    with pytest.raises(CliError, match=message):
        store.read(path)


def test_list_names_tasks_backbones_and_grids(capsys):
    assert cli.main(["list"]) == 0
    out = capsys.readouterr().out
    for name in (*TASKS, *BACKBONES, "mqar-cpu"):
        assert f"  {name} " in out
