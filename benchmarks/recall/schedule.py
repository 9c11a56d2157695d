"""Several cells at once. Each ends as it would alone: random states are the runs' own.

On a GPU small models leave most of it idle, so several runs of one process take turns, one training step
each, on streams of their own (`taking_turns`). On a CPU each has a process (`in_processes`).
Turns have not been run on a GPU yet; on a CPU they give the results of runs one by one.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from itertools import islice
from pathlib import Path

import torch

from .config import Cell
from .train import Run

FAILURES = (RuntimeError, ValueError)  # of one cell; the others go on
Outcome = tuple[Cell, dict | Exception]  # in the order in which cells end


def run_cells(
    cells: Iterable[Cell], together: int, folder: Path, device: str, threads: int | None
) -> Iterator[Outcome]:
    """Train cells, `together` at a time. A cell is taken from `cells` when its turn has come.

    threads: of each process on a CPU; None: its share of the cores, or torch's choice for one.
    """
    if together == 1 or device == "cuda":
        return taking_turns(cells, together, folder, device)
    return in_processes(
        cells, together, folder, threads or max(1, torch.get_num_threads() // together)
    )


def taking_turns(
    cells: Iterable[Cell], together: int, folder: Path, device: str
) -> Iterator[Outcome]:
    cells = iter(cells)
    under_way: list[tuple[Cell, Iterator[dict | None]]] = []
    while True:
        for cell in islice(cells, together - len(under_way)):
            under_way.append((cell, _turns(cell, folder, device, together)))
        if not under_way:
            return
        for run in list(under_way):
            cell, turns = run
            try:
                outcome = next(turns)
            except FAILURES as error:
                outcome = error
            if outcome is not None:
                under_way.remove(run)
                yield cell, outcome


def _turns(cell: Cell, folder: Path, device: str, together: int) -> Iterator[dict | None]:
    """The model is made at the first turn, so that one that cannot be made is a failed cell."""
    for result in Run(cell, folder, device, has_bar=together == 1).turns():
        yield result if result is None else _noted(result, together)


def in_processes(
    cells: Iterable[Cell], together: int, folder: Path, threads: int
) -> Iterator[Outcome]:
    cells = iter(cells)
    context = multiprocessing.get_context("spawn")
    under_way: dict[Future, Cell] = {}
    with ProcessPoolExecutor(together, context, torch.set_num_threads, (threads,)) as pool:
        while True:
            for cell in islice(cells, together - len(under_way)):
                under_way[pool.submit(_train, cell, folder, together)] = cell
            if not under_way:
                return
            for future in wait(under_way, return_when=FIRST_COMPLETED).done:
                error = future.exception()
                if error is not None and not isinstance(error, FAILURES):
                    raise error
                yield under_way.pop(future), future.result() if error is None else error


def _train(cell: Cell, folder: Path, together: int) -> dict:
    return _noted(Run(cell, folder, has_bar=False).train(), together)


def _noted(result: dict, together: int) -> dict:
    """Seconds of a run that had company are not those of one alone."""
    if together == 1:
        return result
    return {**result, "together": together, "threads": torch.get_num_threads()}
