"""Pictures of a suite: accuracy while training; bars where many branches are compared."""

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
MANY = 4  # more branches than these are bars: so many curves cannot be told apart


def save(head: dict, groups: Sequence[Runs], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels: dict[str, list[Runs]] = {}
    for runs in groups:
        panels.setdefault(f"{runs.cell.task['name']}|{runs.row}", []).append(runs)
    has_bars = max(map(len, panels.values())) > MANY
    if has_bars:
        panels = {}
        for runs in groups:
            panels.setdefault(runs.cell.task["name"], []).append(runs)
    columns = 1 if has_bars else min(COLUMNS, len(panels))
    lines = -(-len(panels) // columns)
    heights = [0.6 + 0.2 * len(m) if has_bars else 2.7 for m in panels.values()][::columns]
    size = (9.0 if has_bars else 3.4 * columns, sum(heights) + 0.7)
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    ratios = {"height_ratios": heights}
    axes = figure.subplots(lines, columns, squeeze=False, gridspec_kw=ratios).flatten().tolist()
    for unused in axes[len(panels) :]:
        unused.set_axis_off()
    for ax, (title, members) in zip(axes, panels.items(), strict=False):
        (_draw_bars if has_bars else _draw_curves)(ax, title, members)
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=7, colors=INK)
    kind = "Accuracy at the end." if has_bars else "Held-out accuracy against steps."
    note = f"{head['suite']}: {head['about']}. {kind} "
    note += f"{'Rings' if has_bars else 'Dashed'}: how often retrieval found the answer. "
    note += "Dotted: the paper's plain figure. Reduced: " + "; ".join(head["reduced"]) + "."
    width = 120 if has_bars else 46 * columns
    figure.supxlabel("\n".join(textwrap.wrap(note, width)), fontsize=7, color=INK)
    figure.savefig(path, dpi=110)


def _draw_bars(ax, title: str, members: Sequence[Runs]) -> None:
    most = members[0].row
    usual = most.replace("|", ", ")
    note = f"{title}: {usual}, where nothing else is said"
    ax.set_title(note, loc="right", fontsize=8, color=INK)
    names = []
    for place, runs in enumerate(members):
        is_ours = runs.cell.branch.kind == "resona"
        value, colour = runs.value(runs.metric), OURS_COLOUR if is_ours else COLOURS[2]
        reach = [[value - min(r[runs.metric] for r in runs.results)]]
        reach.append([max(r[runs.metric] for r in runs.results) - value])
        ax.barh(place, value, height=0.7, color=colour, xerr=reach, error_kw={"elinewidth": 0.8})
        if runs.hit != "-":
            ax.plot(float(runs.hit), place, "o", markersize=5, markerfacecolor="none", color=INK)
        row = "" if runs.row == most else runs.row.replace("|", ", ") + ": "
        names.append(f"{row}{runs.variant}, {max(r['steps'] for r in runs.results)} steps")
        theirs = paper.figure(runs.cell)
        if runs.cell.branch.kind == "none" and theirs is not None:
            ax.axvline(theirs, linestyle=":", color=INK, linewidth=0.8)
    ax.set_yticks(range(len(names)), names)
    ax.invert_yaxis()
    ax.set_xlim(0, 1.03)
    ax.grid(axis="x", alpha=0.25)


def _draw_curves(ax, title: str, members: Sequence[Runs]) -> None:
    task, backbone, settings, model = title.split("|")
    ax.set_title(f"{backbone}, {task} {settings}\n{model}", fontsize=8, color=INK)
    colours, ours = iter(COLOURS), iter([OURS_COLOUR])
    for runs in members:
        is_resona = runs.cell.branch.kind == "resona"
        colour = (is_resona and next(ours, None)) or next(colours)
        _draw_runs(ax, runs, colour)
        theirs = paper.figure(runs.cell)
        if runs.cell.branch.kind == "none" and theirs is not None:
            ax.axhline(theirs, linestyle=":", color=colour)
    if members[0].metric == "perplexity":
        ax.set_yscale("log")
    else:
        ax.set_ylim(-0.03, 1.03)
    ax.grid(alpha=0.25)
    ax.legend(fontsize=7, frameon=False)


def _draw_runs(ax, runs: Runs, colour: str) -> None:
    """One curve per random state."""
    column = 1 + Accuracy._fields.index(runs.metric)
    for number, result in enumerate(runs.results):
        points = [(point[0], point[column]) for point in result["curve"]]
        points.append((result["steps"], result[runs.metric]))
        label = runs.variant if number == 0 else None
        ax.plot(*zip(*points, strict=True), "o-", markersize=3, color=colour, label=label)
        if result.get("hits"):
            ax.plot(*zip(*result["hits"], strict=True), "--", linewidth=0.9, color=colour)
