"""The paper's recall experiments; benchmarks/recall/README.md explains.

python -m benchmarks.recall list
python -m benchmarks.recall mqar --backbone mamba2 --branch resona --set task.length=128
python -m benchmarks.recall run mqar-cpu
python -m benchmarks.recall report
python -m benchmarks.recall capacity
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from resona_ext.cli import machine
from resona_ext.cli.errors import CliError

from . import capacity, report
from .backbones import BACKBONES, PRETRAINED, find
from .config import BRANCHES, Cell, Grid, make_cell, merge, read_grid
from .schedule import run_cells
from .store import Store
from .tasks import MAD, TASKS, mad_settings

PROGRAM = "benchmarks.recall"
CONFIGS = Path(__file__).parent / "configs"
RECORDS = Path(__file__).parents[1] / "results" / "recall"
BUILD = Path("build/recall")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m {PROGRAM}",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("list", help="tasks, backbones and what is missing, grids")

    run = commands.add_parser("run", help="run a grid; finished cells are skipped")
    run.add_argument("config", help="a JSON file, or the name of one in benchmarks/recall/configs")
    _add_many(run)
    _add_common(run)

    table = commands.add_parser("report", help="the paper's tables beside ours; saves plots")
    table.add_argument("results", nargs="*", type=Path, help="default: the recorded runs")
    table.add_argument("--plots", type=Path, metavar="FOLDER", help="default: none are saved")

    errors = commands.add_parser("capacity", help="what a state of fixed size forgets (B.2)")
    errors.add_argument("--output", type=Path, default=BUILD, metavar="FOLDER")

    for name, task in TASKS.items():
        _add_cell(commands.add_parser(name, help=(task.__doc__ or "").splitlines()[0]))
    mad = commands.add_parser("mad", help="MAD's six tasks, one after the other (Table 1)")
    mad.add_argument("--sweep", action="store_true", help="its harder settings too, 66 in all")
    _add_many(mad)
    _add_cell(mad)
    return parser


def _add_many(run: argparse.ArgumentParser) -> None:
    """The flags of commands that run several cells."""
    run.add_argument("--minutes", type=float, help="start no cell after this time")
    run.add_argument("--shard", default="1/1", metavar="I/N", help="every N-th cell, from the I-th")
    run.add_argument("--together", type=int, default=1, metavar="N", help="train N cells at once")
    run.add_argument("--dry-run", action="store_true", help="list the cells")


def _add_cell(one: argparse.ArgumentParser) -> None:
    """The flags of what is trained, the same for every task."""
    one.add_argument("--backbone", default="gla", help="default: %(default)s")
    one.add_argument("--branch", choices=BRANCHES, default="resona")
    one.add_argument("--layer", type=_layer, default=0, metavar="N|spread", help="its blocks")
    one.add_argument("--chunk-size", type=int, default=2)
    one.add_argument("--top-k", type=int, default=1)
    one.add_argument("--mix", choices=("gate", "fixed", "additive"))
    one.add_argument("--encoder", choices=("tied", "identity", "separate"))
    one.add_argument("--trainable-retrieval", action="store_true", default=None)
    one.add_argument("--width", type=int, default=64)
    one.add_argument("--layers", type=int, default=2)
    one.add_argument("--seed", type=int, default=0)
    one.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="PATH=JSON",
        help="any other setting, as training.steps=100 or task.length=128",
    )
    _add_common(one)


def _layer(text: str) -> int | str:
    return int(text) if text.isdecimal() else text


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, metavar="JSONL", help="default: in build/recall")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="default: cuda where there is one"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's)")


def single(arguments: argparse.Namespace) -> Grid:
    """The grid of the cells that the flags describe: one, but for mad."""
    # Flags that were not given are left to Resona, or to augment in a pretrained model.
    names = ("chunk_size", "top_k", "mix", "encoder", "trainable_retrieval")
    options = {name: getattr(arguments, name) for name in names}
    settings = {
        "backbone": arguments.backbone,
        "width": arguments.width,
        "layers": arguments.layers,
        "seed": arguments.seed,
        "branch": {
            "kind": arguments.branch,
            "layer": arguments.layer,
            "options": {name: value for name, value in options.items() if value is not None},
        },
    }
    cells = []
    for task, examples in _tasks(arguments):
        chosen = {**settings, "task": task}
        for text in arguments.set:
            chosen = merge(chosen, _setting(text))
        if examples is not None:
            chosen = merge(chosen, {"training": {"examples": examples}})
        cells.append(make_cell(chosen))
    return Grid("single", "cells from the command line", (), tuple(cells))


def _tasks(arguments: argparse.Namespace) -> list[tuple[dict, int | None]]:
    """Task settings, and the size of the training set where a sweep is about it."""
    if arguments.command != "mad":
        return [({"name": arguments.command}, None)]
    settings = (mad_settings(task.name) for task in MAD)
    return [one for sweep in settings for one in (sweep if arguments.sweep else sweep[:1])]


def _setting(text: str) -> dict:
    path, equals, value = text.partition("=")
    if not equals:
        raise CliError(f"--set {text}: expected PATH=JSON")
    try:
        changes = json.loads(value)
    except ValueError:
        changes = value  # a bare word
    for name in reversed(path.split(".")):
        changes = {name: changes}
    return changes


def run_grid(grid: Grid, arguments: argparse.Namespace) -> int:
    """Run what is not finished; 1 if a cell failed."""
    device = _device(arguments)
    output = arguments.output or BUILD / f"{grid.suite}.jsonl"
    index, shards = _shard(getattr(arguments, "shard", "1/1"))
    together = getattr(arguments, "together", 1)
    if together < 1:
        raise CliError(f"--together: expected at least 1, got {together}")
    store = Store(output, grid)
    cells = [cell for cell in grid.cells[index - 1 :: shards] if cell.id not in store.finished]
    print(f"{PROGRAM}: {grid.suite}, {len(cells)} cells to run of {len(grid.cells)}, on {device}")
    print(f"results: {output}")
    number = {cell.id: f"[{place}/{len(cells)}]" for place, cell in enumerate(cells, start=1)}
    waiting = _waiting(cells, number, device, getattr(arguments, "minutes", None))
    folder, failed = BUILD / "checkpoints", 0
    for cell, result in run_cells(waiting, together, folder, device, arguments.threads):
        if isinstance(result, Exception):
            failed += 1
            line = str(result).splitlines()[0]
            print(f"{number[cell.id]} {cell.label}: failed, {line}", file=sys.stderr)
            continue
        store.add(cell, result, device)
        print(
            f"{number[cell.id]} {cell.label}: token {result['token']:.3f} exact "
            f"{result['exact']:.3f} macro {result['macro']:.3f}, {result['steps']} steps, "
            f"{result['seconds']:.0f} s",
            flush=True,
        )
    return 1 if failed else 0


def _waiting(
    cells: Sequence[Cell], number: dict[str, str], device: str, minutes: float | None
) -> Iterator[Cell]:
    """The cells that can be run, until the time is over."""
    deadline = None if minutes is None else time.monotonic() + 60 * minutes
    for place, cell in enumerate(cells):
        reason = find(cell.backbone).missing(device)
        if reason is not None:
            print(f"{number[cell.id]} {cell.label}: skipped, {reason}")
            continue
        if deadline is not None and time.monotonic() > deadline:
            print(f"--minutes {minutes:g} are over: {len(cells) - place} cells are left")
            return
        yield cell


def _device(arguments: argparse.Namespace) -> str:
    if arguments.threads is not None:
        if arguments.threads < 1:
            raise CliError(f"--threads: expected at least 1, got {arguments.threads}")
        torch.set_num_threads(arguments.threads)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise CliError("--device cuda: torch sees no GPU on this machine")
    return arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")


def _shard(text: str) -> tuple[int, int]:
    index, _, shards = text.partition("/")
    if not (index.isdigit() and shards.isdigit() and 1 <= int(index) <= int(shards)):
        raise CliError(f"--shard: expected I/N with 1 <= I <= N, got {text!r}")
    return int(index), int(shards)


def find_config(name: str) -> Path:
    path = Path(name)
    if path.suffix == ".json":
        return path
    path = CONFIGS / f"{name}.json"
    if not path.exists():
        known = ", ".join(sorted(config.stem for config in CONFIGS.glob("*.json")))
        raise CliError(f"no grid {name!r}, expected a .json file or one of {known}")
    return path


def list_all() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"on {machine.summary()}, {device}")
    print("tasks")
    for name, task in TASKS.items():
        print(f"  {name:<20}{(task.__doc__ or '').splitlines()[0]}")
    print("backbones")
    for name, backbone in {**BACKBONES, PRETRAINED.name: PRETRAINED}.items():
        reason = backbone.missing(device)
        state = f"code of {backbone.source(device)}" if reason is None else f"missing: {reason}"
        print(f"  {name:<20}{backbone.summary}; {state}")
    print("grids")
    for path in sorted(CONFIGS.glob("*.json")):
        grid = read_grid(path)
        print(f"  {path.stem:<20}{len(grid.cells)} cells: {grid.about}")


def main(argv: Sequence[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    try:
        if arguments.command == "list":
            list_all()
            return 0
        if arguments.command == "capacity":
            print(capacity.table(capacity.run(arguments.output)))
            return 0
        if arguments.command == "report":
            return report.run(arguments.results or sorted(RECORDS.glob("*.jsonl")), arguments.plots)
        is_file = arguments.command == "run"
        grid = read_grid(find_config(arguments.config)) if is_file else single(arguments)
        if getattr(arguments, "dry_run", False):
            print(*(f"{cell.id} {cell.label}" for cell in grid.cells), sep="\n")
            return 0
        return run_grid(grid, arguments)
    except CliError as error:
        print(f"{PROGRAM}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted, finished cells are kept", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
