"""Gated convolutions: BaseConv, Hyena, H3. Own short forms; long kernels by FFT."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import CausalConv, Spec, linear
from .recurrences import long_convolution


class ImplicitKernel(nn.Module):
    """A kernel as long as the sequence: a small sine network over time, fading at learnt speeds."""

    def __init__(self, width: int, length: int, hidden: int, depth: int, frequency: float) -> None:
        super().__init__()
        self.frequency = frequency
        time = torch.linspace(0, 1, length).unsqueeze(1)
        wave = 2 * math.pi * torch.arange(length).unsqueeze(1) / length
        features = torch.cat([time, wave.cos(), -wave.sin()], dim=1)
        self.register_buffer("features", features, persistent=False)
        sizes = [3, *[hidden] * depth]
        self.inner = nn.ModuleList(linear(a, b, bias=True) for a, b in pairwise(sizes))
        self.last = linear(hidden, width)
        self.fade = nn.Parameter(torch.linspace(1.2, 4.6, width))  # e^-1 to e^-5 at the end

    def forward(self) -> Tensor:
        """[length, width]. Sines of large arguments: never in half precision."""
        with torch.autocast(self.features.device.type, enabled=False):
            x = self.features
            for layer in self.inner:
                x = torch.sin(self.frequency * layer(x))
            return self.last(x) * torch.exp(-self.features[:, :1] * self.fade.abs())


class BaseConv(nn.Module):
    """y = conv(x) * (W x + b) + x (arXiv 2312.04927): kernels of 3 in even layers, long in odd ones."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        d = spec.width
        self.gate = linear(d, d, bias=True)
        self.short = CausalConv(d, 3) if spec.layer % 2 == 0 else None
        self.kernel = ImplicitKernel(d, spec.length, 16, 1, 1.0) if self.short is None else None

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.short(x) if self.short is not None else long_convolution(x, self.kernel())
        return mixed * self.gate(x) + x


class Hyena(nn.Module):
    """Order 2 (arXiv 2302.10866): x1 * (long kernel over x2 * v), after short convolutions of 3."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        d = spec.width
        self.project = linear(d, 3 * d, bias=True)
        self.short = CausalConv(3 * d, 3)
        self.kernel = ImplicitKernel(d, spec.length, 64, 3, 10.0)
        self.skip = nn.Parameter(torch.randn(d))
        self.out = linear(d, d, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        first, second, v = self.short(self.project(x)).chunk(3, dim=-1)
        v = second * v
        return self.out(first * (long_convolution(v, self.kernel()) + self.skip * v))


class H3(nn.Module):
    """q * ssm(shift(k) v^T) (arXiv 2212.14052): a short state remembers k, a long one the products.

    Both states have as many entries as the sequence is long, up to 64; heads of head_dim channels
    share the outer products, as in Zoology.
    """

    def __init__(self, spec: Spec, head_dim: int = 2) -> None:
        super().__init__()
        d, self.head_dim = spec.width, head_dim
        states = min(64, spec.length)
        self.q, self.k, self.v, self.out = (linear(d, d, bias=True) for _ in range(4))
        self.shift = nn.Parameter(torch.randn(states, d) / math.sqrt(states))
        heads = d // head_dim
        self.log_step = nn.Parameter(torch.empty(heads).uniform_(math.log(1e-3), math.log(1e-1)))
        self.log_decay = nn.Parameter(torch.full((heads, states), math.log(0.5)))
        self.turn = nn.Parameter(math.pi * torch.arange(states).repeat(heads, 1))
        self.weight = nn.Parameter(torch.randn(heads, states, 2) / math.sqrt(states))
        self.skip = nn.Parameter(torch.randn(heads))

    def forward(self, x: Tensor) -> Tensor:
        steps = x.shape[1]
        taps = F.pad(self.shift, (0, 0, 0, max(steps - self.shift.shape[0], 0)))
        q, v = (f(x).unflatten(-1, (-1, self.head_dim)) for f in (self.q, self.v))
        k = long_convolution(self.k(x), taps).unflatten(-1, (-1, self.head_dim))
        product = (k.unsqueeze(-1) * v.unsqueeze(-2)).flatten(-2)  # [B, T, heads, head_dim^2]
        kernel = self.kernel(steps).unsqueeze(-1).expand(-1, -1, product.shape[-1])
        remembered = long_convolution(product.flatten(2), kernel.flatten(1)).view_as(product)
        remembered = remembered + self.skip.unsqueeze(-1) * product
        read = remembered.unflatten(-1, (self.head_dim, self.head_dim))
        return self.out((q.unsqueeze(-2) @ read).squeeze(-2).flatten(2))

    def kernel(self, steps: int) -> Tensor:
        """The response of the diagonal state space, [steps, heads]."""
        step = self.log_step.exp().unsqueeze(-1)
        pole = torch.complex(-self.log_decay.exp() * step, self.turn * step)
        time = torch.arange(steps, device=pole.device)
        response = torch.exp(pole.unsqueeze(0) * time.view(-1, 1, 1))
        return 2 * (torch.view_as_complex(self.weight) * response).sum(dim=-1).real
