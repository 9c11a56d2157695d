"""A small JRT-RNN: convolutions, with prefix linear attention and a sliding window in between."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .._layer_parts import SwiGLU
from ._require import require
from .cache import LayerStates
from .companions import GatedConvolution, SlidingAttention
from .layer import PrefixLinearAttention

KINDS = ("prefix", "sliding", "conv")


@dataclass(frozen=True)
class JRTConfig:
    """Sizes of a JRT-RNN. `layers` defaults to the paper's pattern: of every five layers the second is
    prefix linear attention, the third a sliding window, the others gated convolutions.

    mlp_dim: hidden width of the SwiGLU; None: 2 d_model, 0: no MLP.
    """

    vocabulary: int = 50264
    d_model: int = 1024
    num_layers: int = 26
    num_heads: int = 16
    feature_dim: int = 16
    prefix_length: int = 1024
    window: int = 128
    kernel_size: int = 3
    mlp_dim: int | None = None
    layers: tuple[str, ...] | None = None

    def kinds(self) -> tuple[str, ...]:
        if self.layers is None:
            pattern = {1: "prefix", 2: "sliding"}
            return tuple(pattern.get(i % 5, "conv") for i in range(self.num_layers))
        for kind in self.layers:
            require(kind in KINDS, "layers", f"each one of {KINDS}", kind)
        return self.layers


def _mixer(kind: str, c: JRTConfig, layer_idx: int) -> nn.Module:
    if kind == "conv":
        return GatedConvolution(c.d_model, c.kernel_size, layer_idx=layer_idx)
    if kind == "sliding":
        return SlidingAttention(c.d_model, c.num_heads, window=c.window, layer_idx=layer_idx)
    return PrefixLinearAttention(
        c.d_model,
        c.num_heads,
        feature_dim=c.feature_dim,
        prefix_length=c.prefix_length,
        layer_idx=layer_idx,
    )


class JRTModel(nn.Module):
    """Tokens to logits: x + mixer(norm(x)), x + mlp(norm(x)), final norm, tied output embedding."""

    def __init__(self, config: JRTConfig) -> None:
        super().__init__()
        self.config = config
        width = config.d_model
        hidden = 2 * width if config.mlp_dim is None else config.mlp_dim
        kinds = config.kinds()
        self.embedding = nn.Embedding(config.vocabulary, width)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.mixers = nn.ModuleList(_mixer(kind, config, i) for i, kind in enumerate(kinds))
        self.mixer_norms = nn.ModuleList(nn.RMSNorm(width, eps=1e-5) for _ in kinds)
        self.mlps = nn.ModuleList(SwiGLU(width, hidden) for _ in kinds if hidden)
        self.mlp_norms = nn.ModuleList(nn.RMSNorm(width, eps=1e-5) for _ in self.mlps)
        self.norm = nn.RMSNorm(width, eps=1e-5)

    def forward(
        self,
        tokens: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: LayerStates | None = None,
        *,
        prefix_lengths: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """tokens [B, T] -> logits [B, T, vocabulary]. A cache that is given is filled and continued."""
        x = self.embedding(tokens)
        for i, (mixer, norm) in enumerate(zip(self.mixers, self.mixer_norms, strict=True)):
            mixed, *_ = mixer(
                norm(x),
                attention_mask,
                past_key_values,
                use_cache=past_key_values is not None,
                prefix_lengths=prefix_lengths,
                cu_seqlens=cu_seqlens,
            )
            x = x + mixed
            if self.mlps:
                x = x + self.mlps[i](self.mlp_norms[i](x))
        return self.norm(x) @ self.embedding.weight.T

    @torch.no_grad()
    def generate(
        self,
        tokens: Tensor,
        max_new_tokens: int,
        attention_mask: Tensor | None = None,
        stop_token: int | None = None,
    ) -> Tensor:
        """Greedy continuations of prompts padded on the left: [B, T] -> [B, at most max_new_tokens].

        The prompt is the prefix, as far as prefix_length reaches. After stop_token a row repeats it.
        """
        states, rows = LayerStates(), []
        logits = self(tokens, attention_mask, states)
        done = torch.zeros(tokens.shape[0], dtype=torch.bool, device=tokens.device)
        for i in range(max_new_tokens):
            token = logits[:, -1].argmax(dim=-1)
            if stop_token is not None:
                token = torch.where(done, stop_token, token)
                done = done | (token == stop_token)
            rows.append(token)
            if i + 1 == max_new_tokens or (stop_token is not None and bool(done.all())):
                break
            logits = self(token.unsqueeze(1), None, states)
        return torch.stack(rows, dim=1) if rows else tokens[:, :0]
