"""Who else takes part. Each baseline says what it computes, where it can run, and why it is missing.

A baseline only states its forward, in its own natural layout; the harness converts the inputs outside
the timer, derives the backward through autograd, and checks the result before it times anything.

    dense     causal attention to the whole past: another function, the anchor of every speed-up
    selected  attention to the given chunks: the very function of resona::attend
    whole     pool, search and attend in one: the very function of the fused operator
    moba      the query's own chunk and others, chosen per head from keys: a relative, not the same
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from torch import Tensor

from ..data import Case


@dataclass(frozen=True)
class Checkouts:
    """Source trees that the user points to."""

    nsa: Path | None = None
    flashmoba: Path | None = None


@dataclass(frozen=True)
class Forward:
    """A forward pass. function(query, key, value) -> out, all [B, T, H, D], or [B, H, T, D]."""

    function: Callable[..., Tensor]
    heads_first: bool = False

    def inputs(self, case: Case) -> tuple[Tensor, ...]:
        tensors = (case.query, case.key, case.value)
        if self.heads_first:
            return tuple(x.transpose(1, 2).contiguous() for x in tensors)
        return tensors

    def standard(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2) if self.heads_first else x


@dataclass(frozen=True)
class Baseline:
    name: str
    summary: str
    computes: str  # "dense", "selected", "whole" or "moba"; "stage" for single stages
    operators: tuple[str, ...]
    missing: Callable[[str, Checkouts], str | None]  # device -> the reason, if it cannot be used
    unfit: Callable[[Case], str | None]  # the reason why it cannot do this problem
    build: Callable[[Case, Checkouts], Callable | Forward]  # for stages: a call without arguments


def importable(module: str) -> ModuleType:
    """Raises ImportError in one line, whatever went wrong inside."""
    try:
        return importlib.import_module(module)
    except Exception as error:  # a package built for another torch fails in many ways
        text = str(error).strip().splitlines()
        raise ImportError(f"{module}: {text[0] if text else type(error).__name__}") from error


def import_reason(module: str) -> str | None:
    try:
        importable(module)
    except ImportError as error:
        return f"not importable, {error}"
    return None


def needs_gpu(device: str) -> str | None:
    return None if device == "cuda" else "needs a GPU"


def low_precision_only(case: Case) -> str | None:
    return "bfloat16 and float16 only" if case.dtype_name == "float32" else None


def all_baselines() -> dict[str, Baseline]:
    from . import checkouts, flash_attention, flex, plain, sdpa

    modules = (sdpa, flash_attention, flex, plain, checkouts)
    return {baseline.name: baseline for module in modules for baseline in module.BASELINES}
