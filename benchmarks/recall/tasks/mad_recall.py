"""MAD's recall tasks (arXiv 2403.17844): in-context, noisy and fuzzy recall, written anew.

The loss sees the whole shifted sequence; scored are only values whose key occurred before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .base import Batch, Task, choose, first_occurrence, integers, next_token


@dataclass(frozen=True)
class InContextRecall(Task):
    """k v k v ...: a key keeps its value for the whole sequence; the last pair repeats a key.

    Keys 0 .. V/2 - 1, values V/2 .. V - 1, where V leaves out the noise of the subclass.
    """

    name: ClassVar[str] = "in-context-recall"
    metric: ClassVar[str] = "macro"

    vocabulary: int = 16
    length: int = 128

    def __post_init__(self) -> None:
        self.require_sizes(4, 4)
        self.require(self.length % 2 == 0, "length", "even", self.length)

    @property
    def width(self) -> int:
        return self.length - 1

    @property
    def _usable(self) -> int:
        return self.vocabulary

    def generate(self, examples: int, generator: torch.Generator, test: bool = False) -> Batch:
        half, pairs = self._usable // 2, self.length // 2 - 1
        key = integers(0, half, (examples, pairs), generator)
        is_pair = self._is_pair(examples, pairs, generator)
        # What gives way to noise is no occurrence: its code is nobody else's.
        first = first_occurrence(torch.where(is_pair, key, half + torch.arange(pairs)))
        seen = torch.zeros(examples, half, dtype=torch.bool).scatter_reduce(1, key, is_pair, "amax")
        probe = choose(seen, generator)  # every key that occurred is equally likely
        value_of = integers(half, self._usable, (examples, half), generator)

        keys = torch.cat([key, probe.unsqueeze(1)], dim=1)
        pair = torch.stack([keys, value_of.gather(1, keys)], dim=2)
        pair[:, :-1] = torch.where(is_pair.unsqueeze(2), pair[:, :-1], self._noise(pair, generator))
        is_answer = torch.zeros_like(pair, dtype=torch.bool)
        is_answer[:, :-1, 1] = is_pair & (first < torch.arange(pairs))
        is_answer[:, -1, 1] = True
        return next_token(pair.flatten(1), is_answer.flatten(1))

    def _is_pair(self, examples: int, pairs: int, generator: torch.Generator) -> Tensor:
        return torch.ones(examples, pairs, dtype=torch.bool)

    def _noise(self, pair: Tensor, generator: torch.Generator) -> Tensor:
        return pair[:, :-1]


@dataclass(frozen=True)
class NoisyRecall(InContextRecall):
    """The same with noise: a pair gives way to two noise tokens with probability frac_noise.

    The last noise_vocabulary ids are noise. One pair, chosen at random, always stays.
    """

    name: ClassVar[str] = "noisy-recall"

    vocabulary: int = 32
    noise_vocabulary: int = 16
    frac_noise: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.noise_vocabulary >= 1, "noise_vocabulary", ">= 1", self.noise_vocabulary)
        self.require_sizes(self.noise_vocabulary + 4, 4)
        self.require(0 <= self.frac_noise < 1, "frac_noise", "in [0, 1)", self.frac_noise)

    @property
    def _usable(self) -> int:
        return self.vocabulary - self.noise_vocabulary

    def _is_pair(self, examples: int, pairs: int, generator: torch.Generator) -> Tensor:
        kept = torch.rand(examples, pairs, generator=generator) >= self.frac_noise
        forced = integers(0, pairs, (examples, 1), generator)
        return kept.scatter(1, forced, True)

    def _noise(self, pair: Tensor, generator: torch.Generator) -> Tensor:
        examples, pairs, two = pair.shape
        return integers(self._usable, self.vocabulary, (examples, pairs - 1, two), generator)


@dataclass(frozen=True)
class FuzzyRecall(Task):
    """Keys and values of 1 to motif tokens each, padded on the left; the last pair is a probe.

    Keys from 0 .. (V - 1) // 2 - 1, values from there to V - 2, V - 1 pads. A motif holds a token at
    most once; its size is uniform, in tests that of keys is always the largest. One more pair, the
    probe, stands at a random place among the others and again at the end. MAD draws from lists
    of all permutations; drawing token by token is the same distribution.
    """

    name: ClassVar[str] = "fuzzy-recall"
    metric: ClassVar[str] = "macro"

    vocabulary: int = 16
    length: int = 128
    motif: int = 3

    def __post_init__(self) -> None:
        self.require(self.motif >= 1, "motif", ">= 1", self.motif)
        self.require_sizes(2 * self.motif + 1, 6 * self.motif)

    def generate(self, examples: int, generator: torch.Generator, test: bool = False) -> Batch:
        boundary, pad, motif = (self.vocabulary - 1) // 2, self.vocabulary - 1, self.motif
        count = self.length // 2 + 1  # no more pairs than this fit; the last column is the probe
        key = _motifs(0, boundary, motif, (examples, count), motif if test else 1, generator)
        value = _motifs(boundary, pad, motif, (examples, count), 1, generator)
        key, value = self._place_probe(key, value, generator)
        key, value, first = self._same_value(key, value)
        pairs = self._fitting(key, value, _sizes(key, value)[:, -1:])
        used = torch.arange(count) < pairs.unsqueeze(1)
        used[:, -1] = True
        repeated = used & (first < torch.arange(count))

        token = torch.cat([key, value], dim=2)
        valid = (token >= 0) & used.unsqueeze(-1)
        is_answer = torch.zeros_like(valid)
        is_answer[:, :, motif:] = repeated.unsqueeze(-1)
        sequence, answer = _pad_left(token, valid, is_answer & valid, self.length + 1, pad)
        return next_token(sequence, answer)

    def _place_probe(
        self, key: Tensor, value: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """The pair of the last column also in a random one of those that fit for certain."""
        _, settled, _ = self._same_value(key, value)
        fitting = self._fitting(key, settled, torch.tensor(2 * self.motif))
        index = (torch.rand(key.shape[0], generator=generator) * fitting).long()
        row = torch.arange(key.shape[0])
        key, value = key.clone(), value.clone()
        key[row, index], value[row, index] = key[:, -1], value[:, -1]
        return key, value

    def _same_value(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Every key with the value of its first occurrence, and where that is."""
        base = (self.vocabulary - 1) // 2 + 1
        code = ((key + 1) * base ** torch.arange(self.motif)).sum(dim=-1)  # no token counts as 0
        first = first_occurrence(code)
        return key, value.gather(1, first.unsqueeze(-1).expand_as(value)), first

    def _fitting(self, key: Tensor, value: Tensor, probe: Tensor) -> Tensor:
        """Pairs are appended while this leaves room for a largest pair and the probe."""
        size = _sizes(key, value)[:, :-1]
        return ((size.cumsum(dim=1) - size) < self.length - probe - 2 * self.motif).sum(dim=1)


def _motifs(
    low: int,
    high: int,
    longest: int,
    shape: tuple[int, int],
    least: int,
    generator: torch.Generator,
) -> Tensor:
    """Ordered samples without repetition, [N, P, longest], -1 behind the last token of each."""
    weight = torch.rand(*shape, high - low, generator=generator)
    token = low + weight.topk(longest, dim=-1).indices
    size = integers(least, longest + 1, shape, generator)
    return token.masked_fill(torch.arange(longest) >= size.unsqueeze(-1), -1)


def _sizes(key: Tensor, value: Tensor) -> Tensor:
    return (key >= 0).sum(dim=-1) + (value >= 0).sum(dim=-1)


def _pad_left(
    token: Tensor, valid: Tensor, is_answer: Tensor, length: int, pad: int
) -> tuple[Tensor, Tensor]:
    """The valid tokens of each row, in order, at the end of a row of `length`."""
    token, valid, is_answer = (x.flatten(1) for x in (token, valid, is_answer))
    place = length - valid.sum(dim=1, keepdim=True) + valid.cumsum(dim=1) - 1
    place = place.masked_fill(~valid, length)  # a column that is cut off
    sequence = torch.full((token.shape[0], length + 1), pad).scatter(1, place, token)
    answer = torch.zeros_like(sequence, dtype=torch.bool).scatter(1, place, is_answer)
    return sequence[:, :length], answer[:, :length]
