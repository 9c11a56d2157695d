"""How often retrieval finds the answer, whatever the model then makes of it.

A hit: the wanted token stands in a chunk that is retrieved at the place where it is asked for. The hard mask
has no gradient, so training moves this rate without knowing it; for a branch deep in the model it may fall.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from resona_ext import Resona, pool_chunks, retrieve
from resona_ext._layer_parts import rms_norm

from .tasks import IGNORED, Batch


def first_retriever(model: nn.Module) -> Resona | None:
    """The first branch that searches; None where there is none, or one whose search cannot be redone here."""
    for branch in model.branches:
        if type(branch) is Resona and branch.encoders.is_pooled and branch.eligibility == "strict":
            return branch
    return None


def hit_rate(model: nn.Module, data: Batch, rows: int, device: str = "cpu") -> float | None:
    """The share of wanted tokens that are hits of the first retriever; None without one.

    rows: of data, that go through the model at a time.
    """
    branch = first_retriever(model)
    if branch is None:
        return None
    model.eval()
    parts = (Batch(*(x.to(device) for x in part)) for part in data.split(rows))
    return torch.cat([_is_hit(model, branch, part) for part in parts]).double().mean().item()


@torch.no_grad()
def _is_hit(model: nn.Module, branch: Resona, batch: Batch) -> Tensor:
    """For each wanted token, row by row."""
    wanted = batch.labels != IGNORED
    caught: list[tuple[Tensor, ...]] = []
    with branch.register_forward_pre_hook(lambda module, inputs: caught.append(inputs)):
        model(batch.tokens, wanted)
    x, embeddings, *_ = caught[0]
    row, column = wanted.nonzero(as_tuple=True)
    found = retrieved_chunks(branch, x, embeddings)[row, column].flatten(1).long()
    size = branch.chunk_size
    chunks = batch.tokens[:, : batch.tokens.shape[1] // size * size].unflatten(1, (-1, size))
    holds = chunks[row.unsqueeze(1), found.clamp(min=0)] == batch.labels[wanted].view(-1, 1, 1)
    return (holds.any(dim=2) & (found >= 0)).any(dim=1)


def retrieved_chunks(branch: Resona, x: Tensor, embeddings: Tensor) -> Tensor:
    """What the branch retrieves for its input: chunk numbers [B, T, R, k], -1 where there are fewer."""
    context = rms_norm(embeddings) if branch.normalize_embeddings else embeddings
    tokens = branch.encoders.context_embedding(context, branch.q_proj.weight)
    return retrieve(
        branch.encoders.query_embedding(x, branch.q_proj(x)),
        pool_chunks(tokens, branch.chunk_size),
        chunk_size=branch.chunk_size,
        top_k=branch.top_k,
        context_length=embeddings.shape[1],
    ).indices
