"""A needle in a haystack of random tokens, and the score that the paper gives a response."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from . import rag
from .base import IGNORED, Batch, Task, integers

FULL_SCORE = 5.0


@dataclass(frozen=True)
class Niah(Task):
    """hay, <needle> key v1 .. vm, hay, <ask> key v1 .. vm: the values behind the last key are wanted.

    Tokens: 0 <needle>, 1 <ask>, then `keys` keys; hay and values share the rest. needles: with several,
    keys differ and one is asked. depth: where the first needle starts, 0 to 1; None draws it.
    context: "whole", or what `rag` makes of it with rag_chunks chunks of rag_chunk tokens.
    """

    name: ClassVar[str] = "niah"
    metric: ClassVar[str] = "exact"

    vocabulary: int = 256
    length: int = 256
    keys: int = 32
    values: int = 4
    needles: int = 1
    depth: float | None = None
    context: str = "whole"
    rag_chunk: int = 8
    rag_chunks: int = 1

    def __post_init__(self) -> None:
        self.require(self.values >= 1, "values", ">= 1", self.values)
        self.require(1 <= self.needles <= self.keys, "needles", f"1 to {self.keys}", self.needles)
        self.require_sizes(self.keys + 4, self.needles * self._needle + self._question)
        ok = self.depth is None or (0 <= self.depth <= 1 and self.needles == 1)
        self.require(ok, "depth", "None, or 0 to 1 with one needle", self.depth)
        self.require(self.context in rag.MODES, "context", f"one of {rag.MODES}", self.context)
        fits = min(self.rag_chunk, self.rag_chunks) >= 1 and self._found <= self._hay
        expected = f"chunks of at most {self._hay} tokens together"
        self.require(fits, "rag_chunk, rag_chunks", expected, (self.rag_chunk, self.rag_chunks))

    @property
    def _needle(self) -> int:
        return 2 + self.values

    @property
    def _question(self) -> int:
        return 1 + self.values  # <ask>, key, and all values but the last

    @property
    def _hay(self) -> int:
        return self.length - self._question

    @property
    def _found(self) -> int:
        return self.rag_chunk * self.rag_chunks

    @property
    def width(self) -> int:
        return rag.width(self.context, self.length, self._hay, self.rag_chunk, self.rag_chunks)

    def generate(self, examples: int, generator: torch.Generator, test: bool = False) -> Batch:
        hay = self._hay
        first_word = 2 + self.keys
        tokens = integers(first_word, self.vocabulary, (examples, self.length), generator)
        key = 2 + torch.rand(examples, self.keys, generator=generator).topk(self.needles).indices
        value = integers(
            first_word, self.vocabulary, (examples, self.needles, self.values), generator
        )
        needle = torch.cat([torch.zeros_like(key).unsqueeze(2), key.unsqueeze(2), value], dim=2)
        start = self._starts(examples, hay, generator).unsqueeze(2)
        place = start + torch.arange(self._needle)
        tokens = tokens.scatter(1, place.flatten(1), needle.flatten(1))

        asked = integers(0, self.needles, (examples,), generator)
        row = torch.arange(examples)
        answer = value[row, asked]
        tokens[:, hay], tokens[:, hay + 1] = 1, key[row, asked]
        tokens[:, hay + 2 :] = answer[:, :-1]
        labels = torch.full_like(tokens, IGNORED)
        labels[:, hay + 1 :] = answer
        batch = Batch(tokens, labels, labels)
        size, chunks = self.rag_chunk, self.rag_chunks
        return rag.rebuild(batch, self.context, hay, 2, size, chunks, self.vocabulary)

    def _starts(self, examples: int, hay: int, generator: torch.Generator) -> torch.Tensor:
        """Where the needles start, ascending, without overlap, [N, needles]."""
        room = hay - self.needles * self._needle
        if self.depth is not None:
            return torch.full((examples, 1), round(self.depth * room))
        gap = integers(0, room + 1, (examples, self.needles), generator).sort(dim=1).values
        return gap + torch.arange(self.needles) * self._needle


def score(response: str, needle: str) -> float:
    """5 for a response that holds the needle, else 5 times the longest share of its start that it holds.

    Appendix C.5 of the paper: the needle is cut from its end, a few characters at a time, until the
    response contains it. "A few" is one here, which finds the longest prefix there is. An empty needle
    is an error: it is contained in everything.

    Raises:
        ValueError: needle is empty.
    """
    if not needle:
        raise ValueError("niah.score: needle: expected at least one character, got none")
    for size in range(len(needle), 0, -1):
        if needle[:size] in response:
            return FULL_SCORE * size / len(needle)
    return 0.0
