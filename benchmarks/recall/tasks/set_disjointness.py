"""Set disjointness: two lists, one token in common; which? (arXiv 2407.05483, section 3)"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from .base import IGNORED, Batch, Task, integers

BEGIN, SEPARATOR, ANSWER, FIRST_WORD = 1, 2, 3, 4


@dataclass(frozen=True)
class SetDisjointness(Task):
    """<begin> A <separator> B <answer>: the one token of B that is also in A is wanted, at the end.

    A model that reads once must keep A in its state until B has been read; one that sees both lists
    whole needs only the shorter. All other tokens are distinct, drawn anew for every row, so that no token
    can be told to be of one list by itself. (The published generator fixes the two pools.)

    first, second: tokens of A and of B. length: follows from them; 0 or first + second + 3.
    """

    name: ClassVar[str] = "set-disjointness"

    vocabulary: int = 2048
    length: int = 0
    first: int = 16
    second: int = 64

    def __post_init__(self) -> None:
        self.require(self.first >= 1, "first", ">= 1", self.first)
        self.require(self.second >= 1, "second", ">= 1", self.second)
        expected = f"0 or first + second + 3 = {self.width}"
        self.require(self.length in (0, self.width), "length", expected, self.length)
        self.require_sizes(FIRST_WORD + self.first + self.second, 0)

    @property
    def width(self) -> int:
        return self.first + self.second + 3

    def generate(self, examples: int, generator: torch.Generator, test: bool = False) -> Batch:
        noise = torch.rand(examples, self.vocabulary - FIRST_WORD, generator=generator)
        words = FIRST_WORD + noise.topk(self.first + self.second).indices
        a, b = words.split([self.first, self.second], dim=1)
        row = torch.arange(examples)
        answer = a[row, integers(0, self.first, (examples,), generator)]
        b = b.clone()
        b[row, integers(0, self.second, (examples,), generator)] = answer

        def mark(token: int) -> torch.Tensor:
            return torch.full((examples, 1), token)

        tokens = torch.cat([mark(BEGIN), a, mark(SEPARATOR), b, mark(ANSWER)], dim=1)
        labels = torch.full_like(tokens, IGNORED)
        labels[:, -1] = answer
        return Batch(tokens, labels, labels)
