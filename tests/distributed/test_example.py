"""The example started by torchrun: two processes print what one prints, digit for digit."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
EXAMPLE = [str(ROOT / "examples" / "context_parallel.py"), "--steps", "4", "--length", "16"]


def output(*command: str) -> list[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(
        [sys.executable, *command, *EXAMPLE],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout.splitlines()


def test_torchrun_prints_what_one_process_prints():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    where = ("--nproc-per-node", "2", "--master-addr", "127.0.0.1", "--master-port", str(port))
    several = output("-m", "torch.distributed.run", *where)
    assert several == output()
    assert several[0].startswith("step    0  loss 6.") and several[-1].startswith("right")
