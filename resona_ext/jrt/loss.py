"""How JRT-RNN trains: next tokens where they cannot be seen, hidden tokens where they could.

The prefix is seen from both sides, so predicting its next token is trivial. Instead some of its tokens
are replaced by a mask token and must be named; the rest of the sequence learns the next token as usual.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._require import require


class MaskedPrefix(NamedTuple):
    tokens: Tensor  # int64 [B, T]: what the model reads
    masked: Tensor  # bool [B, T]: where mask_token stands for another


class JRTLoss(NamedTuple):
    total: Tensor  # next_token + weight * masked_token
    next_token: Tensor  # mean cross-entropy behind the prefix; 0 where there is nothing to predict
    masked_token: Tensor  # mean cross-entropy at masked tokens; likewise


def _in_prefix(tokens: Tensor, prefix_lengths: Tensor | int) -> Tensor:
    lengths = torch.as_tensor(prefix_lengths, device=tokens.device)
    fits = lengths.dim() == 0 or tuple(lengths.shape) == (tokens.shape[0],)
    require(fits, "prefix_lengths", f"a number or [B] = [{tokens.shape[0]}]", list(lengths.shape))
    return torch.arange(tokens.shape[1], device=tokens.device) < lengths.reshape(-1, 1)


def mask_prefix(
    tokens: Tensor,
    prefix_lengths: Tensor | int,
    mask_token: int,
    *,
    probability: float = 0.15,
    attention_mask: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> MaskedPrefix:
    """Replace each real token of the prefix by mask_token with the given probability.

    tokens [B, T]; prefix_lengths a number or [B]; attention_mask [B, T], 0 for padding.
    """
    require(0 <= probability <= 1, "probability", "0 to 1", probability)
    draw = torch.rand(tokens.shape, generator=generator, device=tokens.device)
    masked = (draw < probability) & _in_prefix(tokens, prefix_lengths)
    if attention_mask is not None:
        masked = masked & attention_mask.bool()
    return MaskedPrefix(tokens.masked_fill(masked, mask_token), masked)


def jrt_loss(
    logits: Tensor,
    tokens: Tensor,
    masked: Tensor,
    prefix_lengths: Tensor | int,
    *,
    attention_mask: Tensor | None = None,
    weight: float = 0.25,
) -> JRTLoss:
    """Next token behind the prefix + weight * masked token within it, each a mean over its tokens.

    Position M - 1, the last of the prefix, predicts nothing, as in the paper; M and later predict the token
    behind them.

    Args:
        logits: [B, T, vocabulary] of the tokens as masked.
        tokens: [B, T] or [B, T + 1], the original ones; the last may be one that was only predicted.
        masked: bool [B, T] from `mask_prefix`.
        prefix_lengths: a number or [B].
        attention_mask: [B, T] or [B, T + 1] beside tokens, 0 for padding: neither read nor predicted.
        weight: of the masked tokens; 0.25 is the paper's.

    Source: section 4.2 of "Just read twice" (arXiv 2407.05483).
    """
    batch, length, _ = logits.shape
    shapes = [(batch, length), (batch, length + 1)]
    expected = f"[B, T] or [B, T + 1] = {list(shapes[0])} or {list(shapes[1])}"
    require(tuple(tokens.shape) in shapes, "tokens", expected, list(tokens.shape))
    require(
        tuple(masked.shape) == shapes[0],
        "masked",
        f"[B, T] = {list(shapes[0])}",
        list(masked.shape),
    )
    real = torch.ones_like(tokens, dtype=torch.bool)
    if attention_mask is not None:
        fits = attention_mask.shape == tokens.shape
        require(fits, "attention_mask", list(tokens.shape), list(attention_mask.shape))
        real = attention_mask.bool()

    predicts = ~_in_prefix(tokens[:, :-1], prefix_lengths) & real[:, :-1] & real[:, 1:]
    behind = tokens.shape[1] - 1
    next_token = _mean_cross_entropy(logits[:, :behind], tokens[:, 1:], predicts)
    masked_token = _mean_cross_entropy(logits, tokens[:, :length], masked & real[:, :length])
    return JRTLoss(next_token + weight * masked_token, next_token, masked_token)


def _mean_cross_entropy(logits: Tensor, targets: Tensor, where: Tensor) -> Tensor:
    """In float32 at least; 0, not NaN, over no tokens."""
    labels = targets.masked_fill(~where, -100).flatten()
    wide = logits.flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32))
    total = F.cross_entropy(wide, labels, ignore_index=-100, reduction="sum")
    return total / where.sum().clamp(min=1)
