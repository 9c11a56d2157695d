"""Runs a function in several processes, and brings back what each returned or raised.

The processes are forked from one that has imported torch and nothing else has run in: to import it again
in each would take longer than most tests.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT = timedelta(seconds=60)
PRELOAD = ("torch", "torch.distributed.tensor", "resona_ext.distributed")


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _main(
    rank: int,
    ranks: int,
    port: int,
    folder: str,
    backend: str,
    function: Callable,
    arguments: tuple,
):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(backend, rank=rank, world_size=ranks, timeout=TIMEOUT)
    try:
        result = ("returned", function(rank, ranks, *arguments))
    except Exception as error:
        result = ("raised", f"{type(error).__name__}: {error}", traceback.format_exc())
    Path(folder, str(rank)).write_bytes(pickle.dumps(result))
    dist.destroy_process_group()


def run(
    ranks: int, function: Callable, *arguments, folder: Path, backend: str = "gloo"
) -> list[tuple]:
    """("returned", value) or ("raised", text, traceback) of each rank."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = (ranks, _free_port(), str(folder), backend, function, arguments)
    multiprocessing.set_forkserver_preload(list(PRELOAD))
    mp.start_processes(_main, settings, ranks, join=True, start_method="forkserver")
    return [pickle.loads(Path(folder, str(rank)).read_bytes()) for rank in range(ranks)]
