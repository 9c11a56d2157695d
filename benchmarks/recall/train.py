"""Train and test one cell. Killed at any time, it goes on from its last checkpoint."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from resona_ext.cli.progress import ProgressBar

from . import backbones
from .config import Cell
from .hits import hit_rate
from .model import make_model, trained_parameters
from .tasks import IGNORED, Batch, Task

CHECKPOINT_SECONDS = 45.0


class Accuracy(NamedTuple):
    token: float  # share of wanted tokens that are right (MAD calls it micro)
    exact: float  # share of rows with all of them right
    macro: float  # mean recall per class, batch by batch
    perplexity: float  # exp of the mean cross-entropy per wanted token

    def as_json(self) -> dict[str, float]:
        return {name: round(value, 5) for name, value in self._asdict().items()}


@dataclass
class State:
    """What a checkpoint holds besides weights and optimizer."""

    step: int = 0
    seconds: float = 0.0
    curve: list[list[float]] = field(default_factory=list)  # step, then Accuracy
    hits: list[list[float]] = field(default_factory=list)  # step, hit rate


class Data(NamedTuple):
    training: Batch | None  # None: drawn anew in every step
    held_out: Batch
    test: Batch


def make_data(task: Task, cell: Cell) -> Data:
    """Seeded by the cell, the three parts apart: a change of one leaves the others."""
    settings = cell.training

    def draw(part: int, examples: int, test: bool) -> Batch:
        generator = torch.Generator().manual_seed(10 * cell.seed + part)
        batches = []
        for begin in range(0, examples, 1000):  # intermediate tensors are large
            batches.append(task.generate(min(1000, examples - begin), generator, test))
        return Batch(*(torch.cat(parts) for parts in zip(*batches, strict=True)))

    training = None if settings.examples is None else draw(0, settings.examples, False)
    test = task.test_set()
    test = draw(2, settings.test_examples, True) if test is None else test
    return Data(training, draw(1, settings.held_out, True), test)


def batches(task: Task, cell: Cell, data: Data) -> Iterator[Batch]:
    """Training batches without end; each is a function of its number, so a resumed run continues them."""
    size = cell.training.batch
    step = 0
    while data.training is None:
        state = 1_000_003 * (cell.seed + 1) + step
        yield task.generate(size, torch.Generator().manual_seed(state))
        step += 1
    examples, epoch = len(data.training.tokens), 0
    while True:
        shuffle = torch.Generator().manual_seed(1_000_003 * (cell.seed + 1) + epoch)
        order = torch.randperm(examples, generator=shuffle)
        for rows in order.split(size):
            if len(rows) == min(size, examples):
                yield Batch(*(part[rows] for part in data.training))
        epoch += 1


class Run:
    """One cell on one device. `folder` holds the checkpoint while it is under way.

    Several runs of one process may take turns (`turns`): each has a random state of its own and, on a GPU,
    a stream of its own, so that it ends as it would alone.
    """

    def __init__(
        self, cell: Cell, folder: Path, device: str = "cpu", *, has_bar: bool = True
    ) -> None:
        self.cell, self.device, self.has_bar = cell, device, has_bar
        self.checkpoint = folder / f"{cell.id}.pt"
        self.task = cell.make_task()
        self.state = State()
        self.stream = torch.cuda.Stream() if device == "cuda" else None
        self.random: tuple[Tensor, Tensor | None] | None = None
        with self._turn():
            torch.manual_seed(cell.seed)
            self.model = make_model(cell, device).to(device)
        settings = cell.training
        self.optimizer = torch.optim.AdamW(
            self._groups(), lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
            self.optimizer, settings.steps, eta_min=settings.final_rate
        )

    def train(self) -> dict:
        """Train to the end and test; the result as JSON."""
        *_, result = self.turns()
        return result

    def turns(self) -> Iterator[dict | None]:
        """The same step by step: None once a step is on its way, at last the result.

        The loss is waited for at the next turn, so that a GPU has the steps of other runs meanwhile.
        """
        with self._turn():
            self._load()
            data = make_data(self.task, self.cell)
            source = batches(self.task, self.cell, data)
            for _ in range(self.state.step):
                next(source)
        bar = ProgressBar(f"  {self.cell.label}", self.cell.training.steps)
        loss, saved, is_over = None, time.perf_counter(), False
        while not is_over:
            with self._turn():
                begin = time.perf_counter()
                if loss is not None:
                    self._tell(bar, loss)
                    if begin - saved > CHECKPOINT_SECONDS:
                        self._save()
                        saved = begin
                is_over = self.state.step >= self.cell.training.steps or self._is_done(
                    data.held_out
                )
                if not is_over:
                    loss = self._step(next(source))
                    self.state.step += 1
                self.state.seconds += time.perf_counter() - begin
            if not is_over:
                yield None
        with self._turn():
            result = self._result(data)
        self.checkpoint.unlink(missing_ok=True)
        yield result

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Inside, random numbers and the current stream are this run's own."""
        on_stream = nullcontext() if self.stream is None else torch.cuda.stream(self.stream)
        devices = [] if self.stream is None else [torch.cuda.current_device()]
        with torch.random.fork_rng(devices), on_stream:
            if self.random is not None:
                self._set_random(*self.random)
            yield
            self.random = self._get_random()

    def _get_random(self) -> tuple[Tensor, Tensor | None]:
        on_gpu = None if self.stream is None else torch.cuda.get_rng_state()
        return torch.get_rng_state(), on_gpu

    def _set_random(self, on_cpu: Tensor, on_gpu: Tensor | None) -> None:
        torch.set_rng_state(on_cpu)
        if self.stream is not None and on_gpu is not None:
            torch.cuda.set_rng_state(on_gpu)

    def _groups(self) -> list[dict]:
        """The trained parameters; those of the branches apart where they have a rate of their own."""
        trained = [p for p in self.model.parameters() if p.requires_grad]
        rate = self.cell.training.branch_rate
        theirs = {id(p) for branch in self.model.branches for p in branch.parameters()}
        if rate is None or not theirs:
            return [{"params": trained}]
        return [
            {"params": [p for p in trained if id(p) not in theirs]},
            {"params": [p for p in trained if id(p) in theirs], "lr": rate},
        ]

    def _tell(self, bar: ProgressBar, loss: Tensor) -> None:
        value, last = loss.item(), self.state.curve[-1]
        if self.has_bar:
            note = f"loss {value:.3f}  token {last[1]:.3f}  exact {last[2]:.3f}"
            bar.update(self.state.step, note)

    def _is_done(self, held_out: Batch) -> bool:
        """Evaluate when it is time to; whether the accuracy suffices."""
        if self.state.step % self.cell.training.evaluate_every:
            return False
        if not self.state.curve or self.state.curve[-1][0] < self.state.step:
            accuracy = self.evaluate(held_out)
            self.state.curve.append([self.state.step, *accuracy.as_json().values()])
            hit = self._hits(held_out)
            self.state.hits += [] if hit is None else [[self.state.step, hit]]
        stop_at, metric = self.cell.training.stop_at, self.task.metric
        reached = self.state.curve[-1][1 + Accuracy._fields.index(metric)]
        if stop_at is None:
            return False
        return reached <= stop_at if metric == "perplexity" else reached >= stop_at

    def _step(self, batch: Batch) -> Tensor:
        self.model.train()
        wanted = (batch.targets != IGNORED).nonzero(as_tuple=True)
        targets = self._here(batch.targets[wanted])
        with self._precision():
            tokens = self._here(batch.tokens)
            logits = self.model(tokens, tuple(self._here(index) for index in wanted))
        loss = nn.functional.cross_entropy(logits.float(), targets)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        return loss.detach()

    def _here(self, x: Tensor) -> Tensor:
        """On the run's device, without waiting for what it has to do."""
        return x if self.stream is None else x.pin_memory().to(self.device, non_blocking=True)

    def _precision(self):
        if not self.cell.training.bfloat16:
            return nullcontext()
        return torch.autocast(self.device, dtype=torch.bfloat16)

    @torch.no_grad()
    def evaluate(self, data: Batch) -> Accuracy:
        self.model.eval()
        right_rows, macros, right, wanted_tokens, loss = 0, [], 0, 0, 0.0
        parts = data.split(self.task.test_batch)
        for part in parts:
            labels = part.labels.to(self.device)
            wanted = labels != IGNORED
            with self._precision():
                logits = self.model(part.tokens.to(self.device), wanted).float()
            answer = logits.argmax(dim=-1)
            loss += nn.functional.cross_entropy(logits, labels[wanted], reduction="sum").item()
            is_right = torch.ones_like(wanted)
            is_right[wanted] = answer == labels[wanted]
            right_rows += int(is_right.all(dim=1).sum())
            right += int((is_right & wanted).sum())
            wanted_tokens += int(wanted.sum())
            macros.append(macro_accuracy(answer, labels[wanted], self.task.vocabulary))
        rows = len(data.tokens)
        macro, perplexity = sum(macros) / len(macros), math.exp(min(loss / wanted_tokens, 700.0))
        return Accuracy(right / wanted_tokens, right_rows / rows, macro, perplexity)

    def _hits(self, data: Batch) -> float | None:
        """Retrieval's rate of hits, where the task and the model have one."""
        if not self.task.stands_once:
            return None
        rate = hit_rate(self.model, data, self.task.test_batch, self.device)
        return None if rate is None else round(rate, 5)

    def _result(self, data: Data) -> dict:
        backbone, model = backbones.find(self.cell.backbone), self.model
        begin = time.perf_counter()
        accuracy = self.evaluate(data.test)
        written = self.task.written(self._next_token)
        return {
            **accuracy.as_json(),
            **({} if written is None else {"written": written}),
            "steps": self.state.step,
            "seconds": round(self.state.seconds, 1),
            "test_seconds": round(time.perf_counter() - begin, 2),
            "parameters": trained_parameters(model),
            "branch_parameters": sum(map(trained_parameters, model.branches)),
            "source": backbone.source(self.device),
            "curve": self.state.curve,
            "hit": self._hits(data.test),
            "hits": self.state.hits,
            "at": self._at_other_settings(data.test),
        }

    @torch.no_grad()
    def _next_token(self, tokens: Tensor, last: Tensor) -> Tensor:
        self.model.eval()
        wanted = (torch.arange(len(last), device=self.device), last.to(self.device))
        with self._precision():
            return self.model(tokens.to(self.device), wanted).argmax(dim=-1).cpu()

    def _at_other_settings(self, test: Batch) -> dict[str, dict]:
        """The same weights with other values of the branch's knobs, one at a time."""
        found = {}
        for name, values in self.cell.training.at.items():
            trained = getattr(self.model.branches[0], name)
            for value in values:
                self._set_knob(name, value)
                begin = time.perf_counter()
                accuracy = self.evaluate(test).as_json()
                seconds = round(time.perf_counter() - begin, 2)
                found[f"{name}={value}"] = {**accuracy, "test_seconds": seconds}
            self._set_knob(name, trained)
        return found

    def _set_knob(self, name: str, value: object) -> None:
        for branch in self.model.branches:
            setattr(branch, name, value)

    def _save(self) -> None:
        self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        parts = ("model", "optimizer", "schedule")
        content = {name: getattr(self, name).state_dict() for name in parts}
        temporary = self.checkpoint.with_suffix(".part")
        random = dict(zip(("random", "gpu_random"), self._get_random(), strict=True))  # of dropout
        torch.save({**content, "state": vars(self.state), **random}, temporary)
        os.replace(temporary, self.checkpoint)

    def _load(self) -> None:
        if not self.checkpoint.exists():
            return
        content = torch.load(self.checkpoint, map_location=self.device, weights_only=True)
        for name in ("model", "optimizer", "schedule"):
            getattr(self, name).load_state_dict(content[name])
        self.state = State(**content["state"])
        on_gpu = content.get("gpu_random")
        self._set_random(content["random"].cpu(), None if on_gpu is None else on_gpu.cpu())


def macro_accuracy(answer: Tensor, label: Tensor, classes: int) -> float:
    """Mean recall over the classes among labels or answers: a class only ever answered counts 0."""
    wanted = torch.bincount(label, minlength=classes)
    right = torch.bincount(label[answer == label], minlength=classes)
    occurs = (wanted + torch.bincount(answer, minlength=classes)) > 0
    return (right[occurs] / wanted[occurs].clamp(min=1)).double().mean().item()
