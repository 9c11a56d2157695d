"""The model from 64K to 100M tokens on 1 to 1,024 devices: a table for the record, and a picture."""

from __future__ import annotations

from itertools import product
from pathlib import Path

from . import model
from .model import Problem

LENGTHS = {"64K": 2**16, "1M": 2**20, "8M": 2**23, "100M": 10**8}
RANKS = tuple(2**i for i in range(11))
KV_HEADS = (16, 2)
COLOURS = ("#33658a", "#c8442c", "#4a8f5b", "#7a5195")


def table(constants: dict) -> dict:
    rows = {}
    for pattern, kv_heads, name, ranks in product(constants, KV_HEADS, LENGTHS, RANKS):
        c = model.cost(Problem(LENGTHS[name], ranks, kv_heads=kv_heads, **constants[pattern]))
        rows[f"model/{pattern}/Hkv{kv_heads}/{name}/W{ranks}"] = {
            "search_flops": c["flops"]["search"],
            "attend_flops": c["flops"]["attend"],
            "embeddings_bytes": c["embeddings"] / ranks,
            "chunks_bytes": round(c["moved"]["chunks"]["forward"] / ranks),
            "queries_bytes": round(c["moved"]["queries"]["forward"] / ranks),
            "best": c["best"],
        }
    return rows


def draw(constants: dict, path: Path) -> None:
    """Per device and forward pass: operations, and bytes by the better exchange."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = table(constants)
    figure, (work, moved) = plt.subplots(1, 2, figsize=(9, 3.8))
    for colour, name in zip(COLOURS, LENGTHS, strict=True):
        every = [rows[f"model/random/Hkv16/{name}/W{w}"] for w in RANKS]
        search, attention = (
            [row[key] for row in every] for key in ("search_flops", "attend_flops")
        )
        work.plot(RANKS, search, "-", color=colour, label=f"{name} tokens")
        work.plot(RANKS, attention, "--", color=colour)
        for case, line in (("random/Hkv16", "-"), ("correlated/Hkv2", "--")):
            _sent(moved, [rows[f"model/{case}/{name}/W{w}"] for w in RANKS], line, colour)
        gathered = [row["embeddings_bytes"] for row in every]
        moved.plot(RANKS[1:], gathered[1:], ":", color=colour, linewidth=1)
    work.set(title="operations (— search, - - attention)", ylabel="FLOPs per device")
    moved.set(
        title="sent (— random, - - correlated and Hkv = 2, ··· embeddings)",
        ylabel="bytes per device",
    )
    for axis in (work, moved):
        axis.title.set_fontsize(9)
        axis.set(xscale="log", yscale="log", xlabel="devices")
        axis.set_xticks(RANKS[::2], [str(w) for w in RANKS[::2]])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    work.legend(frameon=False, fontsize=8)
    shape = "H = Hkv = 16, D = E = 128, R = 1, S = 64, k = 8, 16 bits"
    marks = "circles: chunks travel, squares: queries"
    figure.suptitle(f"One layer, forward, by the model ({shape}; {marks})", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _sent(axis, rows: list[dict], line: str, colour: str) -> None:
    """Bytes by the better exchange, marked by which it is."""
    values = [row[f"{row['best']}_bytes"] for row in rows]
    axis.plot(RANKS[1:], values[1:], line, color=colour, linewidth=1)
    for exchange, marker in (("chunks", "o"), ("queries", "s")):
        at = [i for i in range(1, len(RANKS)) if rows[i]["best"] == exchange]
        x, y = [RANKS[i] for i in at], [values[i] for i in at]
        axis.plot(x, y, marker, color=colour, markersize=3, markerfacecolor="white")
