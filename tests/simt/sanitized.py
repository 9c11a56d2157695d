"""Cases under AddressSanitizer and UndefinedBehaviorSanitizer."""

from __future__ import annotations

import json
import pickle
import sys
import tempfile
import time
from pathlib import Path

import harness
import pytest
from cases import Case
from harness import Schedule


def run(cases: list[tuple[Case, list[Schedule]]]) -> dict[str, str]:
    """What each case ended with, by name: '' if it passed."""
    if not harness.has_sanitizers():
        pytest.skip(f"{harness.COMPILER} comes without {' and '.join(harness.PRELOADS)}")
    begin = time.perf_counter()
    library = harness.library("asan")
    compiled = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        pickled = Path(folder) / "cases.pkl"
        pickled.write_bytes(pickle.dumps(cases))
        command = [sys.executable, str(harness.HERE / "replay.py"), str(library), str(pickled)]
        lines = harness.check_output(command, env=harness.asan_environment()).splitlines()
    if compiled - begin > 1:
        harness.other_times.append(("asan build, to compile", compiled - begin))
    harness.other_times.append((f"asan build, {len(cases)} cases", time.perf_counter() - compiled))
    return {line["name"]: line["outcome"] for line in map(json.loads, lines)}


def check(cases: list[tuple[Case, list[Schedule]]]) -> None:
    """Every case runs, and nothing is reported."""
    outcomes = run(cases)
    assert len(outcomes) == len(cases)
    failed = {name: outcome for name, outcome in outcomes.items() if outcome}
    assert not failed, "\n".join(f"{name}\n{outcome}" for name, outcome in failed.items())
