"""The benchmark harness: its command, what it refuses, and the comparison of two commits.

Nothing here looks at a time: these machines are shared and slow, and times belong in records.
"""

from __future__ import annotations

import csv
import json
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.kernels import __main__ as cli
from benchmarks.kernels import ceilings, compare, model, operators, runner
from benchmarks.kernels.baselines import all_baselines, plain
from benchmarks.kernels.shapes import TINY

ROOT = Path(__file__).resolve().parents[1]
QUICK = "sdpa,sdpa-math,torch,gather,gather-whole"  # flex compiles for ten seconds

# --- the command ----------------------------------------------------------------------------------


def run_smoke(prefix: Path, *arguments: str) -> tuple[int, dict]:
    status = cli.main([*arguments, "--smoke", "--baselines", QUICK, "--output", str(prefix)])
    return status, json.loads(prefix.with_name(f"{prefix.name}.json").read_text())


@pytest.fixture(scope="module")
def smoke(tmp_path_factory) -> tuple[int, dict, Path]:
    prefix = tmp_path_factory.mktemp("smoke") / "run.1"
    return (*run_smoke(prefix), prefix)


def test_smoke_suite_is_right_everywhere(smoke):
    status, record, _ = smoke
    assert status == 0 and record["complete"]
    assert {row["operator"] for row in record["rows"].values()} == set(operators.OPERATORS)
    for id, row in record["rows"].items():
        assert row["status"] == "ok", f"{id}: {row['reason']}"
        assert row["error"] <= row["tolerance"]
        assert row["min_ms"] <= row["median_ms"] <= row["max_ms"]
        assert row["calls"] == 1 and row["timer"] == "wall"
        assert id == "/".join([id.rsplit("/", 1)[0], row["contender"]])


def test_smoke_record_says_what_was_measured_and_where(smoke):
    _, record, prefix = smoke
    machine = record["machine"]
    for fact in ("date", "command", "commit", "torch", "cpu", "threads", "python", "device"):
        assert machine[fact]
    assert set(record["ceilings"]) >= {"copy", "gather_memory", "gather_cache", "matmul_float32"}
    assert record["baselines"]["sdpa"] == "used"
    assert record["baselines"]["fa3"] == "not asked for"
    assert str(prefix.parent) not in json.dumps(record)
    fused = record["rows"]["fused/random/float32/L203/S8k2/B2H4x2D16R1E24/resona"]
    assert fused["ratio"] == 1
    work = sum(
        (f(replace(TINY, length=203), 4) for f in (model.pool, model.search, model.attend)),
        model.Work(),
    )
    assert fused["flops"] == work.flops
    assert fused["flops_per_s"] == pytest.approx(work.flops / fused["median_ms"] * 1e3)
    assert fused["percent_of_floor"] == pytest.approx(100 * fused["floor_ms"] / fused["median_ms"])


def test_a_call_that_cannot_be_taken_apart_keeps_its_times(tmp_path, monkeypatch):
    def failing(call, device):
        raise MemoryError("no room")

    monkeypatch.setattr(runner.parts, "measure", failing)
    status, record = run_smoke(tmp_path / "run", "pool")
    ours = [row for row in record["rows"].values() if row["contender"] == operators.OURS]
    assert status == 0 and record["complete"] and ours
    for row in ours:
        assert row["status"] == "ok" and row["median_ms"] > 0
        assert row["parts_missing"] == "MemoryError: no room"


def test_smoke_writes_csv_and_plots(smoke):
    _, record, prefix = smoke
    with open(f"{prefix}.csv") as file:
        rows = {row["id"]: row for row in csv.DictReader(file)}
    assert rows.keys() == record["rows"].keys()
    for id, row in rows.items():
        assert float(row["median_ms"]) == record["rows"][id]["median_ms"]
    for kind in ("time", "speedup", "roofline"):
        assert Path(f"{prefix}-{kind}.png").read_bytes().startswith(b"\x89PNG")
    assert not list(prefix.parent.glob("*.part"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["conv"], "unknown operator 'conv', expected some of pool, search"),
        (["--baselines", "sdpa,magic"], "--baselines: unknown 'magic', expected some of sdpa"),
        (["--dtypes", "int8"], "--dtypes: unknown 'int8'"),
        (["--patterns", "zigzag"], "--patterns: unknown 'zigzag'"),
        (["--device", "cuda"], "--device cuda: torch sees no GPU"),
        (["--baselines", "sdpa-cudnn"], "sdpa-cudnn cannot be used, needs a GPU"),
        (["--baselines", "nsa"], "nsa cannot be used, no checkout given (--nsa PATH)"),
        (["--nsa", "/no/such/tree"], "--nsa /no/such/tree: no such directory"),
        (["--max-length", "3"], "no case that fits"),
        (["--rounds", "1"], "--rounds: expected at least 2"),
        (["--threads", "0"], "--threads: expected at least 1"),
        (["--targets"], "--targets: expected alone, got --smoke too"),
        (["--compare", "no-such-commit"], "--compare no-such-commit: "),
    ],
)
def test_bad_input_gets_one_line(arguments, message, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status = cli.main(["--smoke", "--output", str(tmp_path / "x"), *arguments])
    captured = capsys.readouterr()
    assert status == 2
    assert message in captured.err and captured.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_gpu_without_cuda_kernels_gets_one_line(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda *names: False)
    assert cli.main(["--device", "cuda", "--smoke"]) == 2
    assert "--device cuda: this build of resona_ext has no CUDA kernels" in capsys.readouterr().err
    assert cli.make_plan(cli.build_parser().parse_args(["--smoke"])).device == "cpu"


def test_output_that_cannot_be_written_gets_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    status = cli.main(["pool", "--smoke", "--output", str(tmp_path / "file" / "run")])
    assert status == 2
    assert "cannot be written" in capsys.readouterr().err


def _sabotage(monkeypatch, name: str, function) -> None:
    """Replaces the forward of the baseline `gather`."""
    broken = replace(all_baselines()["gather"], name=name, build=function)
    known = all_baselines() | {name: broken}
    monkeypatch.setattr(cli, "all_baselines", lambda: known)


def _run_with(monkeypatch, tmp_path, build) -> tuple[int, dict]:
    _sabotage(monkeypatch, "odd", build)
    prefix = tmp_path / "run"
    arguments = ["attend", "--smoke", "--baselines", "sdpa,odd", "--output", str(prefix)]
    return cli.main(arguments), json.loads(Path(f"{prefix}.json").read_text())


def test_out_of_memory_stays_in_its_cell(monkeypatch, tmp_path, capsys):
    def build(case, checkouts):
        if case.dtype_name == "float32":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 TiB")
        return plain._build_gather(case, checkouts)

    status, record = _run_with(monkeypatch, tmp_path, build)
    rows = {id: row["status"] for id, row in record["rows"].items()}
    assert status == 0 and record["complete"]
    odd = {id.split("/")[2]: word for id, word in rows.items() if id.endswith("odd")}
    assert odd == {"float32": "oom", "bfloat16": "ok"}
    assert all(word == "ok" for id, word in rows.items() if not id.endswith("odd"))
    assert "oom: CUDA out of memory" in capsys.readouterr().out


def test_a_wrong_result_is_told_and_not_timed(monkeypatch, tmp_path):
    def build(case, checkouts):
        forward = plain._build_gather(case, checkouts)
        return replace(forward, function=lambda *inputs: forward.function(*inputs) * 1.1)

    status, record = _run_with(monkeypatch, tmp_path, build)
    odd = [row for id, row in record["rows"].items() if id.endswith("odd")]
    assert status == 0  # ours was right
    assert len(odd) == 2
    for row in odd:
        assert row["status"] == "wrong" and "median_ms" not in row
        assert "worst at (" in row["reason"]


def test_a_wrong_result_of_ours_fails_the_run(monkeypatch, tmp_path):
    monkeypatch.setattr(operators, "pool_chunks", lambda x, size: plain.pool(x, size) * 1.5)
    status, record = run_smoke(tmp_path / "run", "pool")
    assert status == 1
    words = {row["contender"]: row["status"] for row in record["rows"].values()}
    assert words == {"resona": "wrong", "torch": "ok"}


def test_interrupt_keeps_the_finished_cases(monkeypatch, tmp_path, capsys):
    def build(case, checkouts):
        if case.dtype_name == "bfloat16":
            raise KeyboardInterrupt
        return plain._build_gather(case, checkouts)

    status, record = _run_with(monkeypatch, tmp_path, build)
    assert status == 130
    assert not record["complete"]
    assert {row["dtype"] for row in record["rows"].values()} == {"float32"}
    assert {row["contender"] for row in record["rows"].values()} == {"resona", "sdpa", "odd"}
    assert "1 of 2 cases are finished and kept" in capsys.readouterr().out


def test_calls_foreseen_to_take_too_long_are_left_out(tmp_path):
    arguments = ["--smoke", "--baselines", "sdpa", "--output", str(tmp_path / "run"), "fused"]
    assert cli.main([*arguments, "--patience", "0", "--dtypes", "float32"]) == 0
    rows = json.loads((tmp_path / "run.json").read_text())["rows"]
    reasons = [row["reason"] for row in rows.values() if row["contender"] == "sdpa"]
    assert reasons[0].startswith("a call takes") and reasons[1].startswith("a call would take")
    assert all(row["status"] == "ok" for row in rows.values() if row["contender"] != "sdpa")

    plan = cli.make_plan(cli.build_parser().parse_args(arguments))
    sweep, case = next(plan.cases())
    run = runner.Runner(plan, {})
    sdpa = plan.baselines["sdpa"]
    assert run._why_not(sweep, case, sdpa) is None
    run.history[run._key(case, "sdpa")] = (case.shape.length, plan.patience / 3)
    assert run._why_not(sweep, case, sdpa) is None
    longer = replace(case, shape=case.shape.with_length(2 * case.shape.length))
    assert "would take about 53 s (--patience 40)" in run._why_not(sweep, longer, sdpa)


def test_baselines_that_do_not_fit_say_why(tmp_path):
    arguments = ["--smoke", "--output", str(tmp_path / "run"), "fused"]
    plan = cli.make_plan(cli.build_parser().parse_args(arguments))
    sweep, case = next(plan.cases())
    run, sdpa = runner.Runner(plan, {}), plan.baselines["sdpa"]
    part = replace(case, shape=replace(case.shape, queries=50))
    assert "T must be 1 or L" in run._why_not(sweep, part, sdpa)
    long = replace(case, shape=case.shape.with_length(65536))
    assert run._why_not(sweep, long, plan.baselines["sdpa-math"]) == "would hold 128 GiB of scores"
    assert "not part" in run._why_not(replace(sweep, baselines=()), case, sdpa)
    backward = replace(case, operator="backward")
    assert "no backward on a CPU" in run._why_not(sweep, backward, plan.baselines["flex"])


def test_layer_operators_say_what_is_missing(monkeypatch, tmp_path):
    operator = replace(operators.OPERATORS["layer-forward"], missing=lambda device: "no mixer")
    monkeypatch.setitem(operators.OPERATORS, "layer-forward", operator)
    status, record = run_smoke(tmp_path / "run", "layer-forward")
    (row,) = record["rows"].values()
    assert (status, row["status"], row["reason"]) == (0, "skipped", "no mixer")


def test_the_cache_bounds_a_gpu_only():
    rates = {"copy": 1.0, "matmul_float32": 2.0, "gather_cache": 3.0}
    assert ceilings.speeds(rates, "float32", "cpu") == model.Speeds(1.0, 2.0)
    assert ceilings.speeds(rates, "float32", "cuda") == model.Speeds(1.0, 2.0, 3.0)
    assert ceilings.speeds(rates | {"gather_cache": None}, "float32", "cuda") == model.Speeds(
        1.0, 2.0
    )
    assert ceilings.speeds(rates, "bfloat16", "cpu") is None


def test_list_names_everything(capsys):
    assert cli.main(["--list"]) == 0
    text = capsys.readouterr().out
    for name in [*operators.OPERATORS, *all_baselines()]:
        assert f"  {name} " in text


# --- compare --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "this", "word"),
    [
        ([10.0, 10.1, 10.2], [8.0, 8.1, 8.2], "faster"),
        ([10.0, 10.1, 10.2], [12.0, 12.1, 12.2], "slower"),
        ([10.0, 10.1, 14.0], [12.0, 12.1, 12.2], "same"),  # the spreads overlap
        ([10.0, 10.1, 10.2], [8.0, 8.1, 10.0], "same"),
        ([10.0, 10.1, 10.2], [9.9, 9.95, 9.99], "same"),  # apart, but by too little
        ([10.0, 10.0], [10.0, 10.0], "same"),
    ],
)
def test_verdict_respects_the_spread(base, this, word):
    verdict = compare.judge("x", base, this)
    assert verdict.word == word
    assert verdict.ratio == pytest.approx(sorted(this)[len(this) // 2] / verdict.base_ms, rel=0.02)


def test_verdicts_need_a_time_from_every_round():
    def record(**times):
        return {"rows": {id: {"median_ms": t} if t else {} for id, t in times.items()}}

    base = [record(a=1.0, b=1.0), record(a=1.1, b=None)]
    this = [record(a=2.0, b=2.0, new=1.0), record(a=2.1, b=2.0, new=1.0)]
    assert [(v.id, v.word) for v in compare.verdicts(base, this)] == [("a", "slower")]


def test_compare_passes_on_all_but_its_own_options():
    argv = ["fused", "--compare", "HEAD~1", "--smoke", "--rounds=2", "--output", "x", "--seed", "3"]
    assert compare._own_options_removed(argv) == ["fused", "--smoke", "--seed", "3"]


def test_base_is_checked_out_and_removed_again(tmp_path):
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    with pytest.raises(ZeroDivisionError), compare._worktree("HEAD", tmp_path / "base") as tree:
        assert (tree / "setup.py").exists()
        raise ZeroDivisionError
    assert not (tmp_path / "base").exists()
    command = ["git", "-C", str(ROOT), "worktree", "list"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert str(tmp_path) not in listed
