"""benchmarks/gpu_smoke.sh where there is no GPU: a dry run, and what is recorded when things go wrong."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import gpu_smoke  # noqa: E402


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
    monkeypatch.setattr(gpu_smoke, "WORKER", worker)
    return gpu_smoke.Run(gpu_smoke.parse(["--out", str(tmp_path / "record.json")]))


def test_jobs_after_a_crash_still_run(run):
    entry = {}
    gpu_smoke.run_jobs(run, entry, 60, [])
    assert (entry["status"], entry["passed"], entry["failed"], entry["of"]) == ("failed", 3, 2, 5)
    crashed, wrong = entry["failures"]
    assert crashed["job"] == "job 1" and "crashed" in crashed["error"]
    assert "the last words" in crashed["output"]
    assert wrong["job"] == "job 3" and wrong["error"] == "wrong"


def test_a_hang_ends_in_time_and_is_recorded(run):
    gpu_smoke.WORKER.write_text(
        "import json, sys, time\n"
        "options = dict(zip(sys.argv[2::2], sys.argv[3::2]))\n"
        "print(json.dumps({'index': 0, 'of': 9, 'job': 'stuck'}), file=open(options['--progress'], 'a'))\n"
        "time.sleep(60)\n"
    )
    entry = {}
    gpu_smoke.run_jobs(run, entry, 2, [])
    assert entry["status"] == "failed" and entry["failures"][0]["job"] == "stuck"
    assert "ran out of time" in entry["failures"][0]["error"]


def test_what_a_sanitizer_finds_fails_the_step(run):
    gpu_smoke.WORKER.write_text(
        "import json, sys\n"
        "options = dict(zip(sys.argv[2::2], sys.argv[3::2]))\n"
        "job = {'index': 0, 'of': 1, 'job': 'a', 'ok': True}\n"
        "print(json.dumps(job), file=open(options['--progress'], 'a'))\n"
        "sys.exit(86)\n"
    )
    entry = {}
    gpu_smoke.run_jobs(run, entry, 60, [])
    assert entry["status"] == "failed" and "found errors" in entry["reason"]


def test_a_missing_sanitizer_is_listed(run, monkeypatch):
    monkeypatch.setattr(gpu_smoke, "find_sanitizer", lambda: None)
    assert run.step("memcheck", gpu_smoke.sanitizer(run, "memcheck"))["status"] == "missing"
    assert gpu_smoke.summarize(run) == 0
    assert run.record["missing"] == ["memcheck"]
