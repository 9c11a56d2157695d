"""Problems of prefix linear attention that its tests share."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from support import accumulation_dtype

from resona_ext.jrt import reference

F64 = torch.float64


@dataclass
class Prefix:
    """Arguments of the operator with random contents."""

    batch: int = 2
    tokens: int = 70
    rows: int = 40
    heads: int = 2
    feature_dim: int = 4
    value_dim: int = 6
    dtype: torch.dtype = F64
    lengths: list[int] | None = None  # packed sequences; sets batch, tokens and rows
    prefix_lengths: bool = False
    mask: bool = False
    state: bool = False
    scale: float | None = None
    arguments: dict = field(init=False)

    def __post_init__(self):
        cu_seqlens, sequences = None, self.batch
        if self.lengths is not None:
            cu_seqlens = torch.tensor([0, *self.lengths]).cumsum(0).int()
            self.batch, self.tokens, sequences = 1, sum(self.lengths), len(self.lengths)
            self.rows = self.tokens if self.rows else 0
        longest = torch.tensor(self.lengths or [self.rows] * self.batch) * bool(self.rows)
        features = reference.taylor_features(
            torch.randn(sequences, self.heads, 3, self.feature_dim, dtype=F64), self.scale
        )
        states = torch.einsum(
            "nhjr,nhjv->nhrv", features, torch.randn(*features.shape[:3], self.value_dim, dtype=F64)
        )
        kept = accumulation_dtype(self.dtype)
        self.arguments = {
            "query": self._rows(self.tokens, self.feature_dim),
            "key": self._rows(self.tokens, self.feature_dim),
            "value": self._rows(self.tokens, self.value_dim),
            "prefix_key": self._rows(self.rows, self.feature_dim),
            "prefix_value": self._rows(self.rows, self.value_dim),
            "prefix_lengths": (torch.rand(sequences) * (longest + 1)).int()
            if self.prefix_lengths
            else None,
            "mask": torch.rand(self.batch, self.tokens) > 0.2 if self.mask else None,
            "cu_seqlens": cu_seqlens,
            "initial_state": states.to(kept) if self.state else None,
            "initial_normalizer": features.sum(2).to(kept) if self.state else None,
        }

    def _rows(self, count: int, dim: int):
        return torch.randn(self.batch, count, self.heads, dim, dtype=F64).to(self.dtype)

    def call(self, function, **changes):
        return function(**{**self.arguments, **changes}, scale=self.scale)

    def results(self, function, dtype=None):
        """out, state, normalizer and the gradients of a fixed random combination of them."""
        arguments = {
            k: t.to(dtype or t.dtype).requires_grad_()
            if t is not None and t.is_floating_point()
            else t
            for k, t in self.arguments.items()
        }
        outputs = self.call(function, **arguments)
        leaves = {k: t for k, t in arguments.items() if t is not None and t.requires_grad}
        draw = torch.Generator().manual_seed(1)
        loss = sum(
            (o.double() * torch.randn(o.shape, generator=draw, dtype=F64)).sum() for o in outputs
        )
        gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        names = ["out", "state", "normalizer", *(f"d {k}" for k in leaves)]
        filled = [
            torch.zeros_like(t) if g is None else g
            for g, t in zip(gradients, leaves.values(), strict=True)
        ]
        return dict(zip(names, [*outputs, *filled], strict=True))
