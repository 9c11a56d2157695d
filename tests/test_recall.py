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
from benchmarks.recall import capacity, config, model, paper, report, store, train
from benchmarks.recall.backbones import BACKBONES
from benchmarks.recall.hits import hit_rate
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


@pytest.mark.parametrize("backbone", ["baseconv", "gla", "mamba", "mamba2"])
def test_linear_maps_can_be_drawn_as_in_zoology(backbone):
    if BACKBONES[backbone].missing("cpu") is not None:
        pytest.skip(BACKBONES[backbone].missing("cpu"))
    made = cell(backbone=backbone, width=64, linear_std=0.02, layers=3)
    torch.manual_seed(0)
    drawn = model.RecallModel(made)
    torch.manual_seed(0)
    own = model.RecallModel(replace(made, linear_std=None))
    for name, module in drawn.named_modules():
        if not isinstance(module, torch.nn.Linear):
            continue
        untouched = ".branch." in name or name.startswith("head.")
        before = own.get_submodule(name)
        if untouched:
            assert module.weight.shape == before.weight.shape and ".mixer." not in name
            continue
        std = 0.02 / 6**0.5 if name.endswith((".out", ".out_proj")) else 0.02
        error = 5 * std / (2 * module.weight.numel()) ** 0.5  # five standard errors
        assert module.weight.std().item() == pytest.approx(std, abs=error)
        is_step = name.endswith(".step")
        assert module.bias is None or (module.bias.abs().max() > 0) == is_step
        if is_step:
            assert torch.equal(module.bias, before.bias)


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


def rms(x: torch.Tensor) -> torch.Tensor:
    return x / x.square().mean(dim=-1, keepdim=True).add(torch.finfo(x.dtype).eps).sqrt()


@torch.no_grad()
@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("layer", [0, 1])
def test_hits_are_those_of_a_loop(layer, top_k):
    """Every question's chunks found by hand from what the block sees."""
    made = cell(branch={"layer": layer, "options": {"top_k": top_k}}, layers=2)
    torch.manual_seed(0)
    recall_model = model.RecallModel(made).eval()
    batch = made.make_task().generate(30, torch.Generator().manual_seed(1))
    embedding = recall_model.embedding(batch.tokens)
    h = recall_model.blocks[0](embedding, embedding) if layer else embedding
    x = recall_model.blocks[layer].norm(h)
    hits = []
    for row, column in (batch.labels != IGNORED).nonzero().tolist():
        pairs = rms(embedding[row]).view(8, 2, 16).mean(dim=1)[: column // 2]
        score = torch.nn.functional.cosine_similarity(x[row, column], pairs, dim=-1)
        tokens = batch.tokens[row].view(8, 2)[score.topk(min(top_k, len(pairs))).indices]
        hits.append(bool((tokens == batch.labels[row, column]).any()))
    assert sum(hits) > 0
    rate = hit_rate(recall_model, batch, rows=7)
    assert rate == pytest.approx(sum(hits) / len(hits))


@pytest.mark.parametrize(
    "branch",
    [
        {"kind": "none"},
        {"kind": "window"},
        {"kind": "mlp"},
        {"options": {"eligibility": "inclusive"}},
    ],
)
def test_hits_of_what_does_not_search_are_none(branch):
    made = cell(branch=branch)
    batch = made.make_task().generate(2, torch.Generator())
    assert hit_rate(model.RecallModel(made), batch, rows=2) is None


def test_a_result_says_how_often_retrieval_found_the_answer(tmp_path):
    result = train.Run(cell(), tmp_path / "a").train()
    assert [step for step, _ in result["hits"]] == [point[0] for point in result["curve"]]
    assert all(0 <= rate <= 1 for rate in [*(rate for _, rate in result["hits"]), result["hit"]])
    plain = train.Run(cell(branch={"kind": "none"}), tmp_path / "b").train()
    assert plain["hit"] is None and plain["hits"] == []


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


# --- the read error of a fixed state --------------------------------------------------------------


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


# --- the report -----------------------------------------------------------------------------------


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
        assert {r["id"] for r in rows} <= {made.id for made in grid.cells}
        for r in rows:
            assert config.cell_from_json(r["cell"]).id == r["id"]


def test_recorded_mqar_with_resona_reaches_what_is_claimed():
    _, rows = store.read(cli.RECORDS / "mqar-cpu.jsonl")
    with_resona = [g for g in report.group(rows) if g.cell.branch.kind == "resona"]
    assert len(with_resona) >= 4
    for runs in with_resona:
        assert runs.value("token") >= report.ENOUGH, runs.cell.label
