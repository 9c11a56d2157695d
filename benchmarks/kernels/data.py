"""Random inputs. What the embeddings are decides which chunks are selected, so there are three kinds.

random      neighbouring queries agree on nothing: the worst locality
correlated  embeddings drift along the sequence (AR(1), rho 0.98), so neighbouring queries agree on
            most chunks, as in trained models
skewed      few chunks are wanted by nearly all queries (Zipf): the worst load balance

Queries, keys and values are always random normal: zeros would flatter a GPU, which then clocks higher.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from resona_ext import attend, pool_chunks, retrieve

from .shapes import Shape

RHO = 0.98
ZIPF_STRENGTH = 4.0  # of the most popular chunk; the r-th has this divided by r


@dataclass
class Case:
    """One problem with its inputs, made when first asked for."""

    operator: str
    shape: Shape
    pattern: str = "random"
    dtype_name: str = "float32"
    device: str = "cpu"
    seed: int = 0

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype_name)

    @property
    def id(self) -> str:
        return f"{self.operator}/{self.pattern}/{self.dtype_name}/{self.shape.label}"

    def random(self, salt: int, *sizes: int) -> Tensor:
        """Normal float32 numbers, drawn where they are needed: another device, other numbers."""
        generator = torch.Generator(self.device).manual_seed(self.seed * 1000 + salt)
        return torch.randn(sizes, generator=generator, device=self.device)

    def place(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, self.dtype)

    @cached_property
    def query(self) -> Tensor:
        s = self.shape
        return self.place(self.random(1, s.batch, s.rows, s.heads, s.head_dim))

    @cached_property
    def key(self) -> Tensor:
        s = self.shape
        return self.place(self.random(2, s.batch, s.length, s.kv_heads, s.head_dim))

    @cached_property
    def value(self) -> Tensor:
        s = self.shape
        return self.place(self.random(3, s.batch, s.length, s.kv_heads, s.head_dim))

    @cached_property
    def grad_out(self) -> Tensor:
        s = self.shape
        return self.place(self.random(4, s.batch, s.rows, s.heads, s.head_dim))

    @cached_property
    def query_embedding(self) -> Tensor:
        return self.place(self._embeddings[0])

    @cached_property
    def context_embedding(self) -> Tensor:
        return self.place(self._embeddings[1])

    @cached_property
    def _embeddings(self) -> tuple[Tensor, Tensor]:
        s = self.shape
        query = self.random(5, s.batch, s.length, s.retrieval_heads, s.retrieval_dim)
        context = self.random(6, s.batch, s.length, s.retrieval_heads, s.retrieval_dim)
        if self.pattern == "correlated":
            query, context = autoregressive(query), autoregressive(context)
        elif self.pattern == "skewed":
            # One direction that all queries share, which each chunk holds by its popularity.
            direction = torch.nn.functional.normalize(self.random(7, s.retrieval_dim), dim=0)
            wanted = direction * s.retrieval_dim**0.5
            chunk = torch.arange(s.length, device=self.device) // s.chunk_size
            order = self.random(8, int(chunk[-1]) + 1).argsort().argsort()
            popularity = ZIPF_STRENGTH / (1 + order[chunk].float())
            query = query + wanted
            context = context + popularity[:, None, None] * wanted
        return query[:, s.length - s.rows :], context

    @cached_property
    def chunk_embedding(self) -> Tensor:
        with torch.no_grad():
            return pool_chunks(self.context_embedding, self.shape.chunk_size)

    @cached_property
    def indices(self) -> Tensor:
        with torch.no_grad():
            return retrieve(
                self.query_embedding,
                self.chunk_embedding,
                chunk_size=self.shape.chunk_size,
                top_k=self.shape.top_k,
                context_length=self.shape.length,
            ).indices

    def selected_attention(self) -> Tensor:
        with torch.no_grad():
            return attend(
                self.query, self.key, self.value, self.indices, chunk_size=self.shape.chunk_size
            )


def autoregressive(noise: Tensor, rho: float = RHO) -> Tensor:
    """x_t = rho x_{t-1} + sqrt(1 - rho^2) noise_t along dimension 1, by doubling."""
    x = noise * (1 - rho**2) ** 0.5
    x[:, 0] = noise[:, 0]  # stationary from the start
    distance, factor = 1, rho
    while distance < x.shape[1] and factor > 1e-12:
        x = torch.cat([x[:, :distance], x[:, distance:] + factor * x[:, :-distance]], dim=1)
        distance, factor = 2 * distance, factor * factor
    return x


def locality(indices: Tensor) -> dict[str, float]:
    """How local and how skewed a selection is. indices [B, T, R, k]; rows of the first half are left
    out, where few chunks are eligible.

    neighbour_jaccard: mean overlap of the chunk sets of neighbouring queries, 0 to 1.
    top_tenth_share: share of all selections that goes to the most wanted tenth of the chunks.
    """
    late = indices[0, indices.shape[1] // 2 :, 0].cpu()
    late = late[(late >= 0).all(dim=1)]
    if late.shape[0] < 2:
        return {}
    same = (late[1:, :, None] == late[:-1, None, :]).sum(dim=(1, 2)).double()
    counts = late.flatten().long().bincount().sort(descending=True).values.double()
    tenth = max(1, counts.numel() // 10)
    return {
        "neighbour_jaccard": float((same / (2 * late.shape[1] - same)).mean()),
        "top_tenth_share": float(counts[:tenth].sum() / counts.sum()),
    }
