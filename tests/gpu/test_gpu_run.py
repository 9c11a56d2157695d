"""The calls and steps that gpu_smoke.sh and gpu_record.sh are made of: what hangs, what is stopped."""

import json
import os
import signal
import subprocess
import sys
import tarfile
import textwrap
import time
from argparse import Namespace
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks" / "gpu"))
import gpu_run  # noqa: E402


@pytest.fixture
def run(tmp_path):
    out = tmp_path / "out" / "record.json"
    out.parent.mkdir()
    return gpu_run.Run(Namespace(out=str(out), seconds=60, device="cpu"))


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def is_alive(pid: int) -> bool:
    """Not even as a zombie that nobody waits for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(condition, seconds: float = 60):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not come"
        time.sleep(0.1)


def test_a_child_that_does_not_die_is_left_alone(run, tmp_path, monkeypatch):
    """As one that hangs in the driver: here neither `timeout` nor the signals do anything."""
    script(tmp_path / "timeout", "exec sleep 60")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(gpu_run, "GRACE", 0.5)
    monkeypatch.setattr(gpu_run, "POLL", 0.1)
    left = []
    monkeypatch.setattr(gpu_run, "end", left.append)
    begin = time.monotonic()
    status, _ = run.call(["true"], 1)
    assert status == 137 and gpu_run.outcome(status) == "ran out of time"
    assert time.monotonic() - begin < 10 and left[0].poll() is None
    left[0].kill()
    left[0].wait()


def test_the_end_of_a_child_is_that_of_its_group(tmp_path):
    """Also of those that take no notice of the first signal."""
    pid = tmp_path / "pid"
    text = f"trap '' TERM; sleep 60 & echo $! >{pid}.part; mv {pid}.part {pid}; wait"
    process = subprocess.Popen(["sh", "-c", text], start_new_session=True)
    wait_for(pid.exists)
    gpu_run.end(process)
    assert process.returncode == -signal.SIGKILL
    wait_for(lambda: not is_alive(int(pid.read_text())))


def test_an_exception_fails_its_step_only(run):
    def broken(entry):
        raise ValueError("no such thing")

    assert run.step("one", broken)["status"] == "failed"
    assert run.step("two", lambda entry: entry.update(status="passed"))["status"] == "passed"
    kept = json.loads(run.path.read_text())["steps"]
    assert kept["one"]["reason"] == "ValueError: no such thing"


def test_the_end_cannot_be_stopped():
    """`timeout` sends its signal to the child and to the group, so that it comes twice."""
    text = """
        import os, signal, gpu_run
        gpu_run.stop_on_signals()
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except gpu_run.Stopped as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
            raise SystemExit(stop.status)
    """
    command = [sys.executable, "-c", textwrap.dedent(text)]
    assert subprocess.run(command, cwd=ROOT / "benchmarks" / "gpu").returncode == 143


def test_a_signal_ends_all_and_leaves_the_records(tmp_path):
    """gpu_record.py, the gpu_smoke.py that it has started, and the readelf of that one, which hangs."""
    pid, out, bundle = tmp_path / "pid", tmp_path / "out", tmp_path / "all.tar.gz"
    script(tmp_path / "readelf", f"echo $$ >{pid}.part; mv {pid}.part {pid}; exec sleep 60")
    command = [sys.executable, ROOT / "benchmarks" / "gpu" / "gpu_record.py", "--device", "cpu"]
    command += ["--out", out, "--bundle", bundle, "--steps", "smoke,decode"]
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    process = subprocess.Popen(
        command, env={**os.environ, "PATH": path}, stdout=subprocess.PIPE, text=True
    )
    wait_for(pid.exists)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "machine: passed" in printed  # the end of what the step had printed
    assert not is_alive(int(pid.read_text()))
    record, smoke = (json.loads((out / f"{name}.json").read_text()) for name in ("record", "smoke"))
    assert record["steps"].keys() == {"smoke"}
    assert record["steps"]["smoke"]["reason"] == "stopped by signal 15"
    assert smoke["steps"]["binary"]["reason"] == "stopped by signal 15"
    assert not record["complete"] and not smoke["complete"]
    assert sorted(file.name for file in out.iterdir()) == ["record.json", "smoke.json"]
    with tarfile.open(bundle) as tar:
        packed = json.load(tar.extractfile("record.json"))
        assert tar.getnames() == ["record.json", "smoke.json"]
    assert packed == record
