"""Prefix linear attention as Python functions: `torch.ops.resona` with defaults and named results.

Letters: B batch, T tokens, M rows of the prefix, H heads, f feature dim (1 to 32), V value dim (1 to 128),
F = 1 + f + f^2 features, n sequences: B of them, or those that cu_seqlens packs.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..ops import resona


class PrefixState(NamedTuple):
    """All that later tokens need of earlier ones: sums of phi(k) v^T and of phi(k), in float32 (float64
    for float64 inputs), prefix included. Features in the order of `reference.taylor_features`.
    """

    state: Tensor  # [n, H, F, V]
    normalizer: Tensor  # [n, H, F]


def prefix_linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor | None = None,
    prefix_value: Tensor | None = None,
    *,
    prefix_lengths: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    initial_state: PrefixState | None = None,
    scale: float | None = None,
    return_state: bool = False,
) -> Tensor | tuple[Tensor, PrefixState]:
    """Linear attention whose prefix every token sees whole.

    With weights w(q, k) = 1 + s + s^2 / 2, s = scale <q, k>, the Taylor polynomial of exp(s), token i gets

        sum over j <= i of w(q_i, k_j) v_j  +  sum over the prefix of w(q_i, k^e_j) v^e_j,

    divided by the sum of the weights (+ 1e-12). Prefix tokens count twice, through k and k^e, as in the
    paper. Time is linear in T; memory beside inputs and outputs is one state per sequence and head.

    Args:
        query, key: [B, T, H, f].
        value: [B, T, H, V].
        prefix_key, prefix_value: [B, M, H, f] and [B, M, H, V] for tokens 0 to M - 1, M <= T. None: no
            prefix, plain causal linear attention. Packed: M = T, row for row beside the tokens.
        prefix_lengths: int32 [n], each sequence's prefix: its first so many of those rows. Default all.
        mask: bool [B, T], False for padding anywhere: seen by nobody, whatever it holds, and zero in the
            result. The prefix follows its first M columns.
        cu_seqlens: int32 [n + 1], borders of packed sequences (B = 1).
        initial_state: of the tokens before, to continue a prefill. Its prefix must lie in the first part.
        scale: positive; default f ** -0.5.
        return_state: also return the state after the last token.

    Returns:
        out [B, T, H, V] in the dtype of query, or (out, PrefixState). Differentiable, states included. A
        sequence of padding alone gives zeros.

    Raises:
        RuntimeError: an argument breaks the contract; the message names it.

    Source: section 4 of "Just read twice" (arXiv 2407.05483).
    """
    prefix_key = key[:, :0] if prefix_key is None else prefix_key
    prefix_value = value[:, :0] if prefix_value is None else prefix_value
    state, normalizer = (None, None) if initial_state is None else initial_state
    out, *final = resona.prefix_linear_attention(
        query,
        key,
        value,
        prefix_key,
        prefix_value,
        prefix_lengths,
        mask,
        cu_seqlens,
        state,
        normalizer,
        scale=scale,
    )
    return (out, PrefixState(*final)) if return_state else out


def prefix_linear_attention_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: PrefixState,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """One new token per sequence, in constant time and memory. No gradients: call under no_grad.

    Args:
        query, key: [B, 1, H, f].
        value: [B, 1, H, V].
        state: updated in place; contiguous.
        mask: bool [B, 1], False: this sequence has no token now; its state stays and its row is zero.
        scale: as in the call that made the state.

    Returns:
        out [B, 1, H, V].
    """
    return resona.prefix_linear_attention_step(query, key, value, *state, mask, scale=scale)
