"""The comparators: softmax attention, its sliding window, and hybrids of attention and Mamba."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resona_ext import retrieve_attend
from resona_ext._layer_parts import rms_norm, rotate

from .base import Spec, linear
from .state_space import Mamba

ROPE_BASE = 10000.0


class Attention(nn.Module):
    """Causal softmax attention; with a window, each token sees itself and window - 1 before it."""

    def __init__(self, spec: Spec, window: int | None = None, rotary: bool = True) -> None:
        super().__init__()
        self.heads, self.window, self.rotary = spec.heads, window, rotary
        self.project = linear(spec.width, 3 * spec.width)
        self.out = linear(spec.width, spec.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.attend(x))

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = self.heads_of(x)
        mask = None if self.window is None else window_mask(x.shape[1], self.window, x.device)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return y.transpose(1, 2).flatten(2)

    def heads_of(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key, value [B, T, H, D]."""
        q, k, v = (part.unflatten(-1, (self.heads, -1)) for part in self.project(x).chunk(3, -1))
        if self.rotary:
            position = torch.arange(x.shape[1], device=x.device)
            q, k = rotate(q, position, ROPE_BASE), rotate(k, position, ROPE_BASE)
        return q, k, v


def window_mask(length: int, window: int, device: torch.device) -> Tensor:
    seen = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return seen.triu(1 - window)


def mambaformer(spec: Spec) -> nn.Module:
    """Mamba first, then attention and Mamba in turns, no positions (arXiv 2402.04248)."""
    return Mamba(spec) if spec.layer % 2 == 0 else Attention(spec, rotary=False)


class Hymba(nn.Module):
    """Attention in a window and Mamba side by side, normed and averaged (after arXiv 2411.13676).

    Without the meta tokens and the shared input projection of the original.
    """

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.attention = Attention(spec, window=spec.window)
        self.mamba = Mamba(spec)
        self.norms = nn.ModuleList(nn.RMSNorm(spec.width) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return (self.norms[0](self.attention(x)) + self.norms[1](self.mamba(x))) / 2


class RetrievalAttention(Attention):
    """The same attention under the retrieval mask: top k of the past chunks, by cosine of x and e."""

    reads_embeddings = True

    def __init__(self, spec: Spec) -> None:
        super().__init__(spec, rotary=False)
        self.chunk_size, self.top_k = spec.chunk_size, spec.top_k

    def forward(self, x: Tensor, embeddings: Tensor) -> Tensor:
        query_embedding, context = x.detach(), rms_norm(embeddings.detach())
        y = retrieve_attend(
            *self.heads_of(x),
            query_embedding.unsqueeze(2),
            context.unsqueeze(2),
            chunk_size=self.chunk_size,
            top_k=self.top_k,
        )
        return self.out(y.flatten(2))


class HymbaRetrieval(Hymba):
    """Hymba with the retrieval mask in the place of its window."""

    reads_embeddings = True

    def __init__(self, spec: Spec) -> None:
        super().__init__(spec)
        self.attention = RetrievalAttention(spec)

    def forward(self, x: Tensor, embeddings: Tensor) -> Tensor:
        attended = self.attention(x, embeddings)
        return (self.norms[0](attended) + self.norms[1](self.mamba(x))) / 2
