"""Runs pickled cases in a library of the simulator: python replay.py LIBRARY CASES

A process of its own, because AddressSanitizer must be loaded before everything else and ends the process
at the first error. Each case runs in a fork; the outcome of each is one line of JSON.
"""

from __future__ import annotations

import json
import os
import pickle
import sys
import tempfile
from pathlib import Path

from harness import Simulator


def run_forked(check) -> str:
    """'' if all is well, else what was said on the way out."""
    with tempfile.TemporaryFile() as said:
        child = os.fork()
        if child == 0:
            os.dup2(said.fileno(), 2)
            code = 1
            try:
                check()
                code = 0
            except Exception as error:
                print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(code)
        _, status = os.waitpid(child, 0)
        said.seek(0)
        return "" if status == 0 else said.read().decode(errors="replace") or f"status {status}"


def main(library: str, cases: str) -> None:
    sim = Simulator("asan", Path(library), 0.0)
    for case, schedules in pickle.loads(Path(cases).read_bytes()):
        outcome = run_forked(
            lambda case=case, schedules=schedules: [case.check(sim, s) for s in schedules]
        )
        print(json.dumps({"name": case.name, "outcome": outcome}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
