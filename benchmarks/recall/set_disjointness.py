"""Set disjointness: accuracy against state size, causal against prefix, short list first and long first.

    python -m benchmarks.recall.set_disjointness --out benchmarks/results/set-disjointness-cpu

Each cell is one model of alternating gated convolutions and linear attention, without MLPs or positions,
trained on all pairs of list lengths in turns and tested on each. The paper's sweep (arXiv 2407.05483) is
--preset paper, which wants a GPU; the default is a small one for a CPU, and the record says so.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import shlex
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F

from resona_ext.jrt import JRTConfig, JRTModel

from ..kernels import record
from .tasks.set_disjointness import SetDisjointness

Pair = tuple[int, int]
LEAST_STEPS = 20  # for a warm-up of more than one


@dataclass(frozen=True)
class Sweep:
    """What is run: every kind of model with every width and feature dim."""

    vocabulary: int
    widths: tuple[int, ...]
    feature_dims: tuple[int, ...]
    pairs: tuple[Pair, ...]  # trained and tested
    test_pairs: tuple[Pair, ...]  # tested only
    steps: int
    batch: int
    test_examples: int
    learning_rate: float
    layers: int = 4
    heads: int = 2
    reduced: bool = False


def both(*pairs: Pair) -> tuple[Pair, ...]:
    return tuple(itertools.chain.from_iterable((pair, pair[::-1]) for pair in pairs))


PRESETS = {
    # 12 pairs x 20,000 examples x 48 epochs at batch 128; its three learning rates are --learning-rate
    "paper": Sweep(
        2048,
        (36, 48, 64, 96, 128),
        (4, 8, 16, 24),
        both((4, 16), (8, 32), (16, 64), (4, 128), (16, 256), (4, 256)),
        both((1, 32), (4, 32), (16, 512), (4, 512), (8, 768), (16, 768), (4, 768)),
        steps=90_000,
        batch=128,
        test_examples=1000,
        learning_rate=5e-4,
    ),
    "cpu": Sweep(
        32,
        (32,),
        (2, 4, 8),
        both((2, 8), (4, 16)),
        (),
        steps=1200,
        batch=64,
        test_examples=1000,
        learning_rate=5e-3,
        reduced=True,
    ),
}


@dataclass(frozen=True)
class Cell:
    kind: str  # "causal" or "prefix"
    width: int
    feature_dim: int
    seed: int

    @property
    def id(self) -> str:
        return f"{self.kind}-d{self.width}-f{self.feature_dim}-s{self.seed}"


def cells(sweep: Sweep, seeds: int) -> list[Cell]:
    grid = itertools.product(range(seeds), sweep.feature_dims, sweep.widths, ("causal", "prefix"))
    return [Cell(kind, width, f, seed) for seed, f, width, kind in grid]


def build(cell: Cell, sweep: Sweep) -> JRTModel:
    torch.manual_seed(cell.seed)
    longest = max(sum(pair) + 3 for pair in (*sweep.pairs, *sweep.test_pairs))
    return JRTModel(
        JRTConfig(
            vocabulary=sweep.vocabulary,
            d_model=cell.width,
            num_heads=sweep.heads,
            feature_dim=cell.feature_dim,
            prefix_length=longest if cell.kind == "prefix" else 0,
            mlp_dim=0,
            layers=tuple(itertools.islice(itertools.cycle(("conv", "prefix")), sweep.layers)),
        )
    )


def state_elements(cell: Cell, sweep: Sweep) -> int:
    """Of one sequence, all layers: features x (values + 1) per head. The same for both kinds."""
    features = 1 + cell.feature_dim + cell.feature_dim**2
    per_head = features * (cell.width // sweep.heads + 1)
    return sweep.layers // 2 * sweep.heads * per_head


def train(cell: Cell, sweep: Sweep) -> dict:
    begin = time.process_time()
    model = build(cell, sweep)
    optimizer = torch.optim.AdamW(model.parameters(), sweep.learning_rate, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, sweep.learning_rate, total_steps=sweep.steps, pct_start=0.1
    )
    draw = torch.Generator().manual_seed(cell.seed)
    for step in range(sweep.steps):
        batch = make_task(sweep, sweep.pairs[step % len(sweep.pairs)]).generate(sweep.batch, draw)
        logits = model(batch.tokens)[:, -1]
        loss = F.cross_entropy(logits, batch.labels[:, -1])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    row = {**asdict(cell), "state": state_elements(cell, sweep), "loss": loss.item()}
    row["parameters"] = sum(p.numel() for p in model.parameters())
    for pair in (*sweep.pairs, *sweep.test_pairs):
        row[f"accuracy_{pair[0]}_{pair[1]}"] = accuracy(model, sweep, pair)
    row["cpu_seconds"] = round(time.process_time() - begin, 1)
    return row


def make_task(sweep: Sweep, pair: Pair) -> SetDisjointness:
    return SetDisjointness(sweep.vocabulary, 0, *pair)


@torch.no_grad()
def accuracy(model: JRTModel, sweep: Sweep, pair: Pair) -> float:
    draw = torch.Generator().manual_seed(10_000)  # no training seed
    batch = make_task(sweep, pair).generate(sweep.test_examples, draw)
    found = torch.cat([model(t)[:, -1].argmax(-1) for t in batch.tokens.split(sweep.batch)])
    return (found == batch.labels[:, -1]).float().mean().item()


def _one_thread() -> None:
    torch.set_num_threads(1)


def run(sweep: Sweep, seeds: int, jobs: int, out: Path, command: str) -> dict:
    """Train what the record does not have yet; it is written anew after every cell."""
    path = record.path_of(out, "json")
    result = json.loads(path.read_text()) if path.exists() else {}
    settings = json.loads(json.dumps(asdict(sweep)))
    if result.get("sweep") != settings:
        header = {**record.header([], "cpu"), "command": command}
        result = {"schema": 1, "complete": False, "machine": header, "sweep": settings, "rows": {}}
    todo = [cell for cell in cells(sweep, seeds) if cell.id not in result["rows"]]
    context = multiprocessing.get_context("spawn")
    with context.Pool(jobs, _one_thread) as pool:
        tasks = [(cell, pool.apply_async(train, (cell, sweep))) for cell in todo]
        for cell, task in tasks:
            result["rows"][cell.id] = task.get()
            path.write_text(json.dumps(result, indent=1) + "\n")
            print(cell.id, json.dumps(result["rows"][cell.id]), flush=True)
    result["complete"] = True
    path.write_text(json.dumps(result, indent=1) + "\n")
    return result


def plot(result: dict, path: Path) -> None:
    """Accuracy against state, one panel per kind; mean over seeds, shorter list first or second."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = list(result["rows"].values())
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.4), sharey=True)
    for axis, kind in zip(axes, ("causal", "prefix"), strict=True):
        for name, colour, is_it in (
            ("short list first", "#c8442c", lambda a, b: a < b),
            ("long list first", "#33658a", lambda a, b: a > b),
        ):
            points: dict[int, list[float]] = {}
            for row in rows:
                if row["kind"] != kind:
                    continue
                for key, value in row.items():
                    if key.startswith("accuracy_") and is_it(*map(int, key.split("_")[1:])):
                        points.setdefault(row["state"], []).append(value)
            states = sorted(points)
            means = [sum(points[s]) / len(points[s]) for s in states]
            axis.plot(states, means, "o-", color=colour, label=name)
        axis.set(title=f"{kind} linear attention", xlabel="numbers in the state", xscale="log")
        ticks = sorted({row["state"] for row in rows})
        axis.set_xticks(ticks, [str(state) for state in ticks])
        axis.minorticks_off()
        axis.set_ylim(0, 1.02)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("accuracy")
    axes[0].legend(frameon=False)
    sweep = result["sweep"]
    reduced = "a reduced sweep: " if sweep["reduced"] else ""
    pairs = ", ".join(f"{a}+{b}" for a, b in sweep["pairs"])
    note = f"{reduced}vocabulary {sweep['vocabulary']}, lists {pairs}, {sweep['steps']} steps"
    figure.suptitle(f"Set disjointness ({note})", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.recall.set_disjointness",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--preset", choices=tuple(PRESETS), default="cpu", help="default: %(default)s")
    add("--steps", type=int, help="instead of the preset's")
    add("--learning-rate", type=float, help="instead of the preset's")
    add("--seeds", type=int, default=1, help="models per cell (default: %(default)s)")
    add("--jobs", type=int, default=1, help="cells at a time, one thread each")
    add("--out", type=Path, required=True, metavar="PREFIX", help="of the .json and the .png")
    args = parser.parse_args(argv)
    if args.steps is not None and args.steps < LEAST_STEPS:
        parser.error(f"--steps: expected at least {LEAST_STEPS}, got {args.steps}")
    sweep = PRESETS[args.preset]
    if args.steps is not None:
        sweep = replace(sweep, steps=args.steps, reduced=True)
    if args.learning_rate is not None:
        sweep = replace(sweep, learning_rate=args.learning_rate)
    command = "python -m benchmarks.recall.set_disjointness " + shlex.join(argv)
    result = run(sweep, args.seeds, args.jobs, args.out, command)
    plot(result, record.path_of(args.out, "png"))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
