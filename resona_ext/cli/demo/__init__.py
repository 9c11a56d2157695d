"""What the operator does, shown on this machine in a few minutes.

mqar      train two small linear recurrent models on associative recall, one with Resona
document  retrieve over a real document: which earlier passages does a passage bring back?
timing    time the operator against full causal attention on growing lengths
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

import torch

from .. import machine
from ..errors import CliError
from . import document, plot, report, timing, training

PARTS = ("mqar", "document", "timing")
QUICK_STEPS = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--text", type=Path, metavar="FILE", help="UTF-8 document to search")
    parser.add_argument(
        "--output", type=Path, default=Path("demo.png"), metavar="PNG", help="default: %(default)s"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a smoke test: too few steps to learn anything, lengths up to 8,192",
    )
    parser.add_argument("--only", choices=PARTS, help="run one part")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")


def run(arguments: argparse.Namespace) -> None:
    parts = PARTS if arguments.only is None else (arguments.only,)
    # Whatever can be wrong with the arguments is found before minutes are spent.
    if arguments.text is not None and "document" not in parts:
        raise CliError("--text belongs to the document part, which --only leaves out")
    if "document" in parts and importlib.util.find_spec("numpy") is None:
        raise CliError(
            'the document part needs numpy: pip install "resona_ext[demo]", or leave it out with --only'
        )
    loaded = document.load(arguments.text) if "document" in parts else None
    plotted = "mqar" in parts or "timing" in parts
    if plotted:
        _check_writable(arguments.output)

    print(f"resona_ext demo on {machine.summary()}")
    results = _mqar(arguments) if "mqar" in parts else []
    if loaded is not None:
        _document(loaded, arguments.seed)
    rows = _timing(arguments) if "timing" in parts else []
    if plotted:
        _save_plot(arguments, results, rows)


def _mqar(arguments: argparse.Namespace) -> list[training.Result]:
    recipe = training.Recipe()
    if arguments.quick:
        recipe = recipe._replace(
            steps=QUICK_STEPS, evaluate_every=2, curve_examples=50, test_examples=200
        )
    task = recipe.task
    print(report.heading("Associative recall (MQAR)"))
    print(
        report.wrap(
            f"{task.pairs} key-value pairs, {task.length} tokens, vocabulary {task.vocabulary:,}. "
            f"Two recurrent blocks of width {recipe.width}; Resona, if any, in the first, with "
            f"chunks of {recipe.chunk_size} tokens and top {recipe.top_k}."
        )
    )
    results = training.compare(recipe, arguments.seed)
    print(f"\n{report.recall(results, recipe)}", flush=True)
    return results


def _document(loaded: document.Document, seed: int) -> None:
    print(report.heading(f"Retrieval in {loaded.name}"))
    print(report.retrieved(document.retrieve_passages(loaded, seed=seed)), flush=True)


def _timing(arguments: argparse.Namespace) -> list[timing.Row]:
    lengths = timing.QUICK_LENGTHS if arguments.quick else timing.LENGTHS
    budget = 0.5 if arguments.quick else 3.0
    shape = timing.DEFAULT_SHAPE
    print(report.heading("Time against full causal attention"))
    print(
        report.wrap(
            f"Forward, random data, {shape}. SDPA reads the whole past, Resona the chunks that it "
            "finds: the ratio is time saved, not equal work."
        )
    )
    print(f"\n{timing.header()}", flush=True)
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for row in timing.measure(lengths, dtype, shape, budget, seed=arguments.seed):
            print(timing.line(row), flush=True)
            rows.append(row)
    print("\n" + report.wrap("Medians over the calls of each, made in turns after an untimed one."))
    if not all(row.warmed for row in rows):
        print(report.wrap("* warmed on shorter lengths only, for a single call takes long."))
    return rows


def _check_writable(output: Path) -> None:
    if output.is_dir():
        raise CliError(f"--output {output} is a directory, expected a file name")
    if not output.absolute().parent.is_dir():
        raise CliError(f"--output {output}: its directory does not exist")


def _save_plot(arguments: argparse.Namespace, results: list, rows: list) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        print("\nNo plot saved: matplotlib is not installed (pip install matplotlib).")
        return
    notes = []
    if results:
        notes.append(f"Recall: {results[0].steps[-1]} steps each, the plain model not converged.")
    if rows:
        notes.append(f"Time: {timing.DEFAULT_SHAPE}.")
    try:
        plot.save(arguments.output, results, rows, " ".join(notes))
    except OSError as error:
        raise CliError(f"cannot write {arguments.output}: {error.strerror}") from error
    print(f"\nSaved {arguments.output}")
