"""The recorded cells as tables, the paper's figures beside ours, and what explains the difference."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean

from resona_ext.cli.errors import CliError

from . import paper, store
from .backbones import Spec
from .config import Cell, cell_from_json
from .tasks import TASKS

ENOUGH = 0.99  # what a cell of MQAR with Resona has to reach
NOTABLE = 0.05  # below the paper by more than this is named
TITLES = {
    "token": "token accuracy",
    "macro": "macro accuracy",
    "exact": "exact sequences",
    "perplexity": "perplexity",
}
SECOND = {"token": "exact", "macro": "exact", "exact": "token", "perplexity": "token"}
MANY = 4  # more branches than these stand below each other
TUNED = ("learning_rate", "branch_rate", "weight_decay", "steps")
WRITTEN = {
    "bleu": "BLEU",
    "rouge_l": "ROUGE-L",
    "meteor": "METEOR",
    "f1": "F1",
    "exact_match": "exact match",
}
KIND_NAMES = {"none": "plain", "resona": "+ Resona", "window": "+ window", "mlp": "+ MLP"}


@dataclass(frozen=True)
class Runs:
    """Runs that differ in nothing but the random state; of several trainings, the best."""

    cell: Cell
    results: tuple[dict, ...]
    others: tuple[Runs, ...] = ()  # those with other learning rates, decays or steps

    def value(self, metric: str) -> float:
        return mean(result[metric] for result in self.results)

    def spread(self, metric: str) -> float:
        values = [result[metric] for result in self.results]
        return max(values) - min(values)

    def show(self, metric: str) -> str:
        text = f"{self.value(metric):.3f}"
        return text + (f" ±{self.spread(metric) / 2:.3f}" if len(self.results) > 1 else "")

    @property
    def hit(self) -> str:
        """How often retrieval found the answer; "-" where that is not known."""
        rates = [result.get("hit") for result in self.results]
        return "-" if None in rates else f"{mean(rates):.3f}"

    @property
    def merit(self) -> float:
        value = self.value(self.metric)
        return -value if self.metric == "perplexity" else value

    @property
    def metric(self) -> str:
        return TASKS[self.cell.task["name"]].metric

    @property
    def variant(self) -> str:
        """The column of a table: the branch, with what is not its default."""
        branch = self.cell.branch
        name = KIND_NAMES[branch.kind]
        if branch.kind == "none":
            return name
        usual = {"chunk_size": Spec.chunk_size, "top_k": Spec.top_k}
        notes = [f"layer {branch.layer}"] if branch.layer else []
        notes += [f"{k} {v}" for k, v in branch.options.items() if usual.get(k) != v]
        return name + (f" ({', '.join(notes)})" if notes else "")

    @property
    def row(self) -> str:
        """The row of a table: everything but the branch."""
        cell = self.cell
        settings = {k: v for k, v in cell.task.items() if k not in ("name", "vocabulary")}
        task = " ".join(f"{key} {value}" for key, value in settings.items())
        size = "its own" if cell.is_pretrained else f"d {cell.width}, {cell.layers} layers"
        size += "" if cell.linear_std is None else f", linear std {cell.linear_std:g}"
        return f"{cell.backbone}|{task or 'default'}|{size}"

    @property
    def name(self) -> str:
        return f"{self.row.replace('|', ', ')}, {self.variant}"


def group(rows: Sequence[dict]) -> list[Runs]:
    """Rows of a store -> Runs, in the order of their first appearance."""
    found: dict[str, dict[str, list[tuple[Cell, dict]]]] = {}
    for row in rows:
        cell = cell_from_json(row["cell"])
        everything = asdict(cell)
        everything.pop("seed")
        training = everything["training"]
        rate = json.dumps([training.pop(name) for name in TUNED])
        key = json.dumps(everything, sort_keys=True)
        found.setdefault(key, {}).setdefault(rate, []).append((cell, row["result"]))
    groups = []
    for rates in found.values():
        runs = [
            Runs(members[0][0], tuple(result for _, result in members))
            for members in rates.values()
        ]
        best = max(runs, key=lambda r: (r.merit, r.value(SECOND[r.metric])))
        groups.append(replace(best, others=tuple(r for r in runs if r is not best)))
    return groups


def tables(groups: Sequence[Runs]) -> Iterator[str]:
    """One table per task: ours and the paper's, variant by variant."""
    for task in dict.fromkeys(g.cell.task["name"] for g in groups):
        members = [g for g in groups if g.cell.task["name"] == task]
        metric = members[0].metric
        variants = list(dict.fromkeys(g.variant for g in members))
        if len(variants) > MANY:
            yield f"{task}: {TITLES[metric]}\n\n{_align(_one_per_line(members, metric))}"
            continue
        has_paper = {v: any(paper.figure(g.cell) is not None for g in members if g.variant == v)
                     for v in variants}  # fmt: skip
        head = ["backbone", "task", "model"]
        for variant in variants:
            head += [variant] + ["paper"] * has_paper[variant]
            head += [SECOND[metric], "steps"]
        lines = [head]
        for row in sorted({g.row: None for g in members}, key=_natural):
            line = row.split("|")
            for variant in variants:
                line += _cells(members, row, variant, metric, has_paper[variant])
            lines.append(line)
        title = TITLES[metric]
        yield f"{task}: {title}\n\n{_align(lines)}"


def _one_per_line(members: Sequence[Runs], metric: str) -> list[list[str]]:
    has_hits = any(runs.hit != "-" for runs in members)
    head = ["backbone", "task", "model", "branch", metric, "paper", SECOND[metric], "steps"]
    lines = [head + ["hit"] * has_hits]
    for runs in members:
        texts = _cells([runs], runs.row, runs.variant, metric, True)
        lines.append([*runs.row.split("|"), runs.variant, *texts, *[runs.hit] * has_hits])
    return lines


def _cells(
    members: Sequence[Runs], row: str, variant: str, metric: str, has_paper: bool
) -> list[str]:
    runs = next((g for g in members if g.row == row and g.variant == variant), None)
    if runs is None:
        return ["-"] * (3 + has_paper)
    theirs = paper.figure(runs.cell)
    texts = [runs.show(metric)]
    texts += ["-" if theirs is None else f"{theirs:.3f}"] * has_paper
    texts.append(runs.show(SECOND[metric]))
    return [*texts, str(max(result["steps"] for result in runs.results))]


def _natural(row: str) -> list:
    words = row.replace("|", " ").replace(",", " ").split()
    return [(0, float(w), "") if w.replace(".", "", 1).isdigit() else (1, 0.0, w) for w in words]


def _align(lines: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rule = ["-" * width for width in widths]
    padded = ([text.ljust(w) for text, w in zip(line, widths, strict=True)]
              for line in (lines[0], rule, *lines[1:]))  # fmt: skip
    return "\n".join("  ".join(line).rstrip() for line in padded)


def written(groups: Sequence[Runs]) -> str | None:
    """What the answers of the qa task score, in per cent as in the paper's Table 3; and what is missing."""
    lines = [["backbone", "task", "model", "branch", "questions", *WRITTEN.values()]]
    missing = {}
    for runs in groups:
        scores = [result["written"] for result in runs.results if "written" in result]
        if scores:
            means = [
                f"{mean(score[name] for score in scores):.1f}" if name in scores[0] else "-"
                for name in WRITTEN
            ]
            row = (*runs.row.split("|"), runs.variant)
            lines.append([*row, str(scores[0]["questions"]), *means])
        theirs = paper.answers(runs.cell)
        if scores and theirs is not None:
            branch = KIND_NAMES[runs.cell.branch.kind]
            lines.append(["paper", "", "Mamba", branch, "", *(f"{x:.1f}" for x in theirs), "-"])
        missing |= {name: why for score in scores for name, why in score["missing"].items()}
    notes = [f"{WRITTEN[name]}: {why}" for name, why in missing.items()]
    return "\n".join([_align(lines), *notes]) if len(lines) > 1 else None


def knobs(groups: Sequence[Runs]) -> str | None:
    """The trained branches at other settings."""
    lines = [["model", "setting", "token", "exact", "test seconds"]]
    for runs in groups:
        for result in runs.results[:1]:
            for setting, found in result.get("at", {}).items():
                numbers = [f"{found['token']:.3f}", f"{found['exact']:.3f}"]
                lines.append([runs.name, setting, *numbers, str(found["test_seconds"])])
    return _align(lines) if len(lines) > 1 else None


def differences(groups: Sequence[Runs]) -> list[str]:
    """Every cell that falls short, of the paper or of what Resona has to reach."""
    found = []
    for runs in groups:
        theirs, ours = paper.figure(runs.cell), runs.value(runs.metric)
        is_mqar = runs.cell.task["name"] == "mqar"
        short = is_mqar and runs.cell.branch.kind == "resona" and ours < ENOUGH
        if short or (theirs is not None and ours < theirs - NOTABLE):
            wanted = f"{ENOUGH} wanted" if theirs is None else f"{theirs:.3f} in the paper"
            steps = max(result["steps"] for result in runs.results)
            found.append(f"{runs.name}: {ours:.3f} after {steps} steps, {wanted}")
    return found


def run(paths: Sequence[Path], plots_folder: Path | None) -> int:
    if not paths:
        raise CliError("no results: run a grid first, or name a results file")
    for path in paths:
        head, rows = store.read(path)
        groups = group(rows)
        seeds = sorted({row["cell"]["seed"] for row in rows})
        print(f"{head['suite']}: {head['about']} ({len(rows)} cells, seeds {seeds})\n")
        print(*tables(groups), sep="\n\n")
        scores = written(groups)
        if scores is not None:
            print(f"\nWritten answers, per cent\n\n{scores}")
        at = knobs(groups)
        if at is not None:
            print(f"\nAt other settings, the same weights\n\n{at}")
        _print_notes(head, groups)
        if plots_folder is not None:
            _plot(head, groups, plots_folder)
    return 0


def _print_notes(head: dict, groups: Sequence[Runs]) -> None:
    if head["reduced"]:
        print("\nLess than in the paper, or other:")
        print(*(f"- {line}" for line in head["reduced"]), sep="\n")
    others = [other for runs in groups for other in runs.others]
    if others:
        print("\nTrained in another way as well, and no better:")
        for runs in others:
            settings = asdict(runs.cell.training)
            used = [name for name in TUNED if settings[name] is not None]
            how = ", ".join(f"{name} {settings[name]:g}" for name in used)
            print(f"- {runs.name}: {runs.show(runs.metric)} with {how}")
    short = differences(groups)
    if short:
        print(f"\nBelow the paper by more than {NOTABLE}, or below {ENOUGH} with Resona:")
        print(*(f"- {line}" for line in short), sep="\n")
    with_resona = [g for g in groups if g.cell.branch.kind == "resona" and g.metric == "token"]
    if with_resona:
        reached = sum(g.value("token") >= ENOUGH for g in with_resona)
        best = "" if not others else ", in the best of their trainings"
        print(f"\nWith Resona {reached} of {len(with_resona)} cells reach {ENOUGH}{best}.")
    print()


def _plot(head: dict, groups: Sequence[Runs], folder: Path) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        print("no plots: matplotlib is not installed (pip install matplotlib)")
        return
    from . import plots

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{head['suite']}.png"
    plots.save(head, groups, path)
    print(f"saved {path}")
