"""Linear attention and its kin: GLA, RetNet, RWKV-5, DeltaNet, GSA. Own short forms."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resona_ext._layer_parts import rotate

from .base import CausalConv, Spec, head_norm, linear, merge_heads, previous, split_heads
from .recurrences import delta_rule, key_decay, scalar_decay, value_decay

GATE_NORMALIZER = 16.0  # GLA and GSA: gates start close to 1
GATE_RANK = 16


class Gla(nn.Module):
    """Gated linear attention (arXiv 2312.06635): a decay per key channel, keys half as wide as values."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        d, self.heads = spec.width, spec.heads
        self.q, self.k, self.v, self.gate, self.out = (
            linear(d, n) for n in (d // 2, d // 2, d, d, d)
        )
        self.decay = nn.Sequential(linear(d, GATE_RANK), linear(GATE_RANK, d // 2, bias=True))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, g = (split_heads(f(x), self.heads) for f in (self.q, self.k, self.v, self.decay))
        log_decay = F.logsigmoid(g) / GATE_NORMALIZER
        y = key_decay(q * q.shape[-1] ** -0.5, k, v, log_decay)
        return self.out(merge_heads(head_norm(y)) * F.silu(self.gate(x)))


class RetNet(nn.Module):
    """Retention (arXiv 2307.08621): a fixed decay per head, rotary positions."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        d, self.heads = spec.width, spec.heads
        self.q, self.k, self.v, self.gate, self.out = (linear(d, d) for _ in range(5))
        decay = torch.log1p(-(2.0 ** (-5.0 - torch.arange(spec.heads))))
        self.register_buffer("log_decay", decay, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        position = torch.arange(x.shape[1], device=x.device)
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)) for f in (self.q, self.k, self.v))
        q, k = (rotate(part, position, 10000.0).transpose(1, 2) for part in (q, k))
        decay = self.log_decay.view(1, -1, 1).expand(q.shape[:3])
        y = scalar_decay(q * q.shape[-1] ** -0.5, k, v.transpose(1, 2), decay)
        return self.out(merge_heads(head_norm(y)) * F.silu(self.gate(x)))


class Rwkv5(nn.Module):
    """RWKV-5's time mixing (arXiv 2404.05892): a learnt constant decay per channel, a bonus for now.

    y_t = r_t (S_{t-1} + diag(u) k_t v_t^T), S_t = diag(w) S_{t-1} + k_t v_t^T.
    """

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        d, self.heads = spec.width, spec.heads
        self.r, self.k, self.v, self.gate, self.out = (linear(d, d) for _ in range(5))
        channel = torch.arange(d) / max(d - 1, 1)
        depth = spec.layer / max(spec.layers - 1, 1)
        self.mix = nn.Parameter((channel ** (1 - depth / 2)).repeat(4, 1))  # of r, k, v, gate
        self.decay = nn.Parameter(-6 + 5 * channel ** (0.7 + 1.3 * depth))
        self.bonus = nn.Parameter(0.5 * (1 - channel))

    def forward(self, x: Tensor) -> Tensor:
        before = previous(x)
        r, k, v, g = (
            f(torch.lerp(before, x, mix))
            for f, mix in zip((self.r, self.k, self.v, self.gate), self.mix, strict=True)
        )
        r, k, v = (split_heads(part, self.heads) for part in (r, k, v))
        # With a constant decay the state before t is the state at t of the sequence moved by one.
        moved_k, moved_v = (F.pad(part, (0, 0, 1, 0))[:, :, :-1] for part in (k, v))
        log_decay = -self.decay.exp().view(self.heads, 1, -1).expand_as(k)
        now = (r * self.bonus.view(self.heads, 1, -1) * k).sum(dim=-1, keepdim=True) * v
        y = key_decay(r, moved_k, moved_v, log_decay) + now
        return self.out(merge_heads(head_norm(y)) * F.silu(g))


class DeltaNet(nn.Module):
    """The delta rule (arXiv 2406.06484): unit keys, what a key held before is overwritten."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        d, self.heads = spec.width, spec.heads
        self.q, self.k, self.v, self.out = (linear(d, d) for _ in range(4))
        self.short = nn.ModuleList(CausalConv(d, 4) for _ in range(3))
        self.beta = linear(d, spec.heads)

    def forward(self, x: Tensor) -> Tensor:
        projections = (self.q, self.k, self.v)
        q, k, v = (
            split_heads(F.silu(short(f(x))), self.heads)
            for f, short in zip(projections, self.short, strict=True)
        )
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        beta = self.beta(x).sigmoid().transpose(1, 2)
        return self.out(merge_heads(head_norm(delta_rule(q, k, v, beta))))


class Gsa(nn.Module):
    """Gated slot attention (arXiv 2409.07146): softmax over a few slots, whose keys and values decay."""

    def __init__(self, spec: Spec, slots: int = 32) -> None:
        super().__init__()
        d, self.heads = spec.width, spec.heads
        self.q, self.k, self.v, self.out = (linear(d, d) for _ in range(4))
        self.forget = linear(d, spec.heads * slots)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, f = (
            split_heads(part(x), self.heads) for part in (self.q, self.k, self.v, self.forget)
        )
        q, k = F.silu(q), F.silu(k)
        log_decay = F.logsigmoid(f) / GATE_NORMALIZER
        write = 1 - log_decay.exp()
        read = value_decay(q / math.sqrt(q.shape[-1]), k, write, log_decay).softmax(dim=-1)
        return self.out(merge_heads(head_norm(key_decay(read, write, v, log_decay))))
