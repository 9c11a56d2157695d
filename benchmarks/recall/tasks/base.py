"""What every task has: settings that check themselves, and batches from a generator.

A task is a frozen dataclass. `generate(examples, generator, test)` draws a batch; the same generator
state gives the same batch. Rows are independent, so any number of examples may be drawn at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

IGNORED = -100
# (tokens [B, T], last [B]) -> the likeliest token behind position `last` of each row, [B].
NextToken = Callable[[Tensor, Tensor], Tensor]


class Batch(NamedTuple):
    tokens: Tensor  # int64 [N, T]
    labels: Tensor  # int64 [N, T]: what is scored; IGNORED elsewhere
    targets: Tensor  # int64 [N, T]: what the loss sees; mostly the labels

    def split(self, size: int) -> list[Batch]:
        return [Batch(*parts) for parts in zip(*(x.split(size) for x in self), strict=True)]


@dataclass(frozen=True)
class Task:
    """The part that the runner knows of a task."""

    name: ClassVar[str]
    head: ClassVar[str] = "token"  # "autoencoder": all inputs from the state of the last position
    metric: ClassVar[str] = "token"  # what is reported: a field of train.Accuracy
    test_batch: ClassVar[int] = 128  # MAD averages its macro accuracy over batches of this size
    stands_once: ClassVar[bool] = False  # the wanted token, in the past: so hits can be counted

    vocabulary: int
    length: int

    @property
    def width(self) -> int:
        """T, the tokens of a row of a batch."""
        return self.length

    def generate(self, examples: int, generator: torch.Generator, test: bool = False) -> Batch:
        raise NotImplementedError

    def test_set(self) -> Batch | None:
        """What is to be tested on where that is fixed; None: drawn like the training data."""
        return None

    def written(self, next_token: NextToken) -> dict | None:
        """Scores of what the model writes by itself; None where the task has none."""
        return None

    def require(self, ok: bool, setting: str, expected: str, got: object) -> None:
        if not ok:
            raise ValueError(f"{self.name}: {setting}: expected {expected}, got {got}")

    def require_sizes(self, vocabulary: int, length: int) -> None:
        """The least vocabulary and length that the task can be made of."""
        self.require(
            self.vocabulary >= vocabulary, "vocabulary", f">= {vocabulary}", self.vocabulary
        )
        self.require(self.length >= length, "length", f">= {length}", self.length)


def integers(low: int, high: int, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Uniform on low .. high - 1."""
    return torch.randint(low, high, shape, generator=generator)


def choose(mask: Tensor, generator: torch.Generator) -> Tensor:
    """One True position of each row, uniformly: bool [N, M] -> int64 [N]."""
    noise = torch.rand(mask.shape, generator=generator)
    return noise.masked_fill(~mask, -1.0).argmax(dim=1)


def first_occurrence(code: Tensor) -> Tensor:
    """Where each row has the same code for the first time: int64 [N, P] -> [N, P]."""
    ordered, place = code.sort(dim=1, stable=True)
    position = torch.arange(code.shape[1])
    is_new = torch.ones_like(ordered, dtype=torch.bool)
    is_new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    begin = torch.where(is_new, position, 0).cummax(dim=1).values
    return torch.empty_like(code).scatter(1, place, place.gather(1, begin))


def next_token(sequence: Tensor, is_answer: Tensor) -> Batch:
    """The language-model batch of whole sequences: inputs, and the tokens that follow them.

    The loss sees every token; scored are those that `is_answer` [N, T + 1] marks.
    """
    targets = sequence[:, 1:]
    return Batch(sequence[:, :-1], targets.masked_fill(~is_answer[:, 1:], IGNORED), targets)
