# Everything runs in .venv, made from the pinned versions in constraints.txt; no CUDA and no GPU needed.
# PYTHON picks the interpreter (>= 3.10). RESONA_USE_CUDA, TORCH_CUDA_ARCH_LIST, MAX_JOBS and pip's own variables
# are honoured. The CUDA kernels build where nvcc is on PATH, under CUDA_HOME, or brought by `make cuda-toolkit`.

PYTHON ?= python3
BIN := .venv/bin
# Of `make wheel` and `make cuda-toolkit`. 13.0, the oldest 13: every driver that runs CUDA 13 can translate the PTX
# it writes.
CUDA ?= 13.0
# Processes that run the tests, and not one for each core: most tests use several threads, which sleep where they
# wait (OMP_WAIT_POLICY) and leave the core to the other process.
WORKERS ?= 2
SETTINGS := $(PYTHON) $(RESONA_USE_CUDA) $(RESONA_PYBIND) $(CMAKE_ARGS) $(TORCH_CUDA_ARCH_LIST) \
  $(CUDACXX) $(CUDA_HOME) $(shell command -v nvcc 2>/dev/null) $(wildcard build/cuda-toolkit/*/.ready)
CPP := find csrc tests benchmarks -name '*.h' -o -name '*.cpp' -o -name '*.cuh' -o -name '*.cu' -o -name '*.inc'
SOURCES := $(shell find csrc -type f) CMakeLists.txt setup.py pyproject.toml resona_ext/version.py

.DEFAULT_GOAL := help
.PHONY: help build demo test bench cuda-toolkit wheel lint format clean FORCE

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

build: resona_ext/libresona.so  ## compile the operators and install the package into .venv

demo: build  ## train, search a document, time the operator, save demo.png
	$(BIN)/python -m resona_ext demo

test: build  ## run all tests; WORKERS=1 for one after the other
	$(BIN)/python tests/simt/harness.py
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile

bench: build  ## time the operator against its peers; ARGS="--help" lists the options
	$(BIN)/python -m benchmarks.kernels $(ARGS)

cuda-toolkit: .venv/.ready  ## bring nvcc as pip packages, used where no other is found; CUDA=13.0 chooses
	$(BIN)/python -m tools.wheel --toolkit $(CUDA)

wheel: .venv/.ready  ## build a wheel into dist/; CUDA=cpu, 13.0, 13.1, ... chooses
	$(BIN)/python -m tools.wheel --cuda $(CUDA) $(ARGS)

lint: .venv/.ready  ## check style of Python and C++
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $$($(CPP))

format: .venv/.ready  ## rewrite Python and C++ in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$($(CPP))

clean:  ## remove build products and the environment
	rm -rf .venv build dist resona_ext.egg-info resona_ext/*.so demo.png

# The constraints hold in build environments too, for what comes as a source package; older and newer pip go by
# different variables.
.venv/.ready: constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 10) else "resona_ext: expected Python >= 3.10, got " + sys.version)'
	$(PYTHON) -m venv .venv || { echo "resona_ext: '$(PYTHON) -m venv' failed; on Debian install python3-venv"; exit 1; }
	PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --quiet -r constraints.txt
	@touch $@

resona_ext/libresona.so: .venv/.ready build/.settings $(SOURCES)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pip install --quiet --no-build-isolation --no-deps -e .
	@touch $@

# Changes when a setting that the build depends on does.
build/.settings: FORCE
	@mkdir -p build
	@echo "$(SETTINGS)" | cmp -s - $@ || echo "$(SETTINGS)" > $@
