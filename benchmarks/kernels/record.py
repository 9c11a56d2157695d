"""What a run leaves behind: a JSON record with a machine header, and the same rows as CSV.

The record is written anew after every case, to a temporary file that then takes its place, so an
interrupted run leaves the finished cases. `complete` tells whether the suite was run to its end.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import platform
import shlex
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

import torch

import resona_ext
from resona_ext.cli import machine

SCHEMA = 1
ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Record:
    header: dict
    ceilings: dict = field(default_factory=dict)  # bytes/s and FLOP/s
    baselines: dict[str, str] = field(default_factory=dict)  # name -> "used" or why not
    selection: dict[str, dict] = field(default_factory=dict)  # case id -> data.locality
    rows: dict[str, dict] = field(default_factory=dict)  # id -> everything about one contender
    complete: bool = False

    def resume(self, earlier: dict) -> bool:
        """Goes on with the rows of an earlier record, if that was of the same build of the same commit."""
        if not same_build(earlier["machine"], self.header):
            return False
        self.rows, self.selection = earlier["rows"], earlier["selection"]
        self.ceilings = earlier["ceilings"]
        return True

    def has(self, case: str) -> bool:
        return any(id.startswith(f"{case}/") for id in self.rows)

    def add(self, row: dict) -> None:
        self.rows[row["id"]] = {key: value for key, value in row.items() if key != "id"}

    def as_json(self) -> dict:
        return {
            "schema": SCHEMA,
            "complete": self.complete,
            "machine": self.header,
            "ceilings": self.ceilings,
            "baselines": self.baselines,
            "selection": self.selection,
            "rows": self.rows,
        }

    def write(self, prefix: Path) -> None:
        prefix.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path_of(prefix, "json"), json.dumps(self.as_json(), indent=1) + "\n")
        names = list(dict.fromkeys(name for row in self.rows.values() for name in row))
        target = path_of(prefix, "csv")
        temporary = target.with_name(target.name + ".part")
        with temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["id", *names], restval="")
            writer.writeheader()
            writer.writerows({"id": key, **row} for key, row in self.rows.items())
        os.replace(temporary, target)


def same_build(one: dict, other: dict) -> bool:
    """By the headers of two records: the same code, on the same kind of machine."""
    facts = ("commit", "library", "torch", "device", "gpu", "cpu", "threads")
    return all(one.get(fact) == other.get(fact) for fact in facts)


def count_failures(rows: Iterable[dict], baselines: Iterable[str]) -> int:
    """Results of ours that were wrong or raised."""
    ours = (row for row in rows if row["contender"] not in baselines)
    return sum(row["status"] in ("wrong", "error") for row in ours)


def path_of(prefix: Path, ending: str) -> Path:
    """Beside the prefix; a dot in its name is part of the name."""
    return prefix.with_name(f"{prefix.name}.{ending}")


def load(path: Path) -> dict:
    return json.loads(path.read_text())


def replace_file(target: Path, text: str) -> None:
    temporary = target.with_name(target.name + ".part")
    temporary.write_text(text)
    os.replace(temporary, target)


def header(argv: list[str], device: str) -> dict:
    """Everything about the machine that a reader of the figures must know."""
    facts = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": "python -m benchmarks.kernels " + shlex.join(map(_without_folder, argv)),
        "commit": commit(ROOT),
        "library": library_hash(),
        "resona_ext": resona_ext.__version__,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "device": device,
        "cpu": machine.cpu_model(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_mhz": _cpu_mhz(),
        "load_average": [round(x, 2) for x in os.getloadavg()]
        if hasattr(os, "getloadavg")
        else None,
    }
    if device == "cuda":
        facts["gpu"] = machine.cuda_devices()[0]
        facts["gpu_state"] = _gpu_state()
    return facts


def commit(root: Path) -> str:
    """The commit of the tree, "-dirty" behind it if files differ from it; "unknown" without git.

    A copy without its history may be told by RESONA_COMMIT.
    """
    if os.environ.get("RESONA_COMMIT"):
        return os.environ["RESONA_COMMIT"]
    try:
        name = _git(root, "rev-parse", "--short=12", "HEAD")
        return name + ("-dirty" if _git(root, "status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def library_hash() -> str:
    """Of the compiled operators: which build the figures are of."""
    library = Path(resona_ext.__file__).parent / "libresona.so"
    return hashlib.sha256(library.read_bytes()).hexdigest()[:16]


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=20)
    return done.stdout.strip()


def _without_folder(argument: str) -> str:
    """Records tell nothing of where things lie on a machine."""
    return Path(argument).name if Path(argument).is_absolute() else argument


def _cpu_mhz() -> float | None:
    """The highest clock of all cores just now, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return max(float(line.split(":")[1]) for line in lines if line.startswith("cpu MHz"))
    except (OSError, ValueError):
        return None


def _gpu_state() -> dict[str, str] | None:
    """Driver, clocks, power limit and temperature, as nvidia-smi tells them."""
    fields = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.limit")
    fields += ("temperature.gpu", "persistence_mode")
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "--id=0"]
    try:
        answer = subprocess.run(command, check=True, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return dict(zip(fields, (x.strip() for x in answer.stdout.strip().split(",")), strict=False))
