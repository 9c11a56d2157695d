"""The interface: a backbone builds, for each layer, a mixer [B, T, d] -> [B, T, d].

A mixer whose class sets `reads_embeddings` is called with the token embeddings as second argument.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Spec:
    """What a mixer may know of the model that it is built for."""

    width: int  # d
    heads: int
    length: int  # the longest sequence it will see
    layer: int  # 0 .. layers - 1
    layers: int
    device: str = "cpu"
    window: int = 16  # of sliding-window attention
    chunk_size: int = 2  # of the retrieval mask inside a mixer
    top_k: int = 1

    def __post_init__(self) -> None:
        if self.width % self.heads or self.heads < 1:
            raise ValueError(f"heads: expected a divisor of width {self.width}, got {self.heads}")


@dataclass(frozen=True)
class Backbone:
    name: str
    summary: str
    build: Callable[[Spec], nn.Module]
    missing: Callable[[str], str | None] = lambda device: None  # why it cannot be used there
    source: Callable[[str], str] = lambda device: "resona_ext benchmarks"  # whose code runs


class CausalConv(nn.Conv1d):
    """Depthwise, over time, on [B, T, d]."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__(width, width, size, groups=width)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x.mT, (self.kernel_size[0] - 1, 0))).mT


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, T, h * D] -> [B, h, T, D]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def previous(x: Tensor) -> Tensor:
    """Every token's left neighbour, zero for the first: [B, T, d]."""
    return F.pad(x, (0, 0, 1, 0))[:, :-1]


def head_norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:])


def linear(inputs: int, outputs: int, bias: bool = False) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=bias)


def absent(module: str, device: str = "") -> str | None:
    """Why a module cannot be imported, in one line; None if it can."""
    try:
        importlib.import_module(module)
    except Exception as error:  # a broken package raises whatever it likes; the grid goes on
        lines = str(error).splitlines()
        detail = f": {lines[0]}" if lines else ""
        return f"{module.split('.')[0]} cannot be imported ({type(error).__name__}{detail})"
    return None


def no_gpu() -> str | None:
    return None if torch.cuda.is_available() else "no GPU"


def no_mixer(spec: Spec) -> nn.Module:
    raise ValueError("this backbone is a whole model and has no mixers of its own")
