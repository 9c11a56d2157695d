"""The demo's backbone: a small linear recurrent language model, with Resona where asked.

Two blocks of RMSNorm -> gated linear recurrence -> residual; embedding and head are tied. There
are no positions and no MLP, so all that a token can know of its past is in the recurrent state.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LinearRecurrence(nn.Module):
    """S_t = a_t S_{t-1} + k_t v_t^T, y_t = q_t S_t, with a decay a_t in (0, 1) per head and token.

    The state S is head_dim x head_dim however long the context: what does not fit is forgotten.
    """

    def __init__(self, width: int, heads: int = 2, convolution: int = 4):
        super().__init__()
        self.heads, self.convolution = heads, convolution
        self.project_in = nn.Linear(width, 4 * width, bias=False)  # query, key, value, gate
        self.short = nn.Conv1d(3 * width, 3 * width, convolution, groups=3 * width)
        self.decay = nn.Linear(width, heads)
        self.project_out = nn.Linear(width, width, bias=False)
        nn.init.constant_(self.decay.bias, 4.0)  # a_t about 0.98: remember by default

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, width] -> [B, T, width]."""
        mixed, gate = self.project_in(x).split([3 * x.shape[-1], x.shape[-1]], dim=-1)
        past = nn.functional.pad(mixed.transpose(1, 2), (self.convolution - 1, 0))
        mixed = nn.functional.silu(self.short(past)).transpose(1, 2)
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in mixed.chunk(3, dim=-1)
        )
        log_decay = nn.functional.logsigmoid(self.decay(x)).transpose(1, 2)
        y = self.recur(query * query.shape[-1] ** -0.5, key, value, log_decay)
        y = nn.functional.rms_norm(y, y.shape[-1:]).transpose(1, 2).flatten(2)
        return self.project_out(y * nn.functional.silu(gate))

    def recur(self, query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor) -> Tensor:
        """The recurrence itself, [B, H, T, D]; a subclass may compute it in another way."""
        return linear_recurrence(query, key, value, log_decay)


def linear_recurrence(query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor) -> Tensor:
    """All steps at once: y_t = sum over s <= t of (product of a_{s+1..t}) (q_t k_s) v_s.

    query, key, value [B, H, T, D], log_decay [B, H, T] -> [B, H, T, D]. Quadratic in T, which for
    the demo's 128 tokens is far quicker than 128 steps.
    """
    total = log_decay.cumsum(dim=-1)
    span = total.unsqueeze(-1) - total.unsqueeze(-2)  # log of prod a_{s+1..t}
    steps = span.shape[-1]
    future = torch.ones(steps, steps, dtype=torch.bool, device=span.device).triu(1)
    weight = span.masked_fill(future, -torch.inf).exp()
    return ((query @ key.transpose(-1, -2)) * weight) @ value


class RecurrentLM(nn.Module):
    """The language model. `resona`, if given, augments the first block."""

    def __init__(self, vocabulary: int, width: int, blocks: int = 2, embedding_std: float = 0.3):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        nn.init.normal_(self.embedding.weight, std=embedding_std)
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(blocks))
        self.mixers = nn.ModuleList(LinearRecurrence(width) for _ in range(blocks))
        self.final_norm = nn.RMSNorm(width)
        self.resona: nn.Module | None = None  # set after construction: equal seeds, equal backbones

    def forward(self, tokens: Tensor, wanted: Tensor) -> Tensor:
        """Logits at the wanted positions only. tokens [B, T], wanted bool [B, T] -> [N, V]."""
        embeddings = self.embedding(tokens)
        hidden = embeddings
        for block, (norm, mixer) in enumerate(zip(self.norms, self.mixers, strict=True)):
            x = norm(hidden)
            y = mixer(x)
            if block == 0 and self.resona is not None:
                y = self.resona(x, embeddings, y)
            hidden = hidden + y
        return self.final_norm(hidden[wanted]) @ self.embedding.weight.T
