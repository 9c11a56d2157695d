"""Train the plain and the augmented model on MQAR, with the same data, steps and start.

The recipe was measured on two CPU cores: embeddings of std 0.3 and a high learning rate let the
retrieved values be used within a hundred steps; an embedding of std 0.02 needs several times more.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import nn

from ...layer import Resona
from ..progress import ProgressBar
from . import mqar
from .recurrence import RecurrentLM


class Recipe(NamedTuple):
    task: mqar.Task = mqar.Task()
    width: int = 64
    batch: int = 64
    steps: int = 150
    learning_rate: float = 1e-2
    weight_decay: float = 0.1
    evaluate_every: int = 10
    curve_examples: int = 200
    test_examples: int = 1000
    chunk_size: int = 2  # one key-value pair
    top_k: int = 1


class Accuracy(NamedTuple):
    token: float  # share of queries answered right
    exact: float  # share of sequences with every query answered right


@dataclass
class Result:
    name: str
    parameters: int
    steps: list[int] = field(default_factory=list)
    curve: list[Accuracy] = field(default_factory=list)
    final: Accuracy | None = None
    seconds: float = 0.0


def compare(recipe: Recipe, seed: int) -> list[Result]:
    """Train both models, plain first."""
    return [
        train(name, build(recipe, augmented, seed), recipe, seed)
        for name, augmented in (("plain", False), ("with Resona", True))
    ]


def build(recipe: Recipe, augmented: bool, seed: int) -> RecurrentLM:
    torch.manual_seed(seed)
    model = RecurrentLM(recipe.task.vocabulary, recipe.width)
    if augmented:
        model.resona = Resona(
            recipe.width,
            num_heads=1,
            chunk_size=recipe.chunk_size,
            top_k=recipe.top_k,
            encoder="tied",
            mix="gate",
        )
    return model


def train(name: str, model: RecurrentLM, recipe: Recipe, seed: int) -> Result:
    data = torch.Generator().manual_seed(seed)
    held_out = torch.Generator().manual_seed(seed + 1)
    watched = mqar.generate(recipe.task, recipe.curve_examples, held_out)
    test = mqar.generate(recipe.task, recipe.test_examples, held_out)

    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        trainable, lr=recipe.learning_rate, weight_decay=recipe.weight_decay
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.steps)
    result = Result(name, sum(parameter.numel() for parameter in trainable))
    bar = ProgressBar(f"  {name:<12}", recipe.steps)
    for step in range(recipe.steps):
        if step % recipe.evaluate_every == 0:
            result.steps.append(step)
            result.curve.append(evaluate(model, watched))
        batch = mqar.generate(recipe.task, recipe.batch, data)
        loss = nn.functional.cross_entropy(
            model(batch.tokens, batch.wanted), batch.labels[batch.wanted]
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        note = f"loss {loss.item():.2f}  token accuracy {result.curve[-1].token:.3f}"
        bar.update(step + 1, note)
    result.seconds = bar.seconds
    result.steps.append(recipe.steps)
    result.curve.append(evaluate(model, watched))
    result.final = evaluate(model, test)
    return result


@torch.no_grad()
def evaluate(model: RecurrentLM, batch: mqar.Batch, at_once: int = 250) -> Accuracy:
    right = []
    for tokens, labels in zip(
        batch.tokens.split(at_once), batch.labels.split(at_once), strict=True
    ):
        wanted = labels != mqar.IGNORED
        answer = model(tokens, wanted).argmax(dim=-1)
        right.append((answer == labels[wanted]).view(len(tokens), -1))
    right = torch.cat(right)
    return Accuracy(right.double().mean().item(), right.all(dim=1).double().mean().item())
