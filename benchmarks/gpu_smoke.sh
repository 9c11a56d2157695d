#!/usr/bin/env bash
# The first thing to run on a machine with an NVIDIA GPU, before any benchmark: does the library load, do the
# operators compute what they must, does compute-sanitizer find nothing? It needs the package with its built
# libresona.so, tests/ and a Python with torch; no pip, no network, no pytest, no pybind module.
#
#   benchmarks/gpu_smoke.sh                      all steps in at most 9 minutes, into build/gpu-smoke.json
#   benchmarks/gpu_smoke.sh --help               the options
#
# PYTHON picks the interpreter. Exit status: 0 all passed, 1 something failed or was not reached, 2 no CUDA device,
# 143 stopped by SIGTERM.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-}
if [ -z "$python" ]; then
  if [ -x .venv/bin/python ]; then python=.venv/bin/python; else python=python3; fi
fi
exec "$python" benchmarks/gpu/gpu_smoke.py "$@"
