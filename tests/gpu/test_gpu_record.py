"""benchmarks/gpu_record.sh where there is no GPU: a dry run, going on, and what stops it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import gpu_record  # noqa: E402


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


def test_out_of_time_is_told(tmp_path):
    status, kept = record(tmp_path, "--device", "cpu", "--steps", "stages", "--seconds", "1")
    assert status == 1 and not kept["complete"]
    assert kept["steps"]["stages"]["status"] == "not reached"


def test_every_step_names_operators_and_lengths_of_the_suite():
    """What the steps ask for exists, or they would fail on the GPU only."""
    from benchmarks.kernels.__main__ import build_parser
    from benchmarks.kernels.shapes import GPU_SUITE

    for step in gpu_record.RECORDS:
        arguments = build_parser().parse_args(list(step.arguments))
        for operator in arguments.operators:
            sweeps = [sweep for sweep in GPU_SUITE if sweep.operator == operator]
            lengths = {str(n) for sweep in sweeps for n in sweep.lengths}
            assert lengths, f"{step.name}: {operator}"
            assert arguments.lengths is None or arguments.lengths in lengths, step


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
    subprocess.run(["nvcc", *flags, gpu_record.CEILINGS, "-o", program], check=True)
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run([program], capture_output=True, text=True, env=hidden)
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr.startswith("ceilings: device: cudaGetDevice: expected success, got ")
