"""Answers to questions about texts: SQuAD, CoQA, NarrativeQA, TriviaQA."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from .. import answers
from ..data.questions import Question, read_questions
from ..data.tokens import ModelTokens, Words, model_tokens
from .base import IGNORED, Batch, NextToken, Task, integers


@dataclass(frozen=True)
class Qa(Task):
    """The answer to a question about a text: BLEU, ROUGE-L, METEOR, F1 of what the model writes.

    train, valid, test: a file or hub: place that data/questions.py reads; evidence: TriviaQA's texts.
    A row is the text, the question and the answer; loss and accuracies see the answer and its end, given
    what stands before. The start of a text that is too long stays. Then the model writes, the
    likeliest token each time, up to longest_answer tokens for each question of `test`.
    questions: so many of `test`, evenly spread; None: all. turns: of a conversation, shown before the
    question. model: a Hugging Face causal language model, whose tokens are taken; without it a token
    is a word or a sign of `train`.
    """

    name: ClassVar[str] = "qa"
    metric: ClassVar[str] = "exact"
    test_batch: ClassVar[int] = 16

    vocabulary: int = 8192
    length: int = 512
    train: str = ""
    test: str = ""
    valid: str = ""
    evidence: str = ""
    model: str = ""
    longest_answer: int = 32
    turns: int = 2
    questions: int | None = None

    def __post_init__(self) -> None:
        self.require_sizes(3, 2)
        self.require(bool(self.train), "train", "a file or hub: place", repr(self.train))
        self.require(bool(self.test), "test", "a file or hub: place", repr(self.test))
        fits = 1 <= self.longest_answer < self.length
        expected = f"1 to {self.length - 1}, below length"
        self.require(fits, "longest_answer", expected, self.longest_answer)
        self.require(self.turns >= 0, "turns", ">= 0", self.turns)
        ok = self.questions is None or self.questions >= 1
        self.require(ok, "questions", ">= 1, or null for all", self.questions)

    @property
    def tokens(self) -> Words | ModelTokens:
        if not self.model:
            return _words(self.train, self.evidence, self.turns, self.vocabulary)
        tokens = model_tokens(self.model)
        expected = f">= {tokens.size}, the tokenizer's"
        self.require(self.vocabulary >= tokens.size, "vocabulary", expected, self.vocabulary)
        return tokens

    def generate(self, examples: int, generator: torch.Generator, test: bool = False) -> Batch:
        asked = read_questions((self.valid or self.test) if test else self.train, self.evidence)
        rows = integers(0, len(asked), (examples,), generator)
        return self._batch([asked[row] for row in rows.tolist()])

    def test_set(self) -> Batch:
        return self._batch(self.tested())

    def tested(self) -> list[Question]:
        """The questions of the test, in the order of the file."""
        asked = read_questions(self.test, self.evidence)
        count = min(self.questions or len(asked), len(asked))
        return [asked[number * len(asked) // count] for number in range(count)]

    def written(self, next_token: NextToken) -> dict:
        """answers.score of what the model writes, and "cut", the share of texts cut to fit."""
        tested, said, cut = self.tested(), [], 0
        for begin in range(0, len(tested), self.test_batch):
            prompts = []
            for asked in tested[begin : begin + self.test_batch]:
                prompt, is_cut = self._prompt(asked)
                prompts.append(prompt)
                cut += is_cut
            said += write(prompts, next_token, self.longest_answer, self.tokens.end)
        texts = [self.tokens.decode(ids).strip() for ids in said]
        found = answers.score(texts, [asked.answers for asked in tested])
        return {**found, "cut": round(cut / len(tested), 3)}

    def _batch(self, asked: list[Question]) -> Batch:
        end = self.tokens.end
        tokens = torch.full((len(asked), self.length), end)
        labels = torch.full((len(asked), self.length), IGNORED)
        for row, one in enumerate(asked):
            prompt, _ = self._prompt(one)
            text = one.answers[0]
            answer = self.tokens.encode(f" {text}")[: self.longest_answer - 1] if text else []
            sequence = prompt + answer
            tokens[row, : len(sequence)] = torch.tensor(sequence)
            labels[row, len(prompt) - 1 : len(sequence)] = torch.tensor([*answer, end])
        return Batch(tokens, labels, labels)

    def _prompt(self, asked: Question) -> tuple[list[int], bool]:
        """At most length - longest_answer tokens, and whether the text was cut for that."""
        encode, room = self.tokens.encode, self.length - self.longest_answer
        question = encode(question_text(asked, self.turns))[-room:]
        context = encode(asked.context)
        kept = context[: room - len(question)]
        return kept + question, len(kept) < len(context)


def question_text(asked: Question, turns: int) -> str:
    """What stands between the text and the answer."""
    shown = (*asked.history[max(0, len(asked.history) - turns) :], (asked.question, ""))
    return "".join(f"\nQuestion: {q}\nAnswer:{' ' * bool(a)}{a}" for q, a in shown)


def write(prompts: list[list[int]], next_token: NextToken, most: int, end: int) -> list[list[int]]:
    """What the model writes behind each prompt, the likeliest token each time, without the end.

    Every token costs a forward over the whole row: no cache, so that any causal model will do.
    """
    last = torch.tensor([len(prompt) - 1 for prompt in prompts])
    row = torch.arange(len(prompts))
    tokens = torch.full((len(prompts), int(last.max()) + 1 + most), end)
    for number, prompt in enumerate(prompts):
        tokens[number, : len(prompt)] = torch.tensor(prompt)
    written: list[Tensor] = []
    has_ended = torch.zeros(len(prompts), dtype=torch.bool)
    while len(written) < most and not has_ended.all():
        token = next_token(tokens[:, : int(last.max()) + 1], last)
        token = token.masked_fill(has_ended, end)
        has_ended |= token == end
        last = last + 1
        tokens[row, last] = token
        written.append(token)
    said = torch.stack(written, dim=1).tolist()
    return [ids[: ids.index(end)] if end in ids else ids for ids in said]


@lru_cache(maxsize=2)
def _words(train: str, evidence: str, turns: int, vocabulary: int) -> Words:
    asked = read_questions(train, evidence)
    texts = [f"{question_text(one, turns)} {one.answers[0]}" for one in asked]
    return Words([*dict.fromkeys(one.context for one in asked), *texts], vocabulary)
