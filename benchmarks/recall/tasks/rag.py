"""Retrieval in front of the model instead of inside it: what a frozen retriever finds becomes input.

The retriever knows no model: a chunk is the bag of its tokens, and the question finds the chunks with the
largest cosine. "appended" puts them between context and question, as RAG does; "retrieved" gives the model
nothing but them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import IGNORED, Batch

MODES = ("whole", "appended", "retrieved")


def width(mode: str, length: int, context: int, chunk_size: int, top_k: int) -> int:
    """Tokens of a row after `rebuild`; `context` of the `length` tokens stand before the question."""
    found = chunk_size * top_k
    return {"whole": length, "appended": length + found, "retrieved": length - context + found}[
        mode
    ]


def rebuild(
    batch: Batch, mode: str, context: int, known: int, chunk_size: int, top_k: int, vocabulary: int
) -> Batch:
    """The batch with the chunks that the question, its first `known` tokens, finds in the context."""
    if mode == "whole":
        return batch
    found = _retrieve(
        batch.tokens[:, :context],
        batch.tokens[:, context : context + known],
        chunk_size,
        top_k,
        vocabulary,
    )
    first = 0 if mode == "retrieved" else context
    nothing = torch.full_like(found, IGNORED)

    def insert(x: Tensor, middle: Tensor) -> Tensor:
        return torch.cat([x[:, :first], middle, x[:, context:]], dim=1)

    return Batch(
        insert(batch.tokens, found), insert(batch.labels, nothing), insert(batch.targets, nothing)
    )


def _retrieve(
    context: Tensor, question: Tensor, chunk_size: int, top_k: int, vocabulary: int
) -> Tensor:
    """The tokens of the best chunks, in the order of the context, [N, top_k * chunk_size]."""
    chunks = context[:, : context.shape[1] // chunk_size * chunk_size].unflatten(
        1, (-1, chunk_size)
    )
    wanted = _bag(question, vocabulary)
    found = _bag(chunks.flatten(0, 1), vocabulary).unflatten(0, chunks.shape[:2])
    score = F.cosine_similarity(found, wanted.unsqueeze(1), dim=-1)
    best = score.topk(top_k, dim=1).indices.sort(dim=1).values
    return chunks.gather(1, best.unsqueeze(-1).expand(-1, -1, chunk_size)).flatten(1)


def _bag(tokens: Tensor, vocabulary: int) -> Tensor:
    """How often each token occurs: [N, T] -> [N, V]."""
    count = torch.zeros(len(tokens), vocabulary)
    return count.scatter_add_(1, tokens, torch.ones_like(tokens, dtype=count.dtype))
