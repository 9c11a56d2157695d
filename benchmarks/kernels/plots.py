"""PNG plots of a record: time and speed-up against length, and where the work stands under the roof."""

from __future__ import annotations

import textwrap
from pathlib import Path

from .operators import OURS
from .record import path_of

INK = "#2b2d31"
OURS_COLOUR = "#c8442c"
COLOURS = ("#33658a", "#6a994e", "#8a8f98", "#9a6fb0", "#d08c2f", "#3a9d9d", "#7a5c45", "#b35d8a")
MARKERS = "osD^vP*X"
COLUMNS = 3


def save(record: dict, prefix: Path) -> list[Path]:
    """Write what the record has data for; the paths of the files."""
    rows = [row for row in record["rows"].values() if row["status"] == "ok"]
    written = []
    panels = _panels(rows)
    if panels:
        written.append(_lengths(record, panels, prefix, "time", "median_ms", "milliseconds"))
        title = f"time / time of {OURS}"
        written.append(_lengths(record, panels, prefix, "speedup", "ratio", title))
    if any(row.get("flops") for row in rows) and record["ceilings"].get("copy"):
        written.append(_roofline(record, rows, prefix))
    return written


def _panels(rows: list[dict]) -> dict[tuple, dict[str, list[dict]]]:
    """Rows that differ in length only, by contender; problems with one length make no curve."""
    fixed = ("operator", "pattern", "dtype", "chunk_size", "top_k", "heads", "kv_heads", "head_dim")
    panels: dict[tuple, dict[str, list[dict]]] = {}
    for row in rows:
        key = tuple(row[name] for name in fixed)
        panels.setdefault(key, {}).setdefault(row["contender"], []).append(row)
    for curves in panels.values():
        for points in curves.values():
            points.sort(key=lambda row: row["length"])
    return {key: c for key, c in panels.items() if max(map(len, c.values())) > 1}


def _figure(panels: int, record: dict, note: str):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(COLUMNS, panels)
    lines = -(-panels // columns)
    figure = Figure(figsize=(5.2 * columns, 4.2 * lines + 0.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(lines, columns, squeeze=False).flatten().tolist()
    for unused in axes[panels:]:
        unused.set_axis_off()
    for ax in axes[:panels]:
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(colors=INK, which="both", labelsize=8)
        ax.grid(alpha=0.25)
    m = record["machine"]
    place = m.get("gpu") or f"{m['cpu']}, {m['threads']} thread{'s' * (m['threads'] != 1)}"
    source = f"{place}, torch {m['torch']}, commit {m['commit']}, {m['date'][:10]}. {note}"
    figure.supxlabel("\n".join(textwrap.wrap(source, 62 * columns)), fontsize=8, color=INK)
    return figure, axes[:panels]


def _colour(names: list[str]) -> dict[str, str]:
    others = [name for name in names if name != OURS]
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(others)}
    return colours | {OURS: OURS_COLOUR}


def _lengths(record: dict, panels: dict, prefix: Path, kind: str, field: str, ylabel: str) -> Path:
    note = "Medians; bars from the least to the largest."
    if kind == "speedup":
        note = f"Medians, calls in turns. Above the line: slower than {OURS}."
    figure, axes = _figure(len(panels), record, note)
    names = list(dict.fromkeys(name for curves in panels.values() for name in curves))
    colours = _colour(names)
    for ax, (key, curves) in zip(axes, panels.items(), strict=True):
        operator, pattern, dtype, chunk, top_k, heads, kv_heads, dim = key
        for name, points in curves.items():
            points = [row for row in points if row.get(field)]
            if not points or (kind == "speedup" and name == OURS):
                continue
            lengths = [row["length"] for row in points]
            values = [row[field] for row in points]
            style = {"color": colours[name], "label": name, "marker": "o", "markersize": 3.5}
            if kind == "time":
                below = [row["median_ms"] - row["min_ms"] for row in points]
                above = [row["max_ms"] - row["median_ms"] for row in points]
                ax.errorbar(lengths, values, yerr=(below, above), capsize=2, linewidth=1.6, **style)
            else:
                ax.plot(lengths, values, linewidth=1.6, **style)
        if kind == "speedup":
            ax.axhline(1, color=OURS_COLOUR, linewidth=1, linestyle="--")
        _log_axes(ax, lengths=sorted({row["length"] for rows in curves.values() for row in rows}))
        grouped = f"{heads}/{kv_heads}" if heads != kv_heads else f"{heads}"
        title = f"{operator}, {dtype}, {pattern}\nS {chunk}, k {top_k}, H {grouped}, D {dim}"
        ax.set_title(title, fontsize=9, color=INK)
        ax.set_xlabel("context tokens", fontsize=8)
        ax.set_ylabel(ylabel, fontsize=8)
        ax.legend(frameon=False, fontsize=7)
    return _write(figure, prefix, kind)


def _log_axes(ax, lengths: list[int]) -> None:
    """Logarithmic, with the lengths as ticks and plain numbers instead of powers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    ax.set_xscale("log", base=2)
    ax.set_xticks(lengths, [f"{n // 1024}K" if n % 1024 == 0 else str(n) for n in lengths])
    ax.set_yscale("log")
    low, high = ax.get_ylim()
    steps = (1.0, 2.0, 5.0) if high / low < 100 else (1.0,)
    ax.yaxis.set_major_locator(LogLocator(base=10, subs=steps))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, position: f"{value:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())


def _roofline(record: dict, rows: list[dict], prefix: Path) -> Path:
    """Operations per compulsory byte against operations per second, one panel per dtype."""
    rates = record["ceilings"]
    rows = [row for row in rows if row.get("flops") and rates.get(f"matmul_{row['dtype']}")]
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    note = "Lines: copy and matmul as measured in the same run. Large marks: the longest context."
    figure, axes = _figure(len(dtypes), record, note)
    operators = list(dict.fromkeys(row["operator"] for row in rows))
    for ax, dtype in zip(axes, dtypes, strict=True):
        chosen = [row for row in rows if row["dtype"] == dtype]
        longest = max(row["length"] for row in chosen)
        colours = _colour(list(dict.fromkeys(row["contender"] for row in chosen)))
        for row in chosen:
            ax.scatter(
                row["flops"] / row["compulsory_bytes"],
                row["flops_per_s"] / 1e9,
                s=60 if row["length"] == longest else 16,
                color=colours[row["contender"]],
                marker=MARKERS[operators.index(row["operator"]) % len(MARKERS)],
                alpha=0.8,
            )
        intensity = [row["flops"] / row["compulsory_bytes"] for row in chosen]
        ridge = rates[f"matmul_{dtype}"] / rates["copy"]
        points = [min(*intensity, ridge) / 2, ridge, max(*intensity, ridge) * 2]
        roof = [min(x * rates["copy"], rates[f"matmul_{dtype}"]) / 1e9 for x in points]
        ax.plot(points, roof, color=INK, linewidth=1.2)
        for i, operator in enumerate(operators):
            ax.scatter([], [], marker=MARKERS[i % len(MARKERS)], color=INK, s=16, label=operator)
        for name in dict.fromkeys(row["contender"] for row in chosen):
            ax.plot([], [], color=colours[name], linewidth=3, label=name)
        ax.set(xscale="log", yscale="log", xlabel="FLOP per compulsory byte", ylabel="GFLOP/s")
        ax.set_title(dtype, fontsize=9, color=INK)
        ax.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return _write(figure, prefix, "roofline")


def _write(figure, prefix: Path, kind: str) -> Path:
    target = path_of(prefix.with_name(f"{prefix.name}-{kind}"), "png")
    figure.savefig(target, format="png", dpi=120)
    return target
