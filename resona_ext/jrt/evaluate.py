"""Plain, twice, Resona, both: the same questions put to two models in two kinds of prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from torch import Tensor

from ._require import require
from .prompt import contains_answer, jrt_prompt


class Example(NamedTuple):
    """One question about a text. Any of the answers will do."""

    context: str
    question: str
    answers: Sequence[str]


class Comparison(NamedTuple):
    """Share of examples answered, 0 to 1. None: there was no model to ask."""

    plain: float
    twice: float
    resona: float | None
    both: float | None
    examples: int


def compare(
    examples: Iterable[Example],
    base: Callable[[str], str],
    resona: Callable[[str], str] | None = None,
    *,
    format: str = "question",
    repeats: int = 2,
    tokenizer=None,
    max_context_tokens: int | None = None,
    score: Callable[[str, Sequence[str]], bool | float] = contains_answer,
) -> Comparison:
    """Ask every example four times: each model, with the context once and `repeats` times.

    Args:
        base, resona: prompt -> the text that the model writes behind it; resona is the same model with
            Resona (`resona_ext.integrations.augment`).
        format, tokenizer, max_context_tokens: as for `jrt_prompt`. The context is cut round the answer
            before it is repeated, so all four see the same text.
        score: (response, answers) -> a number, at best 1. Default: an answer occurs, case ignored.

    Raises:
        ValueError: there are no examples.
    """
    totals, count = [0.0] * 4, 0
    for example in examples:
        count += 1
        for i, copies in enumerate((1, repeats)):
            prompt = jrt_prompt(
                example.context,
                example.question,
                format=format,
                repeats=copies,
                tokenizer=tokenizer,
                max_context_tokens=max_context_tokens,
                answers=example.answers,
            )
            for j, model in enumerate((base, resona)):
                if model is not None:
                    totals[2 * j + i] += float(score(model(prompt), example.answers))
    require(count > 0, "examples", "at least one", "none")
    shares: list[float | None] = [total / count for total in totals]
    if resona is None:
        shares[2:] = [None, None]
    return Comparison(*shares, count)


def compare_tokens(
    tokens: Tensor,
    labels: Tensor,
    base: Callable[[Tensor], Tensor],
    resona: Callable[[Tensor], Tensor] | None = None,
    *,
    context: int,
    ignored: int = -100,
) -> Comparison:
    """The same for the synthetic recall tasks, whose rows are tokens rather than text.

    Twice means that the first `context` columns stand twice; what is scored stays the rows' last part.

    Args:
        tokens, labels: int64 [N, T]; labels `ignored` where nothing is asked, so in the context too.
        base, resona: tokens [N, T'] -> logits [N, T', vocabulary].
        context: columns that are read before the questions.

    Returns:
        The share of asked positions whose best token is the label.
    """
    length = tokens.shape[1]
    require(0 <= context <= length, "context", f"0 to {length}", context)
    asked = labels != ignored
    require(bool(asked.any()), "labels", "a position that is asked", "none")
    inside = bool(asked[:, :context].any())
    require(not inside, "labels", f"only ignored ones in the context of {context}", "others")
    twice = tokens.new_empty(tokens.shape[0], length + context)
    twice[:, :context], twice[:, context:] = tokens[:, :context], tokens

    def share(model, rows: Tensor) -> float | None:
        if model is None:
            return None
        found = model(rows)[:, -length:].argmax(dim=-1)
        return ((found == labels) & asked).sum().item() / asked.sum().item()

    once = [share(model, tokens) for model in (base, resona)]
    repeated = [share(model, twice) for model in (base, resona)]
    return Comparison(once[0], repeated[0], once[1], repeated[1], tokens.shape[0])
