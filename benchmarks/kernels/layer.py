"""A recurrent block with and without Resona: what retrieval costs where it is used.

The mixer is the first of these that can be used, and the record says which: mamba_ssm's Mamba-2 (GPU),
the Mamba-2 of transformers, or a small gated linear recurrence of ours, in linear time.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import torch
from torch import Tensor, nn

from resona_ext import Resona
from resona_ext.cli.demo.recurrence import LinearRecurrence, linear_recurrence

from .baselines import importable
from .data import Case
from .timer import Call
from .truth import TOLERANCE, Check, relative_error

PREFIX = 256  # tokens of the check, at most


class BlockwiseRecurrence(LinearRecurrence):
    """The demo's recurrence in linear time: quadratic inside blocks, a carried state between them."""

    BLOCK = 128

    def recur(self, query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor) -> Tensor:
        return blockwise(query, key, value, log_decay, self.BLOCK)


def blockwise(query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, block: int) -> Tensor:
    """linear_recurrence(query, key, value, log_decay), block by block. [B, H, T, D] -> [B, H, T, D]."""
    steps = query.shape[2]
    missing = -steps % block
    pad = lambda x: nn.functional.pad(x, (0, 0, 0, missing)).unflatten(2, (-1, block))  # noqa: E731
    query, key, value = pad(query), pad(key), pad(value)
    log_decay = nn.functional.pad(log_decay, (0, missing)).unflatten(2, (-1, block))
    total = log_decay.cumsum(dim=-1).unsqueeze(-1)  # log of the decay since the block's start
    to_end = (total[..., -1:, :] - total).exp()
    added = (key * to_end).transpose(-1, -2) @ value  # [B, H, blocks, D, D]
    kept = total[..., -1:, :].exp()
    states = [torch.zeros_like(added[:, :, 0])]
    for n in range(added.shape[2] - 1):
        states.append(kept[:, :, n] * states[-1] + added[:, :, n])
    before = torch.stack(states, dim=2)
    out = linear_recurrence(query, key, value, log_decay) + (query * total.exp()) @ before
    return out.flatten(2, 3)[:, :, :steps]


def make_mixer(width: int, heads: int, device: str) -> tuple[nn.Module, str]:
    """A mixer and what it is, in words."""
    with suppress(ImportError):
        if device == "cuda":
            mamba = importable("mamba_ssm").Mamba2
            return mamba(d_model=width, headdim=2 * width // heads), "Mamba-2 of mamba_ssm"
    with suppress(ImportError):
        mamba = importable("transformers.models.mamba2.modeling_mamba2").Mamba2Mixer
        config = importable("transformers").Mamba2Config(
            hidden_size=width, num_heads=heads, head_dim=2 * width // heads, n_groups=1
        )
        return mamba(config, layer_idx=0), "Mamba-2 of transformers"
    return BlockwiseRecurrence(width, heads), "gated linear recurrence of this repository"


class Block(nn.Module):
    """hidden + mixer(norm(hidden)), with the branch mixed in where one is given."""

    def __init__(self, case: Case, is_augmented: bool):
        super().__init__()
        s = case.shape
        width = s.heads * s.head_dim
        self.norm = nn.RMSNorm(width)
        self.mixer, self.mixer_name = make_mixer(width, s.heads, case.device)
        self.resona = (
            Resona(
                width,
                s.heads,
                num_kv_heads=s.kv_heads,
                chunk_size=s.chunk_size,
                top_k=s.top_k,
                retrieval_dim=s.retrieval_dim,
            )
            if is_augmented
            else None
        )

    def forward(self, hidden: Tensor, embeddings: Tensor) -> Tensor:
        x = self.norm(hidden)
        y = self.mixer(x)
        if self.resona is not None:
            y = self.resona(x, embeddings, y)
        return hidden + y


def make_block(case: Case, is_augmented: bool) -> Block:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(case.seed)  # both blocks start from one mixer
        return Block(case, is_augmented).to(case.device, case.dtype)


def _inputs(case: Case) -> tuple[Tensor, Tensor]:
    s = case.shape
    sizes = (s.batch, s.length, s.heads * s.head_dim)
    return case.place(case.random(9, *sizes)), case.place(case.random(10, *sizes))


def forward(block: Block, case: Case) -> tuple[Call, Callable[[Tensor], Check]]:
    hidden, embeddings = _inputs(case)
    return lambda: block(hidden, embeddings), lambda out: _check(block, case, out)


def step(block: Block, case: Case) -> tuple[Call, Callable[[tuple], Check]]:
    """Forward and backward to all trainable parameters and the inputs; no optimizer."""
    hidden, embeddings = _inputs(case)
    wanted = [hidden.requires_grad_(), *(p for p in block.parameters() if p.requires_grad)]
    if block.resona is not None:
        wanted.append(embeddings.requires_grad_())

    def call() -> tuple[Tensor, tuple[Tensor, ...]]:
        out = block(hidden, embeddings)
        return out.detach(), torch.autograd.grad(out.float().square().mean(), wanted)

    def check(result) -> Check:
        out, gradients = result
        finite = all(bool(g.isfinite().all()) and bool(g.any()) for g in gradients)
        return _check(block, case, out) if finite else Check(float("inf"), 0.0)

    return call, check


def _check(block: Block, case: Case, out: Tensor) -> Check:
    """A causal block gives the first tokens alone what it gives them inside the whole."""
    tokens = min(PREFIX, case.shape.length // 2)
    with torch.no_grad():
        alone = block(*(x[:, :tokens] for x in _inputs(case)))
    error = relative_error(out[:, :tokens], alone.double())
    return Check(error, TOLERANCE[case.dtype_name])
