"""Corollary B.2 measured: what a state of fixed size forgets, and what retrieval reads back.

n pairs of a random unit key and a random unit value, d numbers each, are stored and each is read by its
key. The relative error ||read - value|| / ||value||, averaged over pairs and trials, of

    sum        H = sum of v_i k_i^T, read H k: an error of sqrt((n - 1) / d) is expected
    delta      the delta rule, b = 1: the newest pair is read without error, older ones less and less
    bound      the corollary's bound for "sum": the sum over i of |<k_i, k>|
    retrieval  resona::retrieve over chunks of one pair: the value of the chunk found
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from resona_ext import pool_chunks, retrieve

from .backbones.recurrences import delta_rule

READERS = ("sum", "delta", "bound", "retrieval")
DIM = 64
PAIRS = (2, 4, 8, 16, 32, 64, 128, 256)
TRIALS = 16


def read_errors(dim: int, pairs: int, trials: int, generator: torch.Generator) -> dict[str, float]:
    """The mean relative error of every reader."""
    key, value = F.normalize(torch.randn(2, trials, pairs, dim, generator=generator), dim=-1)
    overlap = key @ key.mT
    errors = {
        "sum": _error(overlap @ value, value),
        "delta": _error(_read_delta(key, value), value),
        "bound": (overlap.abs().sum(dim=-1) - 1).mean().item(),
        "retrieval": _error(_read_retrieved(key, value), value),
    }
    return {name: round(error, 6) for name, error in errors.items()}


def _error(read: Tensor, value: Tensor) -> float:
    return (read - value).norm(dim=-1).mean().item()


def _read_delta(key: Tensor, value: Tensor) -> Tensor:
    """Write all pairs, then read them: reads write nothing, as their b is 0."""
    steps = key.shape[1]
    both = torch.cat([key, key], dim=1).unsqueeze(1)
    written = torch.cat([value, torch.zeros_like(value)], dim=1).unsqueeze(1)
    beta = torch.cat([torch.ones(steps), torch.zeros(steps)]).expand(len(key), 1, -1)
    return delta_rule(both, both, written, beta)[:, 0, steps:]


def _read_retrieved(key: Tensor, value: Tensor) -> Tensor:
    """Chunks [k_i, v_i]; the queries stand behind the last of them."""
    trials, pairs, dim = key.shape
    context = torch.stack([key, value], dim=2).view(trials, 2 * pairs, 1, dim)
    room = torch.zeros(trials, pairs, 1, dim)  # where the queries stand
    chunk = pool_chunks(torch.cat([context, room], dim=1), chunk_size=2)
    length = context.shape[1] + pairs
    found, _ = retrieve(key.unsqueeze(2), chunk, chunk_size=2, top_k=1, context_length=length)
    index = found[:, :, 0, 0].long().clamp(max=pairs - 1)
    return value.gather(1, index.unsqueeze(-1).expand_as(value))


def run(folder: Path) -> dict:
    """Measure, write capacity.json and capacity.png, and return the record."""
    generator = torch.Generator().manual_seed(0)
    rows = {f"pairs={n}": read_errors(DIM, n, TRIALS, generator) for n in PAIRS}
    record = {"about": "Corollary B.2: relative read error", "dim": DIM, "rows": rows}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "capacity.json").write_text(json.dumps(record, indent=1) + "\n")
    _plot(rows, folder / "capacity.png")
    return record


def table(record: dict) -> str:
    lines = [f"{'pairs':>6}" + "".join(f"{name:>11}" for name in READERS)]
    for name, errors in record["rows"].items():
        numbers = "".join(f"{errors[reader]:>11.3f}" for reader in READERS)
        lines.append(f"{name.removeprefix('pairs='):>6}{numbers}")
    return "\n".join([f"relative read error, {record['dim']} dimensions", *lines])


def _plot(rows: dict[str, dict[str, float]], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from ..kernels.plots import COLOURS, OURS_COLOUR

    figure = Figure(figsize=(5.2, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    ax = figure.subplots()
    for reader, colour in zip(READERS, (*COLOURS[:3], OURS_COLOUR), strict=True):
        errors = [errors[reader] for errors in rows.values()]
        style = ":" if reader == "bound" else "-"
        ax.plot(PAIRS, errors, style, marker="o", markersize=3, color=colour, label=reader)
    ax.set_xscale("log", base=2)
    ax.set_ylim(-0.05, 2.5)
    ax.set_xlabel(f"pairs stored, {DIM} dimensions")
    ax.set_ylabel("relative read error")
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(alpha=0.25)
    ax.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=110)
