"""Multi-query associative recall: read key-value pairs, then answer each key with its value.

The generator is Zoology's ("Zoology: Measuring and Improving Recall in Efficient Language
Models", arXiv 2312.04927), written anew.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

FILLER = 0
IGNORED = -100


class Task(NamedTuple):
    vocabulary: int = 8192
    length: int = 128
    pairs: int = 8
    power: float = 0.01  # below 1: queries crowd towards the start


class Batch(NamedTuple):
    tokens: Tensor  # int64 [N, length]
    labels: Tensor  # int64 [N, length], the value at its query's position, elsewhere IGNORED

    @property
    def wanted(self) -> Tensor:
        return self.labels != IGNORED


def check(task: Task) -> None:
    if task.length % 2:
        raise ValueError(f"mqar: length must be even, got {task.length}")
    if task.vocabulary <= task.length:
        raise ValueError(
            f"mqar: vocabulary must exceed length {task.length}, got {task.vocabulary}"
        )
    if not 1 <= task.pairs <= task.length // 4:
        raise ValueError(
            f"mqar: pairs must be 1 to length / 4 = {task.length // 4}, got {task.pairs}"
        )


def slot_probabilities(task: Task) -> Tensor:
    """How likely each two-token slot after the pairs is to hold the first query drawn."""
    slots = (task.length - 2 * task.pairs) // 2
    weight = torch.arange(1, slots + 1, dtype=torch.float64) ** (task.power - 1)
    return weight / weight.sum()


def generate(task: Task, examples: int, generator: torch.Generator) -> Batch:
    """k1 v1 k2 v2 ... and then, after the pairs, each key once more in a slot of its own.

    Keys come from 1 .. V/2 - 1, values from V/2 .. V - 1, all distinct within an example.
    """
    check(task)
    half = task.vocabulary // 2
    keys = 1 + draw_distinct(examples, half - 1, task.pairs, generator)
    values = half + draw_distinct(examples, task.vocabulary - half, task.pairs, generator)
    probability = slot_probabilities(task)
    slots = draw_distinct(examples, len(probability), task.pairs, generator, probability)

    context = 2 * task.pairs
    tokens = torch.full((examples, task.length), FILLER)
    tokens[:, 0:context:2] = keys
    tokens[:, 1:context:2] = values
    labels = torch.full((examples, task.length), IGNORED)
    position = context + 2 * slots
    return Batch(tokens.scatter(1, position, keys), labels.scatter(1, position, values))


def draw_distinct(
    examples: int, items: int, count: int, generator: torch.Generator, weight: Tensor | None = None
) -> Tensor:
    """Draw `count` of `items` without replacement, in order: [examples, count].

    By weight, if given: the largest log weights + Gumbel noise. Equal weights need no logarithm.
    """
    uniform = torch.rand(examples, items, dtype=torch.float64, generator=generator)
    if weight is None:
        return uniform.topk(count).indices
    uniform = uniform.clamp_min(torch.finfo(torch.float64).tiny)
    return (weight.log() - (-uniform.log()).log()).topk(count).indices
