"""MAD's other tasks (arXiv 2403.17844): selective copying, compression and memorization."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .base import IGNORED, Batch, Task, integers

MAP_STATE = 12345  # memorization's facts are the same in every run


def _same_targets(tokens: Tensor, labels: Tensor) -> Batch:
    return Batch(tokens, labels, labels)


@dataclass(frozen=True)
class SelectiveCopying(Task):
    """Content among blanks, then a copy token, then blanks: there the content is wanted, in order.

    Content 0 .. V - 3, blank V - 2, copy V - 1. Every blank falls before a content token of its own
    choice, so the last content token stands right before the copy token.
    """

    name: ClassVar[str] = "selective-copying"
    metric: ClassVar[str] = "macro"

    vocabulary: int = 16
    length: int = 256
    copies: int = 16

    def __post_init__(self) -> None:
        self.require(self.copies >= 1, "copies", ">= 1", self.copies)
        self.require_sizes(3, 2 * self.copies + 1)

    def generate(self, examples: int, generator: torch.Generator, test: bool = False) -> Batch:
        copies, blank = self.copies, self.vocabulary - 2
        content = integers(0, blank, (examples, copies), generator)
        blanks = self.length - 2 * copies - 1
        chosen = integers(0, copies, (examples, blanks), generator)
        before = torch.zeros(examples, copies, dtype=torch.long)
        before.scatter_add_(1, chosen, torch.ones_like(chosen))
        place = before.cumsum(dim=1) + torch.arange(copies)
        tokens = torch.full((examples, self.length), blank).scatter(1, place, content)
        tokens[:, self.length - copies - 1] = self.vocabulary - 1
        labels = torch.full_like(tokens, IGNORED)
        labels[:, self.length - copies :] = content
        return _same_targets(tokens, labels)


@dataclass(frozen=True)
class Compression(Task):
    """Random tokens 0 .. V - 2 and the end token V - 1: all are decoded from the last state."""

    name: ClassVar[str] = "compression"
    head: ClassVar[str] = "autoencoder"
    metric: ClassVar[str] = "macro"

    vocabulary: int = 16
    length: int = 32

    def __post_init__(self) -> None:
        self.require_sizes(2, 2)

    def generate(self, examples: int, generator: torch.Generator, test: bool = False) -> Batch:
        tokens = integers(0, self.vocabulary - 1, (examples, self.length), generator)
        tokens[:, -1] = self.vocabulary - 1
        return _same_targets(tokens, tokens)


@dataclass(frozen=True)
class Memorization(Task):
    """Key, insert token, key, insert token ...: at the insert token the key's value is wanted.

    Which value a key has is a fixed fact, learnt by the weights. Keys 0 .. (V - 1) // 2 - 1, values
    from there to V - 2, insert token V - 1.
    """

    name: ClassVar[str] = "memorization"
    metric: ClassVar[str] = "macro"

    vocabulary: int = 256
    length: int = 32

    def __post_init__(self) -> None:
        self.require_sizes(3, 2)
        self.require(self.length % 2 == 0, "length", "even", self.length)

    def facts(self) -> Tensor:
        """The value of every key, [(V - 1) // 2]."""
        keys = (self.vocabulary - 1) // 2
        fixed = torch.Generator().manual_seed(MAP_STATE)
        return keys + torch.randperm(self.vocabulary - 1 - keys, generator=fixed)[:keys]

    def generate(self, examples: int, generator: torch.Generator, test: bool = False) -> Batch:
        facts = self.facts()
        key = integers(0, len(facts), (examples, self.length // 2), generator)
        insert = torch.full_like(key, self.vocabulary - 1)
        tokens = torch.stack([key, insert], dim=2).flatten(1)
        labels = torch.stack([torch.full_like(key, IGNORED), facts[key]], dim=2).flatten(1)
        return _same_targets(tokens, labels)
