"""Prefix linear attention as a layer, with the calling conventions of fla.

The sequence mixer of JRT-RNN, section 4 of "Just read twice" (arXiv 2407.05483).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ._require import require
from .cache import remembered
from .functional import PrefixState, prefix_linear_attention, prefix_linear_attention_step

MAX_FEATURE_DIM, MAX_VALUE_DIM = 32, 128


def token_mask(attention_mask: Tensor | None, x: Tensor) -> Tensor | None:
    """bool [B, T] of the tokens at hand, from a 0/1 mask of these or of all tokens so far."""
    if attention_mask is None:
        return None
    batch, tokens = x.shape[:2]
    fits = attention_mask.dim() == 2 and attention_mask.shape[0] == batch
    require(
        fits and attention_mask.shape[1] >= tokens,
        "attention_mask",
        f"[B, at least T] = [{batch}, {tokens}], 0 for padding",
        list(attention_mask.shape),
    )
    return attention_mask[:, attention_mask.shape[1] - tokens :].bool()


class PrefixLinearAttention(nn.Module):
    """Linear attention with second-order Taylor features, whose prefix every token sees whole.

    Args:
        d_model: width D of the hidden states.
        num_heads: H.
        feature_dim: f of queries and keys, 1 to 32. The state of a head is (1 + f + f^2) x (V + 1).
        value_dim: V, 1 to 128. Default D // H.
        prefix_length: the first so many tokens of a sequence are its prefix, unless a call says
            otherwise. What stands in the prefix is visible from all of it, so a next-token loss there
            learns nothing: see `jrt_loss`.
        layer_idx: place in the cache; needed to use one.
        device, dtype: of the parameters.

    Five projections to the heads and one back, none with a bias: query, key, value of all tokens, and
    prefix_key, prefix_value of the prefix alone, which decoding never needs.

    Raises:
        ValueError: an argument is out of range; the message names it.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int = 16,
        *,
        feature_dim: int = 16,
        value_dim: int | None = None,
        prefix_length: int = 1024,
        layer_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require(d_model >= 1, "d_model", "at least 1", d_model)
        require(num_heads >= 1, "num_heads", "at least 1", num_heads)
        if value_dim is None:
            expected = f"a divisor of d_model {d_model} unless value_dim is given"
            require(d_model % num_heads == 0, "num_heads", expected, num_heads)
            value_dim = d_model // num_heads
        within = 1 <= feature_dim <= MAX_FEATURE_DIM
        require(within, "feature_dim", f"from 1 to {MAX_FEATURE_DIM}", feature_dim)
        require(
            1 <= value_dim <= MAX_VALUE_DIM, "value_dim", f"from 1 to {MAX_VALUE_DIM}", value_dim
        )
        require(prefix_length >= 0, "prefix_length", "at least 0", prefix_length)
        self.num_heads, self.feature_dim, self.value_dim = num_heads, feature_dim, value_dim
        self.prefix_length, self.layer_idx = prefix_length, layer_idx

        def project(inputs: int, outputs: int) -> nn.Linear:
            return nn.Linear(inputs, outputs, bias=False, device=device, dtype=dtype)

        self.q_proj = project(d_model, num_heads * feature_dim)
        self.k_proj = project(d_model, num_heads * feature_dim)
        self.v_proj = project(d_model, num_heads * value_dim)
        self.prefix_k_proj = project(d_model, num_heads * feature_dim)
        self.prefix_v_proj = project(d_model, num_heads * value_dim)
        self.o_proj = project(num_heads * value_dim, d_model)

    def extra_repr(self) -> str:
        return f"prefix_length={self.prefix_length}, layer_idx={self.layer_idx}"

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, x.shape[-1] // self.num_heads))

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values=None,
        use_cache: bool = False,
        output_attentions: bool = False,
        *,
        prefix_lengths: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        **kwargs,
    ) -> tuple[Tensor, None, object]:
        """[B, T, D] -> ([B, T, D], None, past_key_values).

        Args:
            attention_mask: [B, T] or [B, all tokens so far], 0 for padding, on any side.
            past_key_values: LayerStates or fla's Cache. Once it holds a state for this layer, the
                tokens continue their sequences; without gradients and at T = 1 by a decode step.
            prefix_lengths: int32 [n], at most prefix_length, each sequence's own; for the first part.
            cu_seqlens: int32 [n + 1], borders of packed sequences (B = 1), as in fla.
        """
        x = hidden_states
        mask = token_mask(attention_mask, x)
        state = remembered(past_key_values, self.layer_idx, "recurrent_state")
        caches = use_cache and past_key_values is not None
        require(not caches or self.layer_idx is not None, "layer_idx", "a place in the cache", None)
        rows = tuple(self._heads(f(x)) for f in (self.q_proj, self.k_proj, self.v_proj))
        if state is not None and x.shape[1] == 1 and not torch.is_grad_enabled():
            out = prefix_linear_attention_step(*rows, PrefixState(*state), mask=mask)
        else:
            own, prefix_lengths = self._prefix(x, prefix_lengths, cu_seqlens, state is not None)
            out, state = prefix_linear_attention(
                *rows,
                self._heads(self.prefix_k_proj(own)),
                self._heads(self.prefix_v_proj(own)),
                prefix_lengths=prefix_lengths,
                mask=mask,
                cu_seqlens=cu_seqlens,
                initial_state=None if state is None else PrefixState(*state),
                return_state=True,
            )
        if caches:
            past_key_values.update(
                recurrent_state=tuple(state), layer_idx=self.layer_idx, offset=x.shape[1]
            )
        return self.o_proj(out.flatten(2)), None, past_key_values

    def _prefix(
        self, x: Tensor, lengths: Tensor | None, cu_seqlens: Tensor | None, continued: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The tokens to project as prefix, and how many of them each sequence has."""
        if continued or self.prefix_length == 0:
            return x[:, :0], None
        if cu_seqlens is None:
            return x[:, : self.prefix_length], lengths
        if lengths is None:
            lengths = cu_seqlens.diff().clamp(max=self.prefix_length)
        return x, lengths.int()
