"""The figures of the paper (arXiv 2503.22913): Table 9 (MQAR), Table 1 (MAD) and Table 3 (questions)."""

from __future__ import annotations

from .config import Cell
from .data import hub

WIDTHS = (32, 64, 128, 256)
LENGTHS = (64, 128, 256, 512)

# Accuracy by length, then width. The table heads its columns "KV Pairs 32 .. 256", which must be widths:
# 32 pairs do not fit into 64 tokens. With Resona every cell is 1.000.
MQAR: dict[str, tuple[tuple[float, ...], ...]] = {
    "baseconv": (
        (0.401, 0.439, 0.805, 0.960),
        (0.051, 0.115, 0.469, 0.948),
        (0.017, 0.046, 0.076, 0.549),
        (0.003, 0.007, 0.015, 0.023),
    ),
    "h3": (
        (0.861, 0.892, 0.991, 0.991),
        (0.225, 0.477, 0.974, 0.965),
        (0.094, 0.409, 0.303, 0.896),
        (0.003, 0.007, 0.038, 0.078),
    ),
    "hyena": (
        (0.430, 0.874, 0.922, 0.972),
        (0.051, 0.501, 0.646, 0.840),
        (0.018, 0.089, 0.313, 0.928),
        (0.002, 0.007, 0.053, 0.173),
    ),
    "rwkv": (
        (0.727, 0.955, 0.992, 0.953),
        (0.216, 0.451, 0.807, 0.986),
        (0.066, 0.093, 0.435, 0.820),
        (0.001, 0.002, 0.005, 0.010),
    ),
    "mamba": (
        (0.987, 0.992, 0.975, 0.990),
        (0.906, 0.992, 0.991, 0.920),
        (0.864, 0.990, 0.990, 0.991),
        (0.000, 0.419, 0.968, 0.000),
    ),
    "mamba2": (
        (0.990, 0.992, 0.991, 0.993),
        (0.974, 0.969, 0.992, 0.991),
        (0.755, 0.000, 0.991, 0.592),
        (0.000, 0.000, 0.001, 0.000),
    ),
}
MQAR_WITH_RESONA = 1.0
RWKV = {"rwkv5": "rwkv"}  # the table does not say which RWKV

MAD_TASKS = (
    "compression",
    "in-context-recall",
    "noisy-recall",
    "fuzzy-recall",
    "selective-copying",
    "memorization",
)
# Per cent, plain and with Resona.
MAD: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "mamba": ((38.3, 76.7, 74.9, 9.3, 33.2, 88.5), (38.2, 99.9, 100.0, 63.4, 42.7, 88.8)),
    "mamba2": ((43.6, 96.4, 96.7, 21.1, 93.3, 86.9), (46.6, 100.0, 100.0, 62.9, 93.6, 88.1)),
    "rwkv5": ((36.8, 96.4, 96.6, 12.1, 52.7, 55.0), (40.4, 99.7, 99.8, 59.7, 58.0, 70.6)),
    "hyena": ((42.2, 79.3, 77.4, 9.96, 72.8, 88.9), (42.6, 99.9, 99.9, 66.2, 74.3, 89.0)),
}

# Mamba, of a size that the paper does not give: BLEU, ROUGE-L, METEOR, F1 in per cent, plain and with Resona.
ANSWERS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "triviaqa": ((28.3, 66.0, 44.8, 40.2), (30.7, 68.0, 45.6, 41.8)),
    "coqa": ((35.5, 73.0, 49.3, 60.6), (44.3, 75.0, 52.2, 61.2)),
    "narrativeqa": ((12.6, 47.0, 34.7, 34.7), (13.2, 50.0, 36.9, 36.2)),
}


def answers(cell: Cell) -> tuple[float, ...] | None:
    """The scores of the paper's Mamba on a data set that is tested on by its name; None for others."""
    name, _, _ = cell.task.get("test", "").removeprefix(hub.PREFIX).partition(":")
    if not (cell.is_pretrained and hub.is_hub(cell.task["test"]) and name in ANSWERS):
        return None
    return ANSWERS[name][cell.branch.kind == "resona"]


def _is_their_branch(cell: Cell) -> bool:
    """In the first or third layer, one chunk of two tokens, and nothing of our own."""
    branch = cell.branch
    return branch.layer in (0, 2) and branch.options == {"chunk_size": 2, "top_k": 1}


def figure(cell: Cell) -> float | None:
    """The paper's accuracy, 0 to 1, for a cell with Resona or without any branch; None if it has none."""
    has_resona = cell.branch.kind == "resona"
    if not has_resona and cell.branch.kind != "none":
        return None
    task, name = cell.task, cell.task["name"]
    if name == "mqar":
        row = MQAR.get(RWKV.get(cell.backbone, cell.backbone))
        length, is_theirs = task.get("length", 64), 16 * task.get("pairs", 4)
        if has_resona and not _is_their_branch(cell):
            return None
        if row is None or length != is_theirs or length not in LENGTHS or cell.width not in WIDTHS:
            return None
        plain = row[LENGTHS.index(length)][WIDTHS.index(cell.width)]
        return MQAR_WITH_RESONA if has_resona else plain
    is_default = set(task) == {"name"}
    if name in MAD_TASKS and is_default and cell.backbone in MAD:
        return MAD[cell.backbone][has_resona][MAD_TASKS.index(name)] / 100
    return None
