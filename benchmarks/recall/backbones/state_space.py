"""Mamba, Mamba-2 and Gated DeltaNet: maintained code where it runs, an own scan for Mamba on a CPU."""

from __future__ import annotations

import importlib
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import CausalConv, Spec, absent, linear
from .recurrences import selective_scan

STATES = 16  # Mamba
SSD_STATES = 64  # Mamba-2


class Mamba(nn.Module):
    """The selective state space (arXiv 2312.00752), expansion 2, convolution of 4."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        d, inner = spec.width, 2 * spec.width
        self.rank = math.ceil(d / 16)
        self.project, self.out = linear(d, 2 * inner), linear(inner, d)
        self.short = CausalConv(inner, 4)
        self.select = linear(inner, self.rank + 2 * STATES)
        self.step = linear(self.rank, inner, bias=True)
        nn.init.uniform_(self.step.weight, -(self.rank**-0.5), self.rank**-0.5)
        dt = torch.exp(torch.empty(inner).uniform_(math.log(1e-3), math.log(1e-1)))
        self.step.bias.data.copy_(dt + torch.log(-torch.expm1(-dt)))  # softplus of it is dt
        self.step.bias._no_reinit = True  # the mark of mamba_ssm
        self.log_a = nn.Parameter(torch.arange(1.0, STATES + 1).log().repeat(inner, 1))
        self.skip = nn.Parameter(torch.ones(inner))

    def forward(self, x: Tensor) -> Tensor:
        u, gate = self.project(x).chunk(2, dim=-1)
        u = F.silu(self.short(u))
        dt, b, c = self.select(u).split([self.rank, STATES, STATES], dim=-1)
        y = selective_scan(u, F.softplus(self.step(dt)), -self.log_a.exp(), b, c)
        return self.out((y + self.skip * u) * F.silu(gate))


class Outer(nn.Module):
    """A mixer of another package, which may return more than the output."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        out = self.inner(x)
        return out[0] if isinstance(out, tuple) else out


def transformers_mamba2(spec: Spec) -> nn.Module:
    config = importlib.import_module("transformers").Mamba2Config(
        hidden_size=spec.width,
        num_heads=2 * spec.heads,
        head_dim=spec.width // spec.heads,
        state_size=SSD_STATES,
        n_groups=1,
        num_hidden_layers=spec.layers,
        chunk_size=min(64, spec.length),
    )
    module = importlib.import_module("transformers.models.mamba2.modeling_mamba2")
    mixer = module.Mamba2Mixer(config, layer_idx=spec.layer)
    # A mixer alone skips the initialisation of the whole model: steps of 1e-3 to 1e-1, decays 1 to 16.
    dt = torch.exp(torch.empty(config.num_heads).uniform_(math.log(1e-3), math.log(1e-1)))
    with torch.no_grad():
        mixer.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))
        mixer.A_log.copy_(torch.empty(config.num_heads).uniform_(1, 16).log())
    return Outer(mixer)


def transformers_gated_deltanet(spec: Spec) -> nn.Module:
    module = importlib.import_module("transformers.models.qwen3_next")
    config = module.Qwen3NextConfig(
        hidden_size=spec.width,
        linear_num_key_heads=spec.heads,
        linear_num_value_heads=spec.heads,
        linear_key_head_dim=spec.width // spec.heads,
        linear_value_head_dim=spec.width // spec.heads,
        num_hidden_layers=spec.layers,
    )
    modeling = importlib.import_module("transformers.models.qwen3_next.modeling_qwen3_next")
    mixer = modeling.Qwen3NextGatedDeltaNet(config, layer_idx=spec.layer)
    with torch.no_grad():
        mixer.dt_bias.fill_(1.0)
        mixer.A_log.copy_(torch.empty(spec.heads).uniform_(1, 16).log())
    return Outer(mixer)


def fla_layer(name: str, **settings):
    """A builder of a layer of flash-linear-attention 0.6, whose kernels want a GPU. Sizes as in our forms."""

    def build(spec: Spec) -> nn.Module:
        layer = getattr(importlib.import_module("fla.layers"), name)
        return Outer(layer(hidden_size=spec.width, num_heads=spec.heads, **settings))

    return build


def mamba_ssm_layer(name: str, **settings):
    """A builder of a layer of mamba_ssm, whose kernels want a GPU."""

    def build(spec: Spec) -> nn.Module:
        layer = getattr(importlib.import_module("mamba_ssm"), name)
        extra = {"headdim": spec.width // spec.heads} if name == "Mamba2" else {}
        return Outer(layer(d_model=spec.width, layer_idx=spec.layer, **extra, **settings))

    return build


def no_transformers(module: str) -> str | None:
    return absent(f"transformers.models.{module}")
