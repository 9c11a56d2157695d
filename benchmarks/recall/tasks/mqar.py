"""Multi-query associative recall, the generator of the demo with Zoology's switch for the filler."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from resona_ext.cli.demo import mqar

from .base import Batch, Task, integers


@dataclass(frozen=True)
class Mqar(Task):
    """k1 v1 k2 v2 ..., then every key once more, whose value is asked (arXiv 2312.04927).

    pairs: n, with 4 n <= length. power: below 1, queries crowd towards the start.
    random_non_queries: uniform tokens in place of the filler; they may equal keys.
    """

    name: ClassVar[str] = "mqar"
    stands_once: ClassVar[bool] = True

    vocabulary: int = 8192
    length: int = 64
    pairs: int = 4
    power: float = 0.01
    random_non_queries: bool = False

    def __post_init__(self) -> None:
        mqar.check(self._settings)
        self.require(self.power > 0, "power", "> 0", self.power)

    @property
    def _settings(self) -> mqar.Task:
        return mqar.Task(self.vocabulary, self.length, self.pairs, self.power)

    def generate(self, examples: int, generator: torch.Generator, test: bool = False) -> Batch:
        tokens, labels = mqar.generate(self._settings, examples, generator)
        if self.random_non_queries:
            noise = integers(0, self.vocabulary, tuple(tokens.shape), generator)
            tokens = torch.where(tokens == mqar.FILLER, noise, tokens)
        return Batch(tokens, labels, labels)
