"""The kernels' benchmark in pieces: stopped anywhere and gone on with, told what another program measured."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.kernels import __main__ as cli
from benchmarks.kernels import ceilings, operators, record, runner, timer, truth, tune


def run(prefix, *arguments: str) -> tuple[int, dict]:
    common = ("--smoke", "--baselines", "none", "--no-plots", "--output", str(prefix))
    status = cli.main([*arguments, *common])
    return status, json.loads(prefix.with_name(f"{prefix.name}.json").read_text())


def fail_on_second_case(monkeypatch) -> None:
    """The second case faults, and from then on nothing works."""
    cases, whole, ours = [], runner.Runner.run_case, operators.pool_chunks

    def run_case(self, sweep, case):
        cases.append(case.id)
        return whole(self, sweep, case)

    def pool(x, size):
        if len(cases) == 2:
            raise RuntimeError("an illegal memory access was encountered")
        return ours(x, size)

    monkeypatch.setattr(runner.Runner, "run_case", run_case)
    monkeypatch.setattr(operators, "pool_chunks", pool)
    monkeypatch.setattr(runner, "device_works", lambda device: False)


def test_a_lost_device_ends_the_process_and_the_next_one_goes_on_behind_it(monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        fail_on_second_case(patch)
        status, first = run(tmp_path / "run", "pool")
    assert status == cli.DEVICE_LOST and not first["complete"]
    assert [row["status"] for row in first["rows"].values()] == ["ok", "error"]
    status, second = run(tmp_path / "run", "pool", "--resume")
    assert status == 1 and second["complete"]  # one of them failed
    assert list(second["rows"])[:2] == list(first["rows"]) and len(second["rows"]) == 3
    assert second["rows"].items() >= first["rows"].items()
    assert second["ceilings"] == first["ceilings"]


def test_a_device_that_still_works_goes_on(monkeypatch, tmp_path):
    fail_on_second_case(monkeypatch)
    monkeypatch.setattr(runner, "device_works", lambda device: True)
    status, found = run(tmp_path / "run", "pool")
    assert status == 1 and found["complete"] and len(found["rows"]) == 3


@pytest.mark.parametrize("fact", ["commit", "library", "torch", "device", "gpu", "cpu", "threads"])
def test_a_record_of_another_build_is_not_gone_on_with(fact, tmp_path, capsys):
    _, first = run(tmp_path / "run", "pool")
    first["machine"][fact] = "another"
    first["rows"] = {id: row | {"median_ms": -1} for id, row in first["rows"].items()}
    (tmp_path / "run.json").write_text(json.dumps(first))
    _, second = run(tmp_path / "run", "pool", "--resume")
    assert "from the beginning" in capsys.readouterr().out
    assert all(row["median_ms"] > 0 for row in second["rows"].values())


def test_without_resume_it_begins_anew(tmp_path):
    _, first = run(tmp_path / "run", "pool")
    first["rows"] = {id: row | {"median_ms": -1} for id, row in first["rows"].items()}
    (tmp_path / "run.json").write_text(json.dumps(first))
    _, second = run(tmp_path / "run", "pool")
    assert all(row["median_ms"] > 0 for row in second["rows"].values())


def test_no_plots(tmp_path):
    run(tmp_path / "run", "pool")
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".csv"}


def test_the_commit_can_be_told(monkeypatch, tmp_path):
    monkeypatch.setenv("RESONA_COMMIT", "abc123")
    _, found = run(tmp_path / "run", "pool")
    assert found["machine"]["commit"] == "abc123"


@pytest.mark.parametrize("chosen, left_out", [(None, {"flex"}), ("sdpa,flex", {"flex"})])
def test_baselines_can_be_left_out(chosen, left_out):
    """Unlike those that are asked for, they need not be there."""
    more = ["--baselines", chosen] if chosen else []
    arguments = cli.build_parser().parse_args(["--smoke", "pool", "--without", "flex,nsa", *more])
    plan = cli.make_plan(arguments)
    assert "sdpa" in plan.baselines and not left_out & plan.baselines.keys()
    assert plan.reasons["flex"] == plan.reasons["nsa"] == "not asked for"
    assert cli.main(["--smoke", "pool", "--without", "nonsense"]) == 2


def test_ceilings_that_cannot_be_read_get_one_line(tmp_path, capsys):
    for text in (None, "nonsense"):
        path = tmp_path / "ceilings.json"
        if text:
            path.write_text(text)
        assert cli.main(["--smoke", "pool", "--ceilings", str(path)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "--ceilings" in line


def test_on_a_gpu_the_cache_rate_is_the_other_program_s(monkeypatch):
    """torch would write the rows that it gathers to memory."""

    class Clock(timer.CpuClock):
        device = "cuda"

    randn, empty, randint = torch.randn, torch.empty, torch.randint
    for name, make in (("randn", randn), ("empty", empty), ("randint", randint)):
        monkeypatch.setattr(
            torch, name, lambda *a, make=make, device=None, **more: make(*a, **more)
        )
    known = {ceilings.CACHE_ROWS: 5e12}
    assert ceilings.measure(Clock(), ["float32"], "smoke", known)["gather_cache"] == 5e12
    assert ceilings.measure(Clock(), ["float32"], "smoke")["gather_cache"] is None


def test_sweeps_go_on_too(monkeypatch, tmp_path):
    output = tmp_path / "tune.json"
    arguments = ["item_rows", "chunk_blocks", "--device", "cpu", "--seconds", "0"]
    arguments += ["--output", str(output)]
    with monkeypatch.context() as patch:
        patch.setattr(timer, "device_works", lambda device: False)
        patch.setattr(tune, "sweep_case", lambda *_: 1 / 0)
        assert tune.main(arguments) == cli.DEVICE_LOST
    first = record.load(output)
    assert len(first["rows"]) == 1 and not first["complete"]
    assert tune.main([*arguments, "--resume"]) == 1  # one failed
    second = record.load(output)
    assert second["complete"] and second["rows"][0] == first["rows"][0]
    assert {row["field"] for row in second["rows"]} == {"item_rows", "chunk_blocks"}
    keys = [(row["field"], row["case"], row["value"]) for row in second["rows"]]
    assert len(keys) == len(set(keys))


def test_worst_place_names_the_entry():
    truth_, got = torch.zeros(2, 3), torch.zeros(2, 3)
    got[1, 2] = 0.5
    assert truth.worst_place(got, truth_) == "worst at (1, 2): 0.5, expected 0"
    got[0, 1] = torch.nan
    assert truth.worst_place(got, truth_, "key ") == "key worst at (0, 1): nan, expected 0"
    assert "shape (3,), expected (2, 3)" in truth.worst_place(got[0], truth_)


def test_check_search_names_the_row():
    rows = torch.tensor([4, 9])
    expected = torch.tensor([[[[1, 0]], [[3, 2]]]])
    found = expected.clone()
    found[0, 1, 0, 1] = 7
    text = truth._first_other(rows, found, expected)
    assert text.startswith("1 of 4 differ, first in row 9 of sequence 0, retrieval head 0: [3, 7]")
