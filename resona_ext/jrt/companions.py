"""The layers beside prefix linear attention in JRT-RNN: gated short convolutions and sliding windows.

Both stay causal, in the prefix too, and follow the calling conventions of `PrefixLinearAttention`. The
work is torch's own convolution and attention. Padding stands on the left or the right of a sequence;
one that is to be continued from a cache is padded on the left.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._layer_parts import causal_taps, rotate
from ._require import require
from .cache import remembered
from .layer import token_mask


def positions(x: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """Each token's place in its sequence, and which sequence that is: int64, both [T]."""
    token = torch.arange(x.shape[1], device=x.device)
    if cu_seqlens is None:
        return token, torch.zeros_like(token)
    borders = cu_seqlens.long()
    sequence = torch.searchsorted(borders, token, right=True) - 1
    return token - borders[sequence], sequence


def _zero_padding(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x.masked_fill(~mask.unsqueeze(-1), 0)


class GatedConvolution(nn.Module):
    """silu(conv(u)) * w with u, w from one projection: the BaseConv of JRT-RNN.

    Args:
        d_model: D; inside it is twice as wide.
        kernel_size: taps of the causal depthwise convolution.
        layer_idx: place in the cache.
    """

    def __init__(
        self,
        d_model: int,
        kernel_size: int = 3,
        *,
        layer_idx: int | None = None,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        require(kernel_size >= 1, "kernel_size", "at least 1", kernel_size)
        factory_kwargs = {"device": device, "dtype": dtype}
        self.layer_idx = layer_idx
        self.in_proj = nn.Linear(d_model, 4 * d_model, **factory_kwargs)
        self.conv = nn.Conv1d(
            2 * d_model, 2 * d_model, kernel_size, groups=2 * d_model, **factory_kwargs
        )
        self.out_proj = nn.Linear(2 * d_model, d_model, **factory_kwargs)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values=None,
        use_cache: bool = False,
        output_attentions: bool = False,
        *,
        cu_seqlens: Tensor | None = None,
        **kwargs,
    ) -> tuple[Tensor, None, object]:
        """[B, T, D] -> ([B, T, D], None, past_key_values)."""
        u, w = self.in_proj(hidden_states).chunk(2, dim=-1)
        u = _zero_padding(u, token_mask(attention_mask, hidden_states))
        if cu_seqlens is not None:
            position, _ = positions(u, cu_seqlens)
            taps = self.conv.weight.squeeze(1).flip(1).T
            mixed = causal_taps(u, taps, position) + self.conv.bias
        else:
            mixed = self._convolve(u, past_key_values, use_cache)
        return self.out_proj(F.silu(mixed) * w), None, past_key_values

    def _convolve(self, u: Tensor, past_key_values, use_cache: bool) -> Tensor:
        before = self.conv.kernel_size[0] - 1
        state = remembered(past_key_values, self.layer_idx, "conv_state")
        if state is None:
            state = u.new_zeros(u.shape[0], before, u.shape[2])
        extended = torch.cat([state, u], dim=1)
        if use_cache and past_key_values is not None:
            kept = extended[:, extended.shape[1] - before :]
            past_key_values.update(conv_state=kept, layer_idx=self.layer_idx, offset=u.shape[1])
        return self.conv(extended.mT).mT if u.shape[1] else u  # torch convolves no empty rows


class SlidingAttention(nn.Module):
    """Softmax attention to a token and the `window` before it, with rotary positions.

    Args:
        d_model: D. num_heads: heads of D // num_heads.
        window: tokens seen before one's own; the paper's 256 is 128 to each side, so 128.
        rope_base: of the rotary positions.
        layer_idx: place in the cache.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int = 16,
        *,
        window: int = 128,
        rope_base: float = 10000.0,
        layer_idx: int | None = None,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        require(d_model % num_heads == 0, "num_heads", f"a divisor of d_model {d_model}", num_heads)
        even = (d_model // num_heads) % 2 == 0
        require(even, "num_heads", "an even width per head, to rotate", d_model // num_heads)
        require(window >= 1, "window", "at least 1", window)
        self.num_heads, self.window, self.rope_base = num_heads, window, rope_base
        self.layer_idx = layer_idx
        factory_kwargs = {"bias": False, "device": device, "dtype": dtype}
        self.qkv_proj = nn.Linear(d_model, 3 * d_model, **factory_kwargs)
        self.o_proj = nn.Linear(d_model, d_model, **factory_kwargs)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values=None,
        use_cache: bool = False,
        output_attentions: bool = False,
        *,
        cu_seqlens: Tensor | None = None,
        **kwargs,
    ) -> tuple[Tensor, None, object]:
        """[B, T, D] -> ([B, T, D], None, past_key_values)."""
        x = hidden_states
        mask = token_mask(attention_mask, x)
        real = x.new_ones(x.shape[:2], dtype=torch.bool) if mask is None else mask
        qkv = self.qkv_proj(_zero_padding(x, mask)).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = qkv.unbind(2)
        position, sequence = positions(x, cu_seqlens)
        past = remembered(past_key_values, self.layer_idx, "attn_state")
        if past is None:  # as if nothing but padding had been before
            shape = (x.shape[0], self.window, *key.shape[2:])
            past = (key.new_zeros(shape), key.new_zeros(shape), real.new_zeros(shape[:2]), 0)
        position = position + past[3]
        query, key = (rotate(t, position, self.rope_base) for t in (query, key))
        key, value, seen = (
            torch.cat([a, b], dim=1) for a, b in zip(past, (key, value, real), strict=False)
        )
        if use_cache and past_key_values is not None:
            kept = tuple(t[:, t.shape[1] - self.window :] for t in (key, value, seen))
            state = (*kept, past[3] + x.shape[1])
            past_key_values.update(attn_state=state, layer_idx=self.layer_idx, offset=x.shape[1])
        out = self._attend(query, key, value, seen, sequence)
        return self.o_proj(out.flatten(2)), None, past_key_values

    def _attend(self, query, key, value, seen, sequence) -> Tensor:
        """Blocks of queries against the `window` keys before each and its own: time linear in T.

        query [B, T, H, D]; key, value [B, W + T, H, D]; seen [B, W + T]; sequence [T].
        """
        batch, tokens = query.shape[:2]
        if tokens == 0:
            return query
        block = min(self.window, tokens)
        missing = -tokens % block
        pad = (0, 0, 0, 0, 0, missing)
        query, key, value = (F.pad(t, pad) for t in (query, key, value))
        seen = F.pad(seen, (0, missing))
        padded = F.pad(sequence, (self.window, missing), value=-1)
        if not sequence.any():  # not packed: what came before belongs to the same sequence
            padded = torch.zeros_like(padded)

        width = block + self.window
        query = query.unflatten(1, (-1, block)).flatten(0, 1).transpose(1, 2)
        # unfold: [B, blocks, H, D, width]
        key, value = (t.unfold(1, width, block).flatten(0, 1).mT for t in (key, value))
        row = torch.arange(block, device=query.device)[:, None]
        column = torch.arange(width, device=query.device)
        band = (column >= row) & (column <= row + self.window)
        windows = padded.unfold(0, width, block)
        same = windows[:, self.window :, None] == windows[:, None, :]
        allowed = band & same & seen.unfold(1, width, block)[:, :, None, :]
        allowed = allowed | (column == row + self.window)  # padding sees itself, and is never NaN
        mask = allowed.flatten(0, 1).unsqueeze(1)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return out.transpose(1, 2).unflatten(0, (batch, -1)).flatten(1, 2)[:, :tokens]
