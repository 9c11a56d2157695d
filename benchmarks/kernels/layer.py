"""A Mamba-2 block with and without Resona: what retrieval costs where it is used.

The mixer is mamba_ssm's on a GPU where it is installed, else the one of transformers; the record says
which. Without either the layer operators are skipped.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import torch
from torch import Tensor, nn

from resona_ext import Resona

from .baselines import importable
from .data import Case
from .timer import Call
from .truth import TOLERANCE, Check, relative_error

PREFIX = 256  # tokens of the check, at most
ROOM = 1024  # tokens that decoding appends before it starts over


class Transformers(nn.Module):
    """Mamba-2 of transformers, in plain PyTorch where its kernels are not installed."""

    label = "Mamba-2 of transformers"

    def __init__(self, width: int, heads: int):
        super().__init__()
        mamba = importable("transformers.models.mamba2.modeling_mamba2").Mamba2Mixer
        self.config = importable("transformers").Mamba2Config(
            hidden_size=width,
            num_heads=heads,
            head_dim=2 * width // heads,
            n_groups=1,
            num_hidden_layers=1,
        )
        self.mixer = mamba(self.config, layer_idx=0)

    def forward(self, x: Tensor, state: object = None) -> Tensor:
        return self.mixer(x, cache_params=state)

    def start(self, batch: int, length: int) -> object:
        return importable("transformers").DynamicCache(config=self.config)


class MambaSsm(nn.Module):
    """Mamba-2 of mamba_ssm, whose kernels want a GPU."""

    label = "Mamba-2 of mamba_ssm"

    def __init__(self, width: int, heads: int):
        super().__init__()
        mamba = importable("mamba_ssm").Mamba2
        self.mixer = mamba(d_model=width, headdim=2 * width // heads, layer_idx=0)

    def forward(self, x: Tensor, state: object = None) -> Tensor:
        out = self.mixer(x, inference_params=state)
        if state is not None:
            state.seqlen_offset += x.shape[1]
        return out

    def start(self, batch: int, length: int) -> object:
        parameters = importable("mamba_ssm.utils.generation").InferenceParams
        return parameters(max_seqlen=length, max_batch_size=batch)


def missing(device: str) -> str | None:
    """Why there is no mixer to be had, or None."""
    with suppress(ImportError):
        if device == "cuda":
            importable("mamba_ssm")
            return None
    with suppress(ImportError):
        importable("transformers.models.mamba2.modeling_mamba2")
        return None
    return "neither mamba_ssm (GPU) nor transformers can be imported"


def make_mixer(width: int, heads: int, device: str) -> nn.Module:
    with suppress(ImportError):
        if device == "cuda":
            return MambaSsm(width, heads)
    return Transformers(width, heads)


class Block(nn.Module):
    """hidden + mixer(norm(hidden)), with the branch mixed in where one is given."""

    def __init__(self, case: Case, is_augmented: bool):
        super().__init__()
        s = case.shape
        width = s.heads * s.head_dim
        self.norm = nn.RMSNorm(width)
        self.mixer = make_mixer(width, s.heads, case.device)
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

    def forward(
        self, hidden: Tensor, embeddings: Tensor, state: object = None, cache: object = None
    ) -> Tensor:
        x = self.norm(hidden)
        y = self.mixer(x, state)
        if self.resona is not None:
            y = self.resona(x, embeddings, y, cache=cache)
        return hidden + y


def make_block(case: Case, is_augmented: bool) -> Block:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(case.seed)  # both blocks start from one mixer
        return Block(case, is_augmented).to(case.device, case.dtype)


def _inputs(case: Case, more: int = 0) -> tuple[Tensor, Tensor]:
    s = case.shape
    sizes = (s.batch, s.length + more, s.heads * s.head_dim)
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


class Decoding:
    """One more token after the context, every call; after ROOM tokens the cache goes back to the context."""

    def __init__(self, block: Block, case: Case):
        s = case.shape
        hidden, embeddings = _inputs(case, more=1)
        self.block, self.context = block, (hidden[:, :-1], embeddings[:, :-1])
        self.token = hidden[:, -1:], embeddings[:, -1:]
        self.calls = 0
        self.state = block.mixer.start(s.batch, s.length + ROOM)
        self.cache = None
        if block.resona is not None:
            self.cache = block.resona.make_cache(s.batch, s.length + ROOM)
        block(*self.context, self.state, self.cache)
        # The mixer's state is of one size and time however much it has seen; it just goes on.
        self.border = s.length // s.chunk_size * s.chunk_size

    def __call__(self) -> Tensor:
        if self.cache is not None and self.cache.get_seq_length() == self.cache.max_length:
            self.cache.crop(self.border)
        self.calls += 1
        return self.block(*self.token, self.state, self.cache)

    def check(self, out: Tensor, tolerance: float) -> Check:
        """Of the last call: what a forward over everything so far gives the last token."""
        new = (token.expand(-1, self.calls, -1) for token in self.token)
        whole = (torch.cat(pair, dim=1) for pair in zip(self.context, new, strict=True))
        return Check(relative_error(out, self.block(*whole)[:, -1:].double()), tolerance)


def decode(block: Block, case: Case) -> tuple[Call, Callable[[Tensor], Check]]:
    with torch.no_grad():
        decoding = Decoding(block.eval(), case)

    def check(out: Tensor) -> Check:
        with torch.no_grad():
            return decoding.check(out, TOLERANCE[case.dtype_name])

    return decoding, check


def _check(block: Block, case: Case, out: Tensor) -> Check:
    """A causal block gives the first tokens alone what it gives them inside the whole."""
    tokens = min(PREFIX, case.shape.length // 2)
    with torch.no_grad():
        alone = block(*(x[:, :tokens] for x in _inputs(case)))
    error = relative_error(out[:, :tokens], alone.double())
    return Check(error, TOLERANCE[case.dtype_name])
