"""benchmarks/gpu_smoke.sh where there is no GPU: a dry run, and what is recorded when things go wrong."""

import inspect
import json
import os
import re
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks" / "gpu"))
import gpu_cases  # noqa: E402
import gpu_jobs  # noqa: E402
import gpu_operators  # noqa: E402
import gpu_smoke  # noqa: E402
import gpu_smoke_worker  # noqa: E402


def smoke(out: Path, *arguments: str) -> tuple[int, dict]:
    environment = {**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    command = [ROOT / "benchmarks" / "gpu_smoke.sh", "--out", out, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert out.exists(), result.stdout + result.stderr
    return result.returncode, json.loads(out.read_text())


def test_without_a_gpu(tmp_path):
    status, record = smoke(tmp_path / "no gpu.json")
    assert status == 2 and not record["passed"]
    assert record["summary"].startswith("no CUDA device: ")
    assert record["machine"]["gpu"] is None
    assert record["steps"]["binary"]["status"] in ("passed", "missing")


def test_dry_run(tmp_path):
    status, record = smoke(tmp_path / "dry.json", "--device", "cpu", "--small")
    assert status == 0 and record["passed"] and record["complete"], record
    cases = record["steps"]["cases"]
    assert cases["passed"] == cases["of"] > 30 and cases["failures"] == []
    assert len(record["steps"]["load"]["library_sha256"]) == 64
    assert os.listdir(tmp_path) == ["dry.json"]  # and nothing else is left


def test_out_of_time(tmp_path):
    status, record = smoke(tmp_path / "late.json", "--device", "cpu", "--seconds", "1")
    assert status == 1 and not record["passed"] and not record["complete"]
    assert record["steps"]["load"]["status"] == "not reached"


# A worker whose second job crashes, whose fourth fails, and which counts on being started again.
FAKE = """
    import json, os, sys
    options = dict(zip(sys.argv[2::2], sys.argv[3::2]))
    with open(options["--progress"], "a") as progress:
        for i in range(int(options["--first"]), 5):
            head = {"index": i, "of": 5, "job": f"job {i}"}
            print(json.dumps(head), file=progress, flush=True)
            if i == 1:
                print("the last words")
                sys.stdout.flush()
                os.abort()
            if i == 3:
                print(json.dumps({**head, "ok": False, "error": "wrong"}), file=progress, flush=True)
                sys.exit(3)
            print(json.dumps({**head, "ok": True}), file=progress, flush=True)
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    worker = tmp_path / "worker.py"
    worker.write_text(textwrap.dedent(FAKE))
    monkeypatch.setattr(gpu_jobs, "WORKER", worker)
    return gpu_smoke.Run(gpu_smoke.parse(["--out", str(tmp_path / "record.json")]))


def test_jobs_after_a_crash_still_run(run):
    entry = {}
    gpu_jobs.run_jobs(run, entry, 60, [])
    assert (entry["status"], entry["passed"], entry["failed"], entry["of"]) == ("failed", 3, 2, 5)
    crashed, wrong = entry["failures"]
    assert crashed["job"] == "job 1" and "crashed" in crashed["error"]
    assert "the last words" in crashed["output"]
    assert wrong["job"] == "job 3" and wrong["error"] == "wrong"
    shown = gpu_jobs.failures(entry)
    assert "job 3: wrong" in shown and "job 1: crashed" in shown


def test_a_hang_ends_in_time_and_is_recorded(run):
    gpu_jobs.WORKER.write_text(
        "import json, sys, time\n"
        "options = dict(zip(sys.argv[2::2], sys.argv[3::2]))\n"
        "print(json.dumps({'index': 0, 'of': 9, 'job': 'stuck'}), file=open(options['--progress'], 'a'))\n"
        "time.sleep(60)\n"
    )
    entry = {}
    gpu_jobs.run_jobs(run, entry, 2, [])
    assert entry["status"] == "failed" and entry["failures"][0]["job"] == "stuck"
    assert "ran out of time" in entry["failures"][0]["error"]


# A worker all of whose jobs of one operator crash it, and which does what it is asked about skipping.
TWO_OPERATORS = """
    import argparse, json, os
    parser = argparse.ArgumentParser()
    parser.add_argument("--progress"), parser.add_argument("--first", type=int)
    parser.add_argument("--skip-op", action="append", default=[])
    options, _ = parser.parse_known_args()
    with open(options.progress, "a") as progress:
        for i in range(options.first, 12):
            head = {"index": i, "of": 12, "job": f"job {i}", "op": "bad" if i % 2 else "good"}
            if head["op"] in options.skip_op:
                print(json.dumps({**head, "skipped": True}), file=progress, flush=True)
                continue
            print(json.dumps(head), file=progress, flush=True)
            if head["op"] == "bad":
                END
            print(json.dumps({**head, "ok": True}), file=progress, flush=True)
"""
LOST = "json.dump({**head, 'ok': False, 'error': 'fault'}, progress), progress.flush(), os._exit(3)"


@pytest.mark.parametrize("how", ["os.abort()", LOST], ids=["crash", "lost"])
def test_an_operator_that_took_two_processes_is_left_out(run, how):
    gpu_jobs.WORKER.write_text(textwrap.dedent(TWO_OPERATORS).replace("END", how))
    entry = {}
    gpu_jobs.run_jobs(run, entry, 60, [])
    assert (entry["passed"], entry["failed"], entry["of"]) == (6, 2, 12)
    assert entry["skipped"] == ["job 5", "job 7", "job 9", "job 11"]
    assert entry["status"] == "failed"
    assert entry["reason"] == "2 of 8 jobs failed, 4 skipped behind crashes of their operator"


def test_no_more_processes_than_so_many(run, monkeypatch):
    monkeypatch.setattr(gpu_jobs, "MAX_RESTARTS", 3)
    monkeypatch.setattr(gpu_jobs, "MAX_CRASHES", 99)
    gpu_jobs.WORKER.write_text(textwrap.dedent(TWO_OPERATORS).replace("END", "os.abort()"))
    entry = {}
    gpu_jobs.run_jobs(run, entry, 60, [])
    assert (entry["failed"], entry["passed"]) == (4, 4)
    assert entry["reason"] == "4 of 8 jobs failed; 4 not reached"


def test_jobs_are_told_when_the_step_ends(run):
    gpu_jobs.WORKER.write_text(
        "import json, sys\n"
        "options = dict(zip(sys.argv[2::2], sys.argv[3::2]))\n"
        "job = {'index': 0, 'of': 1, 'job': 'a', 'ok': False, 'error': options['--until']}\n"
        "print(json.dumps(job), file=open(options['--progress'], 'a'))\n"
    )
    entry, begin = {}, time.time()
    gpu_jobs.run_jobs(run, entry, 50, [], margin=20)
    assert 29 <= float(entry["failures"][0]["error"]) - begin < 45


# A worker that answers when it is asked a second time, with warnings around the answer.
SLOW = """
    import json, pathlib, sys
    asked = pathlib.Path(__file__).with_suffix(".asked")
    if not asked.exists():
        asked.touch()
        sys.exit(9)
    print("a warning before")
    print(json.dumps({"gpu": "one", "problems": []}))
    print("a warning behind")
"""


def test_a_slow_machine_is_asked_twice_and_its_answer_is_found(run, monkeypatch):
    worker = gpu_jobs.WORKER
    worker.write_text(textwrap.dedent(SLOW))
    monkeypatch.setattr(gpu_smoke, "WORKER", worker)
    gpu_smoke.steps(run, [])
    assert run.record["machine"]["gpu"] == "one"
    assert run.record["steps"]["machine"]["status"] == "passed"
    assert run.record["steps"]["load"]["status"] == "passed"


def test_a_machine_that_does_not_answer_may_have_a_gpu(run, monkeypatch):
    gpu_jobs.WORKER.write_text("import sys; sys.exit(9)")
    monkeypatch.setattr(gpu_smoke, "WORKER", gpu_jobs.WORKER)
    assert gpu_smoke.steps(run, []) == 1
    assert run.record["steps"]["machine"]["reason"] == "ended with status 9"
    assert run.record["steps"]["load"]["status"] == "failed"  # it was tried


def test_a_step_behind_cases_keeps_time(run, monkeypatch):
    """Also where every job of the cases hangs."""
    limits = {}
    monkeypatch.setattr(gpu_smoke, "run_jobs", lambda run, entry, limit, *_: limits.update(x=limit))
    run.options.seconds = 100
    gpu_smoke.cases(run, 2 / 3)({})
    assert 60 < limits["x"] <= 100 * 2 / 3


# --- the worker itself ------------------------------------------------------------------------------


def work(tmp_path, *arguments: str) -> tuple[str, list[dict], dict | None]:
    progress = tmp_path / "progress"
    command = [sys.executable, gpu_smoke.WORKER, "jobs", "--device", "cpu", "--small"]
    command += ["--progress", progress, *arguments]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return printed, *gpu_jobs.read_progress(progress)


def test_the_worker_skips_graphs_and_operators_and_names_its_jobs(tmp_path):
    skipped = [
        x for op in gpu_operators.OPERATORS if op != "pool_chunks" for x in ("--skip-op", op)
    ]
    printed, events, begun = work(tmp_path, "--no-graphs", *skipped)
    assert begun is None and len(events) == events[0]["of"]
    assert not any(event["job"].startswith(("replays/", "graph/")) for event in events)
    ran = [event for event in events if "ok" in event]
    assert ran and {event["op"] for event in ran} == {"pool_chunks"}
    assert all(event["ok"] for event in ran) and len(ran) < len(events)
    names = [f"job {event['index']} of {event['of']}: {event['job']}" for event in ran]
    assert printed.splitlines() == names


def test_the_worker_begins_no_job_after_its_time(tmp_path):
    assert work(tmp_path, "--until", "0") == ("", [], None)


def test_operators_take_turns():
    jobs = gpu_cases.jobs("cuda")
    turns = gpu_smoke_worker.in_turns(jobs)
    operators = [job.case.op for job in turns]
    count = len(set(operators))
    assert len(set(operators[:count])) == count > 5
    assert sorted(map(str, turns)) == sorted(map(str, jobs))
    for op in set(operators):
        assert [j for j in turns if j.case.op == op] == [j for j in jobs if j.case.op == op]


def test_graphs_are_of_these_modes():
    """Whatever captures a graph is left out under the sanitizers."""
    captures = {
        mode
        for mode, body in (gpu_cases.MODES | gpu_cases.REPLAYS).items()
        if re.search(r"\bcapture\(|torch\.cuda\.graph\(", inspect.getsource(body))
    }
    assert captures == set(gpu_smoke_worker.GRAPHS)
