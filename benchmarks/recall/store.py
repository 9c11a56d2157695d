"""Finished cells, one line of JSON each, behind a line that says whose they are.

Lines are appended whole, so an interrupted grid keeps what is finished and several processes may write
to one file.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path

import torch

from resona_ext.cli import machine
from resona_ext.cli.errors import CliError

from ..kernels.record import ROOT, commit
from .config import Cell, Grid

SCHEMA = 1


class Store:
    def __init__(self, path: Path, grid: Grid) -> None:
        """Open or create. Raises CliError where the file is not this suite's."""
        self.path = path
        self.rows: list[dict] = []
        head = {
            "schema": SCHEMA,
            "suite": grid.suite,
            "about": grid.about,
            "reduced": grid.reduced,
        }
        if path.exists() and path.stat().st_size:
            found, self.rows = read(path)
            if found.get("suite") != grid.suite:
                raise CliError(
                    f"{path} holds results of the suite {found.get('suite')!r}, expected "
                    f"{grid.suite!r}: choose another --output"
                )
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            _append(path, head)

    @property
    def finished(self) -> set[str]:
        return {row["id"] for row in self.rows}

    def add(self, cell: Cell, result: dict, device: str) -> None:
        row = {
            "id": cell.id,
            "cell": asdict(cell),
            "result": result,
            "machine": {
                "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                "commit": commit(ROOT),
                "device": machine.summary() if device == "cpu" else machine.cuda_devices()[0],
                "load_average": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
                "torch": torch.__version__,
            },
        }
        self.rows.append(row)
        _append(self.path, row)


def read(path: Path) -> tuple[dict, list[dict]]:
    """The head and the rows. Raises CliError, one line, where it is no such file."""
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise CliError(f"cannot read {path}: {error.strerror}") from error
    content = []
    for number, line in enumerate(lines, start=1):
        try:
            content.append(json.loads(line))
        except ValueError as error:
            raise CliError(f"{path}: line {number} is not JSON ({error})") from error
    if not content or not isinstance(content[0], dict) or content[0].get("schema") != SCHEMA:
        raise CliError(f"{path} is no results file: its first line names no suite")
    return content[0], content[1:]


def _append(path: Path, row: dict) -> None:
    data = (json.dumps(row) + "\n").encode()
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, data)
    finally:
        os.close(descriptor)
