"""What the demo prints: plain text, wrapped to the terminal."""

from __future__ import annotations

import shutil
import textwrap

from .document import Retrieval, same_section_share
from .training import Recipe, Result

# "Improving Context Copying in Linear Recurrence Models with Retrieval" (arXiv 2503.22913),
# Table 9 at L = 128, d = 64: token accuracy of converged models without retrieval.
PAPER_PLAIN = {
    "BaseConv": 0.115,
    "H3": 0.477,
    "Hyena": 0.501,
    "RWKV": 0.451,
    "Mamba": 0.992,
    "Mamba2": 0.969,
}


def terminal_width() -> int:
    return min(shutil.get_terminal_size((100, 24)).columns, 110)


def wrap(text: str, indent: int = 2, hanging: int | None = None) -> str:
    return textwrap.fill(
        text,
        max(terminal_width(), 40),
        initial_indent=" " * indent,
        subsequent_indent=" " * (indent if hanging is None else hanging),
        break_on_hyphens=False,
    )


def heading(text: str) -> str:
    return f"\n{text}\n{'-' * len(text)}"


def recall(results: list[Result], recipe: Recipe) -> str:
    lines = [
        f"  {'model':<14}{'parameters':>12}{'token accuracy':>16}{'exact sequence':>16}{'time':>8}"
    ]
    for result in results:
        lines.append(
            f"  {result.name:<14}{result.parameters:>12,}{result.final.token:>16.4f}"
            f"{result.final.exact:>16.4f}{result.seconds:>6.0f} s"
        )
    quoted = ", ".join(f"{name} {value:.3f}" for name, value in PAPER_PLAIN.items())
    lines += [
        "",
        wrap(
            f"{recipe.test_examples:,} held-out sequences. Both models saw the same {recipe.steps} "
            f"steps of {recipe.batch} sequences from the same initial weights (Resona's own "
            "come on top). The plain one is nowhere near converged after so few."
        ),
        wrap(
            "For context, the paper's converged models without retrieval at this length and width "
            f"(arXiv 2503.22913, Table 9; four layers): {quoted}; with Resona all reach 1.000."
        ),
    ]
    return "\n".join(lines)


def retrieved(found: Retrieval, shown: int = 3) -> str:
    count = len(found.passages)
    # Evenly spread, not chosen: what is shown is what is typical.
    chosen = dict.fromkeys(max(1, count * (i + 1) // (shown + 1)) for i in range(shown))
    lines = [
        wrap(
            f"{found.words:,} words make {count:,} passages. Word vectors "
            f"{found.embedding_seconds:.2f} s, operator over the whole document "
            f"{found.operator_seconds:.2f} s."
        )
    ]
    for j in chosen:
        lines += ["", _passage("", j, found, 40)]
        for index, score in zip(found.indices[j].tolist(), found.scores[j].tolist(), strict=True):
            if index >= 0:
                lines.append(_passage(f"{score:.3f}  ", index, found, 24))
    share = same_section_share(found)
    if share is not None:
        lines += [
            "",
            wrap(
                f"Of all retrieved passages {share[0]:.0%} come from the section of their query; "
                f"of passages picked at random from the past it would be {share[1]:.0%}."
            ),
        ]
    return "\n".join(lines)


def _passage(score: str, index: int, found: Retrieval, words: int) -> str:
    passage = found.passages[index]
    title = f" [{passage.section}]" if passage.section else ""
    text = passage.text.split(" ")
    excerpt = " ".join(text[:words]) + (" ..." if len(text) > words else "")
    indent = 4 if score else 2
    return wrap(f"{score}passage {index:,}{title}: {excerpt}", indent, indent + 2 + len(score))
