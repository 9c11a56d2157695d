"""The tasks by name. A new one is a frozen dataclass after base.Task, and a line here."""

from __future__ import annotations

from dataclasses import fields

from .base import IGNORED, Batch, Task
from .copying import Copying
from .mad_other import Compression, Memorization, SelectiveCopying
from .mad_recall import FuzzyRecall, InContextRecall, NoisyRecall
from .mqar import Mqar
from .niah import Niah
from .qa import Qa
from .set_disjointness import SetDisjointness
from .text import Text

MAD: tuple[type[Task], ...] = (
    Compression,
    InContextRecall,
    NoisyRecall,
    FuzzyRecall,
    SelectiveCopying,
    Memorization,
)
TASKS: dict[str, type[Task]] = {
    task.name: task for task in (Mqar, *MAD, Copying, Niah, SetDisjointness, Text, Qa)
}

# One variable at a time moves away from the default, MAD's own sweep; "examples" is of the training.
FEWER_EXAMPLES = {"examples": (6400, 3200, 1600, 800)}
RECALL_SWEEP = {"vocabulary": (32, 64, 128), "length": (256, 512, 1024), **FEWER_EXAMPLES}
MAD_SWEEP: dict[str, dict[str, tuple]] = {
    "in-context-recall": RECALL_SWEEP,
    "fuzzy-recall": RECALL_SWEEP,
    "noisy-recall": {
        **RECALL_SWEEP,
        "vocabulary": (48, 80, 144),
        "frac_noise": (0.4, 0.6, 0.8),
    },
    "selective-copying": {
        "vocabulary": (32, 64, 128),
        "length": (512, 1024),
        "copies": (32, 64, 96),
        **FEWER_EXAMPLES,
    },
    "compression": {
        "vocabulary": (32, 64, 128),
        "length": (64, 128, 256),
        **FEWER_EXAMPLES,
    },
    "memorization": {"vocabulary": (512, 1024, 2048, 4096, 8192)},
}


def make_task(settings: dict) -> Task:
    """{"name": ..., setting: value, ...} -> the task.

    Raises:
        ValueError: no such task or setting, or settings that cannot be met, in one line.
    """
    name = settings.get("name")
    if name not in TASKS:
        raise ValueError(f"task: expected one of {', '.join(TASKS)}, got {name!r}")
    rest = {key: value for key, value in settings.items() if key != "name"}
    known = {field.name for field in fields(TASKS[name])}
    for key in rest:
        if key not in known:
            raise ValueError(
                f"{name}: unknown setting {key!r}, expected {', '.join(sorted(known))}"
            )
    return TASKS[name](**rest)


def mad_settings(name: str) -> list[tuple[dict, int | None]]:
    """The default of a MAD task and its difficulty sweep: (task settings, training examples or None)."""
    settings: list[tuple[dict, int | None]] = [({"name": name}, None)]
    for variable, values in MAD_SWEEP[name].items():
        for value in values:
            if variable == "examples":
                settings.append(({"name": name}, value))
            else:
                settings.append(({"name": name, variable: value}, None))
    return settings


__all__ = ["IGNORED", "MAD", "TASKS", "Batch", "Task", "mad_settings", "make_task"]
