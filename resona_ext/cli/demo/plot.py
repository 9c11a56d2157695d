"""One picture of what the demo measured: recall on the left, time on the right."""

from __future__ import annotations

import textwrap
from pathlib import Path

from .. import machine
from .timing import Row
from .training import Result

PLAIN, AUGMENTED, INK = "#8a8f98", "#c8442c", "#2b2d31"


def save(path: Path, results: list[Result], rows: list[Row], caption: str) -> None:
    """Write a PNG with the panels for which there is data."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [draw for draw, data in ((_recall, results), (_time, rows)) if data]
    figure = Figure(figsize=(6.4 * len(panels), 5.0), layout="constrained")
    FigureCanvasAgg(figure)
    for draw, axes in zip(panels, figure.subplots(1, len(panels), squeeze=False)[0], strict=True):
        draw(axes, results if draw is _recall else rows)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=INK, which="both")
    caption = "\n".join(
        textwrap.wrap(f"{caption} Measured on {machine.summary()}.", 85 * len(panels))
    )
    figure.supxlabel(caption, fontsize=8, color=INK)
    figure.savefig(path, format="png", dpi=150)


def _recall(axes, results: list[Result]) -> None:
    colours = dict(zip((result.name for result in results), (PLAIN, AUGMENTED), strict=True))
    for result in results:
        colour = colours[result.name]
        final = result.final
        axes.plot(
            result.steps,
            [accuracy.token for accuracy in result.curve],
            color=colour,
            linewidth=2,
            label=f"{result.name}: queries right, {final.token:.3f} at the end",
        )
        axes.plot(
            result.steps,
            [accuracy.exact for accuracy in result.curve],
            color=colour,
            linewidth=1.5,
            linestyle="--",
            label=f"{result.name}: whole sequences right, {final.exact:.3f}",
        )
    axes.set(
        title="Associative recall (MQAR), same steps for both",
        xlabel="training steps",
        ylabel="accuracy on held-out sequences",
        ylim=(-0.03, 1.05),
    )
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8.5, loc="center right")


def _time(axes, rows: list[Row]) -> None:
    for dtype in dict.fromkeys(row.dtype for row in rows):
        own = [row for row in rows if row.dtype == dtype]
        length = [row.length for row in own]
        style = {"marker": "o", "markersize": 4, "linestyle": "-" if dtype == "float32" else ":"}
        attention = [row.attention_seconds for row in own]
        operator = [row.operator_seconds for row in own]
        axes.plot(length, attention, color=PLAIN, label=f"causal SDPA, {dtype}", **style)
        axes.plot(length, operator, color=AUGMENTED, label=f"retrieve_attend, {dtype}", **style)
        if dtype == "float32":
            _annotate_ratios(axes, own)
    lengths = sorted({row.length for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths], fontsize=8)
    axes.minorticks_off()
    axes.set(
        title="Forward time; figures: SDPA / retrieve_attend, float32",
        xlabel="tokens",
        ylabel="seconds per call (median)",
    )
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8.5, loc="upper left")


def _annotate_ratios(axes, rows: list[Row]) -> None:
    for row in rows:
        low, high = sorted((row.operator_seconds, row.attention_seconds))
        axes.plot([row.length] * 2, [low, high], color=INK, linewidth=0.6, alpha=0.5, zorder=0)
        axes.annotate(
            f"{row.ratio:.1f}x",
            (row.length, high),
            xytext=(0, 6),
            textcoords="offset points",
            ha="center",
            fontsize=8.5,
            color=INK,
        )
