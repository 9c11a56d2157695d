"""Problems, data and the tolerance rule that the tests share."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from resona_ext import reference

ALL_DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def name_of(value) -> str:
    return str(value).removeprefix("torch.")


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass
class Problem:
    """One set of arguments of the operator, with random contents."""

    batch: int = 2
    queries: int = 50
    context: int = 61
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    retrieval_heads: int = 1
    retrieval_dim: int = 12
    chunk_size: int = 4
    top_k: int = 3
    dtype: torch.dtype = torch.float32
    embedding_dtype: torch.dtype | None = None
    score_scale: bool = False
    sink: bool = False
    lengths: list[int] | None = None  # packed sequences; sets batch, queries and context
    tensors: dict = field(init=False)

    def __post_init__(self):
        cu_seqlens = None
        if self.lengths is not None:
            borders = torch.tensor([0, *self.lengths]).cumsum(0)
            cu_seqlens = borders.int()
            self.batch, self.queries, self.context = 1, int(borders[-1]), int(borders[-1])
        rows = (self.batch, self.queries)
        tokens = (self.batch, self.context)
        embedding = self.embedding_dtype or self.dtype
        extra = accumulation_dtype(self.dtype)
        self.tensors = {
            "query": torch.randn(*rows, self.heads, self.head_dim).to(self.dtype),
            "key": torch.randn(*tokens, self.kv_heads, self.head_dim).to(self.dtype),
            "value": torch.randn(*tokens, self.kv_heads, self.head_dim).to(self.dtype),
            "query_embedding": torch.randn(*rows, self.retrieval_heads, self.retrieval_dim).to(
                embedding
            ),
            "context_embedding": torch.randn(*tokens, self.retrieval_heads, self.retrieval_dim).to(
                embedding
            ),
            "score_scale": torch.rand(self.retrieval_heads, dtype=extra) * 3
            if self.score_scale
            else None,
            "sink": torch.randn(self.heads, dtype=extra) if self.sink else None,
            "cu_seqlens": cu_seqlens,
        }

    def arguments(self, **changes) -> dict:
        """Keyword arguments of fused_retrieve_attend."""
        return {**self.tensors, "chunk_size": self.chunk_size, "top_k": self.top_k, **changes}

    def doubled(self) -> dict:
        """The same contents in float64, for the truth."""
        return {
            name: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t
            for name, t in self.arguments().items()
        }


def selection(p: Problem) -> Tensor:
    """The indices that the reference retrieves for a problem."""
    a = p.tensors
    chunks = reference.pool_chunks(a["context_embedding"], p.chunk_size, a["cu_seqlens"])
    return reference.retrieve(
        a["query_embedding"], chunks, p.chunk_size, p.top_k, p.context, a["cu_seqlens"]
    )[0]


def assert_no_worse(
    name: str, got: Tensor, plain: Tensor, truth: Tensor, rounding: float = 0
) -> None:
    """The error may be twice that of plain PyTorch in the same dtype, plus a rounding of the result.

    plain: reference.py in the dtype of `got`, without upcasting; truth: reference.py in float64.
    rounding: what else is forgiven. A sum of n terms into one number wants eps * sqrt(n) times their size,
    since the error of `plain` may vanish there by chance.
    """
    assert got.shape == truth.shape, (
        f"{name}: shape {tuple(got.shape)}, expected {tuple(truth.shape)}"
    )
    got, plain, truth = got.double(), plain.double(), truth.double()
    assert torch.equal(got.isnan(), truth.isnan()), f"{name}: NaN in other places"
    infinite = truth.isinf()
    assert torch.equal(got[infinite], truth[infinite]), f"{name}: infinities differ"
    finite = truth.isfinite()
    if not finite.any():
        return
    error = (got - truth)[finite].abs().max().item()
    allowed = 2 * (plain - truth)[finite].abs().max().item()
    rounding += 4 * torch.finfo(torch.float32).eps * max(1.0, truth[finite].abs().max().item())
    off = torch.where(finite, (got - truth).abs(), 0)
    worst = tuple(int(i) for i in torch.unravel_index(off.argmax(), off.shape))
    assert error <= allowed + rounding, (
        f"{name}: error {error:.3e}, allowed {allowed + rounding:.3e} and exceeded by "
        f"{int((off > allowed + rounding).sum())} of {off.numel()}, worst at {worst}: "
        f"{got[worst].item():.6g}, expected {truth[worst].item():.6g}"
    )


def _vocabulary(words: int, dim: int) -> Tensor:
    return torch.randn(words, dim)


def _random(length: int, dim: int) -> Tensor:
    return torch.randn(length, dim)


def _repeated(length: int, dim: int) -> Tensor:
    """One passage of 24 tokens, again and again: every score occurs many times."""
    return torch.randn(24, dim).repeat(length // 24 + 1, 1)[:length]


def _permuted(length: int, dim: int) -> Tensor:
    """The same eight tokens in another order in every block: sums that differ by rounding at most."""
    words = _vocabulary(8, dim)
    order = torch.cat([torch.randperm(8) for _ in range(length // 8 + 1)])
    return words[order[:length]]


def _zipf(length: int, dim: int) -> Tensor:
    weights = 1.0 / torch.arange(1, 201)
    words = torch.multinomial(weights, max(length, 1), replacement=True)
    return _vocabulary(200, dim)[words[:length]]


def _letters(count: int):
    def make(length: int, dim: int) -> Tensor:
        return _vocabulary(count, dim)[torch.randint(count, (length,))]

    return make


# Contents of a context. Real text repeats itself; random data never ties and proves little about top-k.
CONTENTS = {
    "random": _random,
    "repeated": _repeated,
    "permuted": _permuted,
    "zipf": _zipf,
    "four_letters": _letters(4),
    "two_letters": _letters(2),
}


def embeddings(
    kind: str, batch: int, length: int, heads: int, dim: int, dtype: torch.dtype
) -> Tensor:
    """[B, L, R, E] with the given kind of contents."""
    make = CONTENTS[kind]
    flat = [torch.stack([make(length, dim) for _ in range(heads)], dim=1) for _ in range(batch)]
    return torch.stack(flat).to(dtype) if batch else torch.zeros(0, length, heads, dim, dtype=dtype)
