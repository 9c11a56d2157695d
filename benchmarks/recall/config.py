"""What is run: a cell is one model trained once on one task; a grid is a JSON file of cells.

    {"suite": "name", "about": "...", "reduced": ["what is less than in the paper"],
     "defaults": {a cell}, "cells": [{changes}, ...]}

In `cells` a list is an axis: every combination of its values is a cell. Objects change only what they name;
an object inside a list is one value of its axis. The order of the file is the order of the runs.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from resona_ext.cli.errors import CliError

from .backbones import BACKBONES, PRETRAINED
from .tasks import Task, make_task

BRANCHES = ("none", "resona", "window", "mlp")


@dataclass(frozen=True)
class Branch:
    """What stands beside the mixer of one layer.

    kind: "none"; "resona"; "window": the same with the last top_k chunks in place of those retrieved;
    "mlp": a SwiGLU with as many parameters, the baseline of equal size.
    layer: which block, from 0, several as "8,9,10", or "spread": the first, the middle and the last.
    options: any argument of resona_ext.Resona; of resona_ext.augment with a pretrained model.
    """

    kind: str = "none"
    layer: int | str = 0
    heads: int = 1
    options: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Training:
    """examples: size of the training set, shuffled every epoch; None draws every batch anew.

    stop_at: ends a run whose metric (the task's) on held-out data reaches it. at: settings of the
    trained branch to be tested as well, {"top_k": [1, 2], "alpha": [...]}. branch_rate: the learning rate
    of the branches, where it is another.
    """

    examples: int | None = 20_000
    steps: int = 300
    batch: int = 64
    learning_rate: float = 1e-2
    weight_decay: float = 0.1
    final_rate: float = 0.0
    test_examples: int = 1000
    held_out: int = 256
    evaluate_every: int = 50
    stop_at: float | None = 0.999
    bfloat16: bool = False
    at: dict = field(default_factory=dict)
    branch_rate: float | None = None


@dataclass(frozen=True)
class Cell:
    task: dict
    backbone: str
    width: int = 64
    layers: int = 2
    heads: int = 2
    mlp: int = 0  # hidden width of a SwiGLU behind every mixer; 0: none
    window: int = 16  # of backbones that have one
    embedding_std: float = 0.3
    linear_std: float | None = None  # of the mixers' weights, as in Zoology; None: their own
    dropout: float = 0.0  # of the embeddings
    tied: bool = True  # head and embedding
    branch: Branch = Branch()
    training: Training = Training()
    seed: int = 0

    def make_task(self) -> Task:
        return make_task(self.task)

    @property
    def branch_layers(self) -> tuple[int, ...]:
        if self.branch.layer == "spread":
            return tuple(sorted({0, self.layers // 2, self.layers - 1}))
        return tuple(int(layer) for layer in str(self.branch.layer).split(","))

    @property
    def id(self) -> str:
        """The same for equal cells, whatever file they come from."""
        settings = asdict(self)
        # Newer than the first records, whose names stay.
        for place, name in ((settings["training"], "branch_rate"), (settings, "linear_std")):
            if place[name] is None:
                del place[name]
        text = json.dumps(settings, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @property
    def label(self) -> str:
        task = " ".join(f"{key}={value}" for key, value in self.task.items() if key != "name")
        where = "" if self.branch.kind == "none" else f" + {self.branch.kind}@{self.branch.layer}"
        size = "" if self.is_pretrained else f" d{self.width} x{self.layers}"
        return f"{self.task['name']} {task} {self.backbone}{where}{size} seed {self.seed}"

    @property
    def is_pretrained(self) -> bool:
        return self.backbone == PRETRAINED.name


@dataclass(frozen=True)
class Grid:
    suite: str
    about: str
    reduced: tuple[str, ...]
    cells: tuple[Cell, ...]


def make_cell(settings: dict) -> Cell:
    """A dictionary as in a grid, axes resolved -> a checked cell. Raises CliError, one line."""
    settings = dict(settings)
    for name, kind in (("branch", Branch), ("training", Training)):
        if name in settings:
            settings[name] = kind(**_known(kind, settings[name], f"{name}."))
    for name in ("task", "backbone"):
        _require(name in settings, f"{name}: missing")
    cell = Cell(**_known(Cell, settings, ""))
    _check(cell)
    return cell


def _check(cell: Cell) -> None:
    known = (*BACKBONES, PRETRAINED.name)
    _require(
        cell.backbone in known,
        f"backbone: expected one of {', '.join(known)}, got {cell.backbone!r}",
    )
    kind, layer, training = cell.branch.kind, cell.branch.layer, cell.training
    _require(kind in BRANCHES, f"branch.kind: expected one of {', '.join(BRANCHES)}, got {kind!r}")
    numbers = [int(n) if n.isdecimal() else -1 for n in str(layer).split(",")]
    count = cell.layers if not cell.is_pretrained else max(numbers) + 1  # augment will check it
    inside = layer == "spread" or all(0 <= n < count for n in numbers)
    expected = f'0 to {cell.layers - 1} or "spread"'
    _require(inside, f"branch.layer: expected {expected}, got {layer}")
    for name in ("steps", "batch", "test_examples", "held_out", "evaluate_every"):
        got = getattr(training, name)
        _require(got >= 1, f"training.{name}: expected at least 1, got {got}")
    _require(
        training.examples is None or training.examples >= 1,
        f"training.examples: expected at least 1 or null, got {training.examples}",
    )
    _require(
        cell.heads >= 1 and cell.width % cell.heads == 0,
        f"heads: expected a divisor of width {cell.width}, got {cell.heads}",
    )
    if cell.is_pretrained:
        _require(
            cell.task.get("name") == "qa" and bool(cell.task.get("model")),
            "backbone: pretrained: expected a qa task with task.model, the model's folder or name",
        )
        _require(
            kind in ("none", "resona"),
            f"branch.kind: expected none or resona in a pretrained model, got {kind}",
        )
    try:
        cell.make_task()
    except (ValueError, TypeError) as error:
        raise CliError(str(error)) from error


def _known(kind: type, settings: dict, prefix: str) -> dict:
    names = [f.name for f in fields(kind)]
    for name in settings:
        _require(name in names, f"{prefix}{name}: unknown setting, expected {', '.join(names)}")
    return settings


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise CliError(message)


def merge(base: dict, changes: dict) -> dict:
    """Objects are merged name by name, but a task of another name starts anew."""
    merged = dict(base)
    for name, value in changes.items():
        old = merged.get(name)
        both = isinstance(old, dict) and isinstance(value, dict)
        anew = name == "task" and both and value.get("name", old.get("name")) != old.get("name")
        merged[name] = merge(old, value) if both and not anew else value
    return merged


def expand(entry: dict) -> list[dict]:
    """Every combination of the lists in an entry; the first name varies slowest.

    Lists inside `training.at` are values, not axes.
    """
    axes = []
    for name, value in entry.items():
        if isinstance(value, list):
            options = [part for item in value for part in _alternatives(name, item)]
        else:
            options = _alternatives(name, value)
        axes.append([(name, option) for option in options])
    return [dict(choice) for choice in itertools.product(*axes)]


def _alternatives(name: str, value: object) -> list:
    return expand(value) if isinstance(value, dict) and name != "at" else [value]


def read_grid(path: Path) -> Grid:
    """Raises CliError, one line, where the file is not a grid."""
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise CliError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise CliError(f"{path} is not JSON: {error}") from error
    known = {"suite", "about", "reduced", "defaults", "cells"}
    _require(isinstance(content, dict), f"{path}: expected an object")
    for name in content:
        _require(name in known, f"{path}: unknown entry {name!r}, expected {sorted(known)}")
    for name in ("suite", "cells"):
        _require(name in content, f"{path}: {name!r} is missing")
    cells = []
    for number, entry in enumerate(content["cells"]):
        for settings in expand(entry):
            try:
                cells.append(make_cell(merge(content.get("defaults", {}), settings)))
            except CliError as error:
                raise CliError(f"{path}: cells[{number}]: {error}") from error
    return Grid(
        content["suite"],
        content.get("about", ""),
        tuple(content.get("reduced", ())),
        tuple({cell.id: cell for cell in cells}.values()),
    )


def cell_from_json(content: dict) -> Cell:
    """The inverse of dataclasses.asdict."""
    rest = {name: value for name, value in content.items() if name not in ("branch", "training")}
    branch, training = Branch(**content["branch"]), Training(**content["training"])
    return Cell(**rest, branch=branch, training=training)
