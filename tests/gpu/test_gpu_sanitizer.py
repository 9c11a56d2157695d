"""The sanitizers of gpu_smoke.sh without a GPU: tools that are made up, and what is read in their reports."""

import json
import sys
import textwrap
from pathlib import Path

import pytest
from made_up import program

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks" / "gpu"))
import gpu_jobs  # noqa: E402
import gpu_sanitizer  # noqa: E402
import gpu_smoke  # noqa: E402

# Writes down what it was asked for, runs the program, and ends with $SUMMARY and $STATUS.
TOOL = """
    import json, os, subprocess, sys
    with open(os.environ["CALLS"], "a") as calls:
        print(json.dumps(sys.argv[1:]), file=calls)
    at = sys.argv.index(sys.executable)
    print("========= COMPUTE-SANITIZER", flush=True)
    if sys.argv[at + 1] == "-c":
        print(os.environ.get("PROBE", "sum 9.0\\n========= ERROR SUMMARY: 0 errors"))
        sys.exit()
    status = subprocess.run(sys.argv[at:]).returncode
    print(os.environ.get("SUMMARY", "========= ERROR SUMMARY: 0 errors"))
    sys.exit(int(os.environ.get("STATUS", status)))
"""
# Two jobs; in the second one the kernel does what REPORT says.
WORKER = """
    import argparse, json, os, sys, time
    parser = argparse.ArgumentParser()
    parser.add_argument("--progress"), parser.add_argument("--first", type=int)
    options, _ = parser.parse_known_args()
    for i in range(options.first, 2):
        head = {"index": i, "of": 2, "job": f"gradient/{i}", "op": "attend"}
        print(f"job {i} of 2: gradient/{i}", flush=True)
        with open(options.progress, "a") as progress:
            print(json.dumps(head), file=progress, flush=True)
            if i == 1:
                print(os.environ.get("REPORT", ""), flush=True)
                time.sleep(float(os.environ.get("SLEEP", 0)))
            print(json.dumps({**head, "ok": True}), file=progress)
"""
WRITE = "========= Invalid __global__ write of size 4 bytes\n=========     at kernel+0x10"


@pytest.fixture
def run(tmp_path, monkeypatch):
    folder = tmp_path / "bin"
    folder.mkdir()
    program(folder / "compute-sanitizer", textwrap.dedent(TOOL))
    worker = tmp_path / "worker.py"
    worker.write_text(textwrap.dedent(WORKER))
    monkeypatch.setattr(gpu_jobs, "WORKER", worker)
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    made = gpu_smoke.Run(gpu_smoke.parse(["--out", str(tmp_path / "record.json")]))
    made.calls = lambda: [json.loads(x) for x in (tmp_path / "calls").read_text().splitlines()]
    return made


def check(run, tool: str = "memcheck", seconds: float = 60) -> dict:
    return run.step(tool, gpu_sanitizer.sanitizer(run, tool, lambda: seconds))


def option(call: list, name: str) -> str:
    return call[call.index(name) + 1]


def test_clean(run):
    entry = check(run)
    assert (entry["status"], entry["passed"], entry["of"]) == ("passed", 2, 2), entry
    assert entry["summaries"] == ["ERROR SUMMARY: 0 errors"]


def test_what_tools_and_jobs_are_asked_for(run):
    for tool in gpu_sanitizer.TOOLS:
        assert check(run, tool)["status"] == "passed"
    probe, *calls = run.calls()
    assert "-c" in probe and [option(call, "--tool") for call in calls] == [*gpu_sanitizer.TOOLS]
    for call in calls:
        assert option(call, "--launch-timeout") == "0" and option(call, "--show-backtrace") == "no"
        assert {"--small", "--no-graphs"} < set(call) and option(call, "--job-seconds") == "100"
        is_memcheck = option(call, "--tool") == "memcheck"
        assert ("--report-api-errors" in call) == is_memcheck
    assert option(calls[0], "--report-api-errors") == "no"


@pytest.mark.parametrize(
    "summary, clean",
    [
        ("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", True),
        ("========= RACECHECK SUMMARY: 1 hazard displayed (0 errors, 1 warning)", False),
        ("========= ERROR SUMMARY: 1 error", False),
        ("========= ERROR SUMMARY: 12 errors", False),
        ("========= Error: process didn't terminate successfully", False),
        ("", False),
    ],
)
def test_only_a_summary_of_nothing_passes(run, monkeypatch, summary, clean):
    monkeypatch.setenv("SUMMARY", summary)
    entry = check(run)
    assert (entry["status"] == "passed") == clean
    assert entry["passed"] == 2  # the jobs themselves did well
    if not clean:
        assert ("no summary" if "SUMMARY" not in summary else "found errors") in entry["reason"]


def test_the_report_is_kept_with_the_name_of_its_job(run, monkeypatch):
    monkeypatch.setenv("REPORT", WRITE)
    monkeypatch.setenv("SUMMARY", "x" * 20_000 + "\n========= ERROR SUMMARY: 1 error")
    entry = check(run)
    assert entry["output"].startswith(f"job 1 of 2: gradient/1\n{WRITE}")
    assert entry["output"].endswith("========= ERROR SUMMARY: 1 error\n")
    assert 8192 < len(entry["output"]) < 12_000


def test_its_exit_status_fails_the_step(run, monkeypatch):
    monkeypatch.setenv("STATUS", str(gpu_sanitizer.FOUND))
    entry = check(run)
    assert entry["status"] == "failed" and "found errors" in entry["reason"]


def test_errors_are_told_also_where_time_ran_out(run, monkeypatch):
    monkeypatch.setenv("REPORT", f"{WRITE}\n========= ERROR SUMMARY: 1 error")
    monkeypatch.setenv("SLEEP", "60")
    entry = check(run, seconds=3)
    assert entry["status"] == "failed" and entry["reason"].startswith("found errors")
    assert WRITE in entry["output"] and "ran out of time" in entry["failures"][0]["error"]


@pytest.mark.parametrize(
    "printed",
    [
        "========= Device not supported\n========= ERROR SUMMARY: 1 error",
        "sum 9.0\n========= Error: it went away",
    ],
)
def test_a_tool_that_cannot_work_here_is_missing(run, monkeypatch, printed):
    monkeypatch.setenv("PROBE", printed)
    for tool in ("memcheck", "racecheck"):
        entry = check(run, tool)
        assert entry["status"] == "missing" and printed in entry["output"]
    assert len(run.calls()) == 1  # asked once
    assert gpu_smoke.summarize(run) == 0 and run.record["missing"] == ["memcheck", "racecheck"]


def test_a_missing_tool_is_listed(run, monkeypatch):
    monkeypatch.setattr(gpu_sanitizer, "find_program", lambda name: None)
    assert check(run)["status"] == "missing"
    assert gpu_smoke.summarize(run) == 0
    assert run.record["missing"] == ["memcheck"]
