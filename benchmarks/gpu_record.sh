#!/usr/bin/env bash
# The records of a GPU, in one command that may be stopped anywhere and called again: smoke test first, then what the
# machine can do, the operators beside their peers, sweeps of the plans' numbers, sanitizers. Each step is bounded in
# time and writes as it goes; a second call with the same folder goes on with what is not finished.
#
#   benchmarks/gpu_record.sh                     all steps for at most 9 minutes, into build/gpu-record/
#   benchmarks/gpu_record.sh --bundle X.tar.gz   and all records so far in one file, at any time
#   benchmarks/gpu_record.sh --help              the steps and options
#
# PYTHON picks the interpreter; it needs torch, and nvcc on PATH or under CUDA_HOME for the step `ceilings`. Exit
# status: 0 all passed, 1 something failed, was wrong or was not reached, 2 no CUDA device, 143 stopped by SIGTERM.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-}
if [ -z "$python" ]; then
  if [ -x .venv/bin/python ]; then python=.venv/bin/python; else python=python3; fi
fi
exec "$python" benchmarks/gpu/gpu_record.py "$@"
