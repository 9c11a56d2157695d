"""benchmarks/gpu_record.sh where there is no GPU: a dry run, going on, and what stops it."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from made_up import program

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks" / "gpu"))
import gpu_record  # noqa: E402
import gpu_run  # noqa: E402
import gpu_steps  # noqa: E402


def record(out: Path, *arguments: str) -> tuple[int, dict]:
    environment = {**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    command = [ROOT / "benchmarks" / "gpu_record.sh", "--out", out, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (out / "record.json").exists(), result.stdout + result.stderr
    return result.returncode, json.loads((out / "record.json").read_text())


def test_without_a_gpu_nothing_is_timed(tmp_path):
    status, kept = record(tmp_path)
    assert status == 2
    assert list(kept["steps"]) == ["smoke"]
    assert "no CUDA device" in kept["steps"]["smoke"]["reason"]


def test_dry_run_goes_on_where_it_ended(tmp_path):
    status, kept = record(tmp_path, "--device", "cpu", "--steps", "decode")
    assert status == 0 and kept["steps"]["decode"]["status"] == "passed"
    rows = json.loads((tmp_path / "decode.json").read_text())["rows"]
    assert len(rows) == kept["steps"]["decode"]["rows"] > 0
    before = (tmp_path / "decode.json").stat().st_mtime_ns
    status, kept = record(tmp_path, "--device", "cpu", "--steps", "decode,stages")
    assert status == 0 and set(kept["steps"]) == {"decode", "stages"}
    assert (tmp_path / "decode.json").stat().st_mtime_ns == before
    status, kept = record(tmp_path, "--device", "cpu", "--steps", "decode", "--again")
    assert status == 0 and kept["steps"]["decode"]["attempts"] == 2
    assert (tmp_path / "decode.json").stat().st_mtime_ns > before


def test_out_of_time_is_told(tmp_path):
    status, kept = record(tmp_path, "--device", "cpu", "--steps", "stages", "--seconds", "1")
    assert status == 1 and not kept["complete"]
    assert kept["steps"]["stages"]["status"] == "not reached"


def test_every_step_names_operators_lengths_and_baselines_of_the_suite():
    """What the steps ask for exists, or they would fail on the GPU only."""
    from benchmarks.kernels.__main__ import build_parser
    from benchmarks.kernels.baselines import all_baselines
    from benchmarks.kernels.shapes import GPU_SUITE

    timed = [step for step in gpu_steps.STEPS if step.operators]
    for step in timed:
        arguments = build_parser().parse_args([*step.operators, *step.lengths, *step.flags])
        for operator in arguments.operators:
            sweeps = [sweep for sweep in GPU_SUITE if sweep.operator == operator]
            lengths = {str(n) for sweep in sweeps for n in sweep.lengths}
            assert lengths, f"{step.name}: {operator}"
            assert set((arguments.lengths or "").split(",")) - {""} <= lengths, step
        for names in (arguments.baselines, arguments.without):
            assert names in (None, "none") or set(names.split(",")) <= all_baselines().keys(), step
    assert [step.name for step in timed if "--without" not in step.flags] == ["parts", "flex"]


def test_the_calls_of_the_readme_are_all_steps_and_fit():
    text = (ROOT / "benchmarks" / "README.md").read_text()
    calls = re.findall(r"gpu_record.sh --bundle \S+ --steps[\s\\]+(\S+)", text)
    named = [call.split(",") for call in calls]
    assert [name for names in named for name in names] == [step.name for step in gpu_steps.STEPS]
    seconds = {step.name: step.seconds for step in gpu_steps.STEPS}
    limit = gpu_record.parse([]).seconds
    assert len(named) == 3 and limit <= 540
    for names in named[:2]:
        assert sum(seconds[name] for name in names) <= limit


def test_tuning_sweeps_run_dry(tmp_path):
    status, kept = record(tmp_path, "--device", "cpu", "--steps", "tuning")
    assert status == 0, kept["steps"]["tuning"]
    assert kept["steps"]["tuning"]["whole"] and kept["steps"]["tuning"]["rows"] > 50


def test_unknown_steps_are_refused(capsys):
    with pytest.raises(SystemExit):
        gpu_record.parse(["--steps", "smoke,dance"])
    assert "got dance" in capsys.readouterr().err


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
def test_ceilings_compile_and_refuse_to_guess(tmp_path):
    program = tmp_path / "ceilings"
    flags = ["-std=c++17", "-arch=sm_90a", "-Werror", "all-warnings", "-I", ROOT / "csrc"]
    subprocess.run(["nvcc", *flags, gpu_steps.CEILINGS, "-o", program], check=True)
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run([program], capture_output=True, text=True, env=hidden)
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr.startswith("ceilings: device: cudaGetDevice: expected success, got ")


# --- what the GPU does to it, without one ---------------------------------------------------------


def make(tmp_path, *arguments: str) -> gpu_record.Record:
    options = gpu_record.parse(["--out", str(tmp_path), *arguments])
    options.out = tmp_path / "record.json"
    return gpu_record.Record(options)


def keep(tmp_path, **statuses: str) -> None:
    steps = {name: {"status": status} for name, status in statuses.items()}
    (tmp_path / "record.json").write_text(json.dumps({"steps": steps}))


def test_what_was_never_tried_comes_first_and_what_is_finished_not_at_all(tmp_path):
    statuses = {"ceilings": "failed", "decode": "passed", "stages": "wrong", "smoke": "under way"}
    keep(tmp_path, **statuses, tuning="not reached")
    steps = gpu_record.earlier(tmp_path / "record.json")
    assert (steps["smoke"]["status"], steps["smoke"]["attempts"]) == ("failed", 1)
    wanted = ["smoke", "ceilings", "decode", "stages", "tuning", "memcheck"]
    todo = ["tuning", "memcheck", "smoke", "ceilings"]
    assert gpu_record.order(wanted, steps, again=False) == todo
    steps["smoke"]["attempts"] = 2
    todo = ["tuning", "memcheck", "ceilings", "smoke"]
    assert gpu_record.order(wanted, steps, again=False) == todo
    assert gpu_record.order(["stages", "decode"], steps, again=True) == ["decode", "stages"]


def test_a_failed_step_that_is_not_reached_again_stays_failed(tmp_path):
    keep(tmp_path, ceilings="failed")
    run = make(tmp_path, "--seconds", "1")
    entry = run.step("ceilings", lambda entry: entry.update(status="passed"))
    assert entry["status"] == "failed"
    assert run.step("tuning", lambda entry: None)["status"] == "not reached"


@pytest.mark.parametrize(
    "exit, reached", [(gpu_record.NO_DEVICE, ["smoke"]), (1, ["smoke", "decode"])]
)
def test_only_a_missing_device_stops_the_record(tmp_path, monkeypatch, exit, reached):
    def bodies(run, out):
        made = {"decode": lambda entry: entry.update(status="passed")}
        return made | {"smoke": lambda entry: entry.update(status="failed", exit=exit)}

    monkeypatch.setattr(gpu_record, "bodies", bodies)
    monkeypatch.setattr(gpu_record, "stop_on_signals", lambda: None)
    arguments = ["--out", str(tmp_path), "--steps", "smoke,decode"]
    assert gpu_record.main(arguments) == exit
    assert list(json.loads((tmp_path / "record.json").read_text())["steps"]) == reached


@pytest.mark.parametrize(
    "cases, status",
    [
        ({"passed": 7, "failed": 2, "of": 10, "skipped": ["a job"]}, "wrong"),
        ({"passed": 7, "failed": 2, "of": 10}, "failed"),
        ({"passed": 0, "failed": 0}, "failed"),
    ],
)
def test_a_smoke_test_that_ran_to_its_end_is_not_repeated(tmp_path, monkeypatch, cases, status):
    run = make(tmp_path)

    def call(command, limit):
        text = json.dumps({"complete": True, "summary": "some failed", "steps": {"cases": cases}})
        (tmp_path / "smoke.json").write_text(text)
        return 1, ""

    monkeypatch.setattr(run, "call", call)
    entry = run.step("smoke", gpu_steps.smoke(run, tmp_path, gpu_steps.Step("smoke", 60, "")))
    assert (entry["status"], entry["reason"]) == (status, "some failed")
    assert (entry["status"] in gpu_steps.FINISHED) == (status == "wrong")


def test_the_bundle_is_whole_at_any_time(tmp_path, monkeypatch):
    bundle = tmp_path / "elsewhere" / "all.tar.gz"
    out = tmp_path / "out"
    run = make(out, "--bundle", str(bundle))
    run.write()
    monkeypatch.setattr(gpu_record, "PACKED_EVERY", 0)
    monkeypatch.setattr(gpu_run, "POLL", 0.1)
    text = "touch $0.csv $0.png $0.json; until [ -e $1 ]; do sleep 0.1; done; tar -tzf $1"

    def body(entry: dict) -> None:
        status, names = run.call(["sh", "-c", text, out / "rows", bundle], 30)
        entry.update(status="failed" if status else "passed", names=names.split())

    entry = run.step("ceilings", body)
    assert entry["status"] == "passed" and "rows.json" in entry["names"]  # while the step ran
    with tarfile.open(bundle) as tar:
        assert tar.getnames() == ["record.json", "rows.json"]
        packed = json.load(tar.extractfile("record.json"))
    assert packed["steps"]["ceilings"]["status"] == "passed"
    assert os.listdir(bundle.parent) == ["all.tar.gz"]


def test_the_end_of_what_a_step_printed_is_shown(tmp_path, capsys):
    run = make(tmp_path)
    text = "print('early'); print('x' * 3000); print('the figures')"

    def body(entry: dict) -> None:
        status, _ = run.call([sys.executable, "-c", text], 30)
        entry["status"] = "failed" if status else "passed"

    run.step("decode", body)
    shown = capsys.readouterr().out
    assert shown.startswith("decode: passed") and shown.endswith("x\nthe figures\n")
    assert "early" not in shown and 2400 < len(shown) < 2700


# A benchmark that loses the GPU as often as LOSSES says and writes down how it was called.
BENCHMARK = """
import json, os, pathlib, sys
calls = pathlib.Path(__file__).with_suffix(".calls")
with calls.open("a") as file:
    print(json.dumps(sys.argv[1:]), file=file)
lost = len(calls.read_text().splitlines()) <= int(os.environ["LOSSES"])
record = {"complete": not lost, "rows": json.loads(os.environ.get("ROWS", "{}"))}
pathlib.Path(sys.argv[sys.argv.index("--output") + 1] + ".json").write_text(json.dumps(record))
sys.exit(3 if lost else 1)
"""


@pytest.fixture
def benchmark(tmp_path, monkeypatch):
    """Stands for the Python that runs `-m benchmarks.kernels`."""
    monkeypatch.setattr(gpu_steps.sys, "executable", str(program(tmp_path / "python", BENCHMARK)))
    monkeypatch.setenv("LOSSES", "0")
    calls = tmp_path / "python.calls"
    return lambda: [json.loads(line) for line in calls.read_text().splitlines()]


def time_step(tmp_path, name: str, *arguments: str) -> dict:
    run = make(tmp_path, *arguments)
    return run.step(name, gpu_steps.bodies(run, tmp_path)[name])


@pytest.mark.parametrize("losses, processes, status", [(2, 3, "passed"), (99, 6, "failed")])
def test_a_lost_gpu_is_gone_on_behind(tmp_path, benchmark, monkeypatch, losses, processes, status):
    monkeypatch.setenv("LOSSES", str(losses))
    entry = time_step(tmp_path, "fused-64K")
    assert (entry["status"], entry["processes"]) == (status, processes)
    assert ["--resume" in call for call in benchmark()] == [False] + [True] * (processes - 1)
    assert all({"--no-plots", "--lengths"} < set(call) for call in benchmark())


def test_a_step_that_was_begun_before_goes_on(tmp_path, benchmark):
    (tmp_path / "fused-64K.json").write_text("{}")
    time_step(tmp_path, "fused-64K")
    time_step(tmp_path, "fused-64K", "--again")
    assert ["--resume" in call for call in benchmark()] == [True, False]


@pytest.mark.parametrize("row, status", [("ok", "passed"), ("wrong", "wrong"), ("error", "wrong")])
def test_wrong_rows_are_told(tmp_path, benchmark, monkeypatch, row, status):
    monkeypatch.setenv("ROWS", json.dumps({"a": {"status": row}, "b": {"status": "oom"}}))
    entry = time_step(tmp_path, "decode")
    assert entry["status"] == status and entry["wrong_or_error"] == (["a"] if row != "ok" else [])


def test_steps_go_beside_all_peers_but_those_with_a_step_of_their_own(tmp_path, benchmark):
    run = make(tmp_path, "--nsa", str(tmp_path))
    bodies = gpu_steps.bodies(run, tmp_path)
    for name in ("fused-64K", "flex"):
        run.step(name, bodies[name])
    fused, flex = benchmark()
    assert fused[fused.index("--without") + 1] == "flex,sdpa-math" and "--baselines" not in fused
    assert flex[flex.index("--baselines") + 1] == "flex" and "--nsa" in flex


def test_measured_ceilings_are_passed_on(tmp_path, benchmark):
    time_step(tmp_path, "decode")
    (tmp_path / "ceilings.json").write_text("{}")
    time_step(tmp_path, "decode")
    assert ["--ceilings" in call for call in benchmark()] == [False, True]


# An nvcc whose programs print and end as the environment says.
NVCC = """
import os, pathlib, sys
program = pathlib.Path(sys.argv[sys.argv.index("-o") + 1])
program.write_text('#!/bin/sh\\nprintf "$PRINTED"; exit $STATUS\\n')
program.chmod(0o755)
"""


@pytest.mark.parametrize(
    "printed, status, expected, figures",
    [
        (r'{"a": 1}\n{"b": 2.5}\n', 0, "passed", {"a": 1, "b": 2.5}),
        (r'{"a": 1}\nceilings: mma: failed\n{"b', 1, "wrong", {"a": 1}),
        (r"ceilings: cudaGetDevice: failed\n", 1, "failed", None),
        ("", 0, "failed", None),
    ],
)
def test_ceilings_keep_what_was_read(tmp_path, monkeypatch, printed, status, expected, figures):
    program(tmp_path / "nvcc", NVCC)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("PRINTED", printed)
    monkeypatch.setenv("STATUS", str(status))
    run, out = make(tmp_path / "out"), tmp_path / "out"
    entry = run.step("ceilings", gpu_steps.ceilings(run, out, 60))
    assert entry["status"] == expected, entry
    kept = out / "ceilings.json"
    assert (json.loads(kept.read_text()) if kept.exists() else None) == figures
    assert not (out / "ceilings").exists()
