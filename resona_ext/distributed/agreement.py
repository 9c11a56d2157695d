"""Before anything is exchanged, every rank learns what all ranks were given.

A mistake on one rank must be an error on all of them: a rank that raises alone leaves the others waiting
until the process group's timeout.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# What has to be the same everywhere, in the order of the row that is sent.
NAMES = (
    "batch",
    "heads",
    "key/value heads",
    "head_dim",
    "retrieval heads",
    "retrieval_dim",
    "chunk_size",
    "top_k",
    "dtype of query",
    "dtype of embeddings",
    "score_scale",
    "sink",
    "number of sequences",
    "length of the whole",
    "requires_grad",  # of the five tensors, as bits
)


def agree(own: dict[str, int] | None, error: str, tokens: int, device, group) -> list[int]:
    """All ranks' numbers of tokens.

    Args:
        own: by the names above, or None where this rank has found a mistake, which `error` describes.
        tokens: that this rank holds.

    Raises:
        ValueError: on every rank, if one has a mistake or two differ.
    """
    row = [0 if own is None else 1, tokens, *((own or {}).get(name, 0) for name in NAMES)]
    mine = torch.tensor(row, dtype=torch.int64, device=device)
    ranks = dist.get_world_size(group)
    every = mine.new_empty(ranks, len(row))
    dist.all_gather_into_tensor(every, mine.unsqueeze(0), group=group)
    table = every.tolist()
    wrong = [rank for rank, other in enumerate(table) if not other[0]]
    if own is None:
        raise ValueError(error)
    if wrong:
        raise ValueError(
            f"resona_ext.distributed: expected arguments without a mistake on every rank, got one on {wrong}"
        )
    for i, name in enumerate(NAMES, start=2):
        values = [other[i] for other in table]
        if len(set(values)) > 1:
            raise ValueError(
                f"resona_ext.distributed: {name}: expected one value on all ranks, got {_words(name, values)}"
            )
    return [other[1] for other in table]


def _words(name: str, values: list[int]) -> list:
    return [str(DTYPES[v]) for v in values] if name.startswith("dtype") else values


def facts(
    query: Tensor,
    key: Tensor,
    query_embedding: Tensor,
    chunk_size: int,
    top_k: int,
    score_scale: Tensor | None,
    sink: Tensor | None,
    sequences: Sequence[int],
    gradients: int,
) -> dict[str, int]:
    """What `agree` compares; `sequences` are the borders in the whole, empty where nothing was said."""
    values = (
        query.shape[0],
        query.shape[2],
        key.shape[2],
        query.shape[3],
        query_embedding.shape[2],
        query_embedding.shape[3],
        chunk_size,
        top_k,
        DTYPES.index(query.dtype),
        DTYPES.index(query_embedding.dtype),
        int(score_scale is not None),
        int(sink is not None),
        len(sequences),
        sequences[-1] if sequences else 0,
        gradients,
    )
    return dict(zip(NAMES, values, strict=True))
