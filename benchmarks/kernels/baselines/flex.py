"""FlexAttention with the same mask: token t of chunk j is visible to the queries that selected j.

The block mask is built outside the timer, which favours it: a model would have to build it anew in
every forward. Random selections touch nearly every 128 x 128 block, so little is skipped.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from ..data import Case
from . import Baseline, Checkouts, Forward

# Building a block mask looks at every (query, token) pair: 2 s at 4,096 tokens, 16 times that at 16,384. On a
# GPU torch holds 25 bytes for each meanwhile, 100 GB at 65,536.
CPU_LENGTH = 4096
GPU_LENGTH = 16384


@cache
def _compiled():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def build(case: Case, checkouts: Checkouts) -> Forward:
    from torch.nn.attention.flex_attention import create_block_mask

    # Each mask is another graph; past a few of them torch would silently run without compiling.
    torch.compiler.reset()
    s = case.shape
    grouped = s.heads != s.kv_heads
    indices = case.indices[:, :, 0].long()
    chunks = -(-s.length // s.chunk_size)
    # One column more than there are chunks, where the unused slots go and no token looks.
    member = torch.zeros(s.batch, s.rows, chunks + 1, dtype=torch.bool, device=indices.device)
    member.scatter_(2, torch.where(indices < 0, chunks, indices), True)

    def visible(b, h, q, kv):
        return member[b, q, kv // s.chunk_size]

    mask = create_block_mask(visible, s.batch, None, s.rows, s.length, device=case.device)

    def function(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return _compiled()(query, key, value, block_mask=mask, enable_gqa=grouped)

    return Forward(function, heads_first=True)


def _unfit(case: Case) -> str | None:
    limit = CPU_LENGTH if case.device == "cpu" else GPU_LENGTH
    if case.shape.length > limit:
        return f"building the block mask takes too long above {limit:,} tokens"
    if case.device == "cpu" and case.operator == "backward":
        return "FlexAttention has no backward on a CPU"
    if case.shape.retrieval_heads != 1:
        return "written for one retrieval head"
    return None


BASELINES = (
    Baseline(
        "flex",
        "FlexAttention, same mask, its building not timed",
        "selected",
        ("attend", "backward"),
        lambda *_: None,
        _unfit,
        build,
    ),
)
