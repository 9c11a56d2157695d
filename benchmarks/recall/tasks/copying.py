"""Copying: repeat a random string ("Repeat After Me", arXiv 2402.01032)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from .base import IGNORED, Batch, Task, integers


@dataclass(frozen=True)
class Copying(Task):
    """s1 .. sn <copy> s1 .. sn: from the copy token on, the string is wanted.

    n is uniform from shortest to longest while training, and always longest in tests. Letters are
    2 .. V - 1, 0 pads behind the copy, 1 is the copy token. distinct: no letter twice.
    """

    name: ClassVar[str] = "copying"
    metric: ClassVar[str] = "exact"

    vocabulary: int = 28  # 26 letters
    length: int = 64  # the longest string
    shortest: int = 1
    distinct: bool = False

    def __post_init__(self) -> None:
        self.require_sizes(self.length + 2 if self.distinct else 3, 1)
        expected = f"1 to length = {self.length}"
        self.require(1 <= self.shortest <= self.length, "shortest", expected, self.shortest)

    @property
    def width(self) -> int:
        return 2 * self.length

    def generate(self, examples: int, generator: torch.Generator, test: bool = False) -> Batch:
        if self.distinct:
            weight = torch.rand(examples, self.vocabulary - 2, generator=generator)
            letter = 2 + weight.topk(self.length).indices
        else:
            letter = integers(2, self.vocabulary, (examples, self.length), generator)
        least = self.length if test else self.shortest
        size = integers(least, self.length + 1, (examples, 1), generator)

        place = torch.arange(self.width).expand(examples, -1)
        of_copy = place - size  # 0 at the copy token, then 1 .. n - 1
        source = torch.where(place < size, place, of_copy - 1).clamp(0, self.length - 1)
        tokens = letter.gather(1, source).masked_fill(of_copy == 0, 1)
        wanted = (of_copy >= 0) & (of_copy < size)
        tokens = tokens.masked_fill(of_copy >= size, 0)
        labels = letter.gather(1, of_copy.clamp(0, self.length - 1)).masked_fill(~wanted, IGNORED)
        return Batch(tokens, labels, labels)
