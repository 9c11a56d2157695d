"""The same suite on two commits, with a verdict that respects the spread.

BASE is checked out into a temporary git worktree and built there with this Python; this tree is taken
as it was last built. One process cannot load both libraries, so processes alternate: base, this, this,
base, ... Both run this tree's harness and differ in the package alone. A difference counts when the
medians of the rounds do not overlap and their ratio is past a threshold; anything else is "same".
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from resona_ext.cli.errors import CliError

from . import record

THRESHOLD = 0.03  # relative; smaller differences are not worth a verdict
# Of this command, not of the runs; each has a value.
OWN_OPTIONS = ("--compare", "--rounds", "--output")


@dataclass(frozen=True)
class Verdict:
    id: str
    base_ms: float  # median over rounds
    this_ms: float
    word: str  # "faster", "slower" or "same"

    @property
    def ratio(self) -> float:
        return self.this_ms / self.base_ms


def judge(id: str, base: Sequence[float], this: Sequence[float]) -> Verdict:
    """base, this: the medians of each round, in milliseconds."""
    base_ms, this_ms = median(base), median(this)
    ratio = this_ms / base_ms
    word = "same"
    if max(this) < min(base) and ratio < 1 - THRESHOLD:
        word = "faster"
    elif min(this) > max(base) and ratio > 1 + THRESHOLD:
        word = "slower"
    return Verdict(id, base_ms, this_ms, word)


def verdicts(base: list[dict], this: list[dict]) -> Iterator[Verdict]:
    """Of all rows that were timed in every round on both sides. base, this: records, one per round."""
    for id in this[0]["rows"]:
        medians = [[r["rows"].get(id, {}).get("median_ms") for r in side] for side in (base, this)]
        if None not in medians[0] + medians[1]:
            yield judge(id, *medians)


def run(base: str, argv: Sequence[str], rounds: int) -> int:
    """Compare the working tree with BASE and print verdicts. 0, or 1 if something became slower."""
    arguments = _own_options_removed(argv)
    if "--baselines" not in " ".join(arguments):
        arguments += ["--baselines", "none"]
    with tempfile.TemporaryDirectory(prefix="resona-compare-") as folder:
        work = Path(folder)
        shutil.copytree(record.ROOT / "benchmarks", work / "harness" / "benchmarks")
        with _worktree(base, work / "base") as tree:
            print(f"building {base} ...", flush=True)
            _build(tree)
            trees = {"base": tree, "this": record.ROOT}
            runs: dict[str, list[dict]] = {"base": [], "this": []}
            for round in range(rounds):
                order = ("base", "this") if round % 2 == 0 else ("this", "base")
                for side in order:
                    print(f"round {round + 1}/{rounds}: {side}", flush=True)
                    output = work / f"{side}-{round}"
                    _measure(trees[side], work / "harness", arguments, output)
                    runs[side].append(record.load(record.path_of(output, "json")))
    return _report(base, list(verdicts(runs["base"], runs["this"])), rounds)


def _report(base: str, found: list[Verdict], rounds: int) -> int:
    if not found:
        raise CliError(f"--compare {base}: no case was timed on both sides in every round")
    width = max(len(verdict.id) for verdict in found)
    print(f"\n{'':<{width}}{base[:12]:>14}{'this tree':>14}{'ratio':>8}  verdict")
    for v in found:
        times = f"{v.base_ms:>11.3f} ms{v.this_ms:>11.3f} ms"
        print(f"{v.id:<{width}}{times}{v.ratio:>8.3f}  {v.word}")
    counts = {word: sum(v.word == word for v in found) for word in ("faster", "same", "slower")}
    print(", ".join(f"{count} {word}" for word, count in counts.items()), end="")
    print(f"; {rounds} rounds, a verdict needs {THRESHOLD:.0%} and no overlap")
    return 1 if counts["slower"] else 0


def _own_options_removed(argv: Sequence[str]) -> list[str]:
    kept, skip = [], False
    for argument in argv:
        if skip:
            skip = False
        elif argument in OWN_OPTIONS:
            skip = True
        elif not argument.startswith(tuple(f"{option}=" for option in OWN_OPTIONS)):
            kept.append(argument)
    return kept


@contextmanager
def _worktree(base: str, target: Path) -> Iterator[Path]:
    git = ["git", "-C", str(record.ROOT)]
    command = [*git, "worktree", "add", "--quiet", "--detach", str(target), base]
    try:
        added = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise CliError(f"--compare needs git ({error.strerror})") from error
    if added.returncode:
        lines = added.stderr.strip().splitlines() or ["git failed"]
        raise CliError(f"--compare {base}: {lines[-1]}")
    try:
        yield target
    finally:
        subprocess.run([*git, "worktree", "remove", "--force", str(target)], capture_output=True)


def _build(tree: Path) -> None:
    """In place, with the tools of this Python's environment."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    built = subprocess.run(
        command, cwd=tree, env=os.environ | {"PATH": path}, capture_output=True, text=True
    )
    if built.returncode:
        print(built.stdout[-2000:], built.stderr[-2000:], file=sys.stderr)
        raise CliError("--compare: BASE does not build; the compiler's last words are above")


def _measure(tree: Path, harness: Path, arguments: list[str], output: Path) -> None:
    """One run of the suite with the package of `tree`."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(harness), str(tree)])}
    options = {"cwd": harness, "env": environment, "capture_output": True, "text": True}
    # An installed package must not win over the tree: then both sides would be the same.
    probe = "import resona_ext, pathlib; print(pathlib.Path(resona_ext.__file__).parents[1])"
    found = subprocess.run([sys.executable, "-c", probe], **options)
    if found.returncode or Path(found.stdout.strip()).resolve() != tree.resolve():
        last = (found.stderr.strip().splitlines() or [found.stdout.strip()])[-1]
        raise CliError(f"--compare: the package of {tree.name} cannot be loaded: {last}")
    command = [sys.executable, "-m", "benchmarks.kernels", *arguments, "--output", str(output)]
    done = subprocess.run(command, **options)
    if done.returncode not in (0, 1):
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise CliError(f"--compare: the run on {tree.name} failed: {last}")
