"""Accuracy while training, one panel per backbone and task: with Resona and without."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..kernels.plots import COLOURS, INK, OURS_COLOUR
from . import paper
from .train import Accuracy

if TYPE_CHECKING:
    from .report import Runs

COLUMNS = 4


def save(head: dict, groups: Sequence[Runs], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels: dict[str, list[Runs]] = {}
    for runs in groups:
        panels.setdefault(f"{runs.cell.task['name']}|{runs.row}", []).append(runs)
    columns = min(COLUMNS, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(3.4 * columns, 2.7 * lines + 0.7), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(lines, columns, squeeze=False).flatten().tolist()
    for unused in axes[len(panels) :]:
        unused.set_axis_off()
    for ax, (title, members) in zip(axes, panels.items(), strict=False):
        _draw(ax, title, members)
    note = f"{head['suite']}: {head['about']}. Held-out accuracy against steps. "
    note += "Dotted: the paper's plain figure. Reduced: " + "; ".join(head["reduced"]) + "."
    figure.supxlabel("\n".join(textwrap.wrap(note, 46 * columns)), fontsize=7, color=INK)
    figure.savefig(path, dpi=110)


def _draw(ax, title: str, members: Sequence[Runs]) -> None:
    task, backbone, settings, model = title.split("|")
    ax.set_title(f"{backbone}, {task} {settings}\n{model}", fontsize=8, color=INK)
    colours = iter(COLOURS)
    for runs in members:
        column = 1 + Accuracy._fields.index(runs.metric)
        colour = OURS_COLOUR if runs.cell.branch.kind == "resona" else next(colours)
        for number, result in enumerate(runs.results):
            points = [(point[0], point[column]) for point in result["curve"]]
            points.append((result["steps"], result[runs.metric]))
            label = runs.variant if number == 0 else None
            steps, values = zip(*points, strict=True)
            ax.plot(steps, values, marker="o", markersize=3, color=colour, label=label)
        theirs = paper.figure(runs.cell)
        if runs.cell.branch.kind == "none" and theirs is not None:
            ax.axhline(theirs, linestyle=":", color=colour)
    if members[0].metric == "perplexity":
        ax.set_yscale("log")
    else:
        ax.set_ylim(-0.03, 1.03)
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize=7, colors=INK)
    ax.grid(alpha=0.25)
    ax.legend(fontsize=7, frameon=False)
