"""Language modelling: WikiText, or text of your own."""

from __future__ import annotations

import importlib
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from ..data import hub
from .base import Batch, Task, integers

ENDINGS = (".txt", ".tokens", ".raw")
UNKNOWN, END_OF_LINE = 0, 1


@dataclass(frozen=True)
class Text(Task):
    """The next token at every position of windows of length + 1 tokens; perplexity.

    train, test: a file, a folder whose .txt, .tokens and .raw files are read in order of their names, or
    a hub: place (data/hub.py), as hub:wikitext-103:train, whose rows have a "text".
    Training and held-out data are random windows (held-out ones of `valid`, or of `test` without it); the
    test is all of `test` in windows side by side, each starting without context. Empty lines are
    dropped. tokenizer: a tokenizer.json of Hugging Face tokenizers; without it a token is a word, one
    of the vocabulary - 2 most frequent in `train`, an unknown one, or the end of a line.
    """

    name: ClassVar[str] = "text"
    metric: ClassVar[str] = "perplexity"

    vocabulary: int = 8192
    length: int = 256
    train: str = ""
    test: str = ""
    valid: str = ""
    tokenizer: str = ""

    def __post_init__(self) -> None:
        self.require_sizes(3, 1)
        self.require(bool(self.train), "train", "a file or folder", repr(self.train))
        self.require(bool(self.test), "test", "a file or folder", repr(self.test))

    def generate(self, examples: int, generator: torch.Generator, test: bool = False) -> Batch:
        stream = self._stream((self.valid or self.test) if test else self.train)
        begin = integers(0, len(stream) - self.length, (examples, 1), generator)
        return _windows(stream[begin + torch.arange(self.length + 1)])

    def test_set(self) -> Batch:
        stream = self._stream(self.test)
        count = (len(stream) - 1) // self.length
        begin = self.length * torch.arange(count).unsqueeze(1)
        return _windows(stream[begin + torch.arange(self.length + 1)])

    def _stream(self, path: str) -> Tensor:
        stream = encode(path, self.train, self.tokenizer, self.vocabulary)
        expected = f"more than length = {self.length} tokens"
        self.require(len(stream) > self.length, path, expected, len(stream))
        return stream


def _windows(rows: Tensor) -> Batch:
    return Batch(rows[:, :-1], rows[:, 1:], rows[:, 1:])


@lru_cache(maxsize=8)
def encode(path: str, train: str, tokenizer: str, vocabulary: int) -> Tensor:
    """All tokens of a file or folder, int64 [N]. Raises ValueError, one line."""
    if tokenizer:
        return _encode_with(tokenizer, path, vocabulary)
    known = _words(train, vocabulary)
    ids = []
    for line in read_lines(path):
        ids += [known.get(word, UNKNOWN) for word in line.split()]
        ids.append(END_OF_LINE)
    return torch.tensor(ids)


@lru_cache(maxsize=8)
def _words(train: str, vocabulary: int) -> dict[str, int]:
    count = Counter(word for line in read_lines(train) for word in line.split())
    return {word: 2 + rank for rank, (word, _) in enumerate(count.most_common(vocabulary - 2))}


def _encode_with(tokenizer: str, path: str, vocabulary: int) -> Tensor:
    try:
        library = importlib.import_module("tokenizers")
        made = library.Tokenizer.from_file(tokenizer)
    except Exception as error:  # the library raises bare Exception for a file it cannot read
        raise ValueError(f"text: tokenizer {tokenizer}: {error}") from error
    size = made.get_vocab_size()
    if size > vocabulary:
        raise ValueError(f"text: vocabulary: expected >= {size}, the tokenizer's, got {vocabulary}")
    return torch.tensor(made.encode("\n".join(read_lines(path))).ids)


@lru_cache(maxsize=4)
def read_lines(path: str) -> tuple[str, ...]:
    """The lines that are not empty, stripped. Raises ValueError, one line."""
    if hub.is_hub(path):
        return _rows(path)
    place = Path(path)
    files = [place]
    if place.is_dir():
        files = sorted(file for file in place.iterdir() if file.suffix in ENDINGS)
        if not files:
            raise ValueError(f"text: {path} holds no {', '.join(ENDINGS)} file")
    try:
        lines = [line.strip() for file in files for line in file.read_text("utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"text: cannot read {path}: {error}") from error
    return tuple(line for line in lines if line)


def _rows(place: str) -> tuple[str, ...]:
    """A row may hold several lines."""
    try:
        texts = [row["text"] for row in hub.read_rows(place)]
    except KeyError as error:
        raise ValueError(f"text: {place}: its rows have no {error}") from error
    lines = (line.strip() for text in texts for line in text.splitlines())
    return tuple(line for line in lines if line)
