"""Before anything is exchanged, every rank learns what all ranks were given.

A mistake on one rank must be an error on all of them: a rank that raises alone leaves the others waiting
until the process group's timeout.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .collectives import all_gather
from .layout import require

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
    "inclusive",
    "number of sequences",
    "length of the whole",
    "layout and borders (checksum)",
    "requires_grad",  # of the five tensors, as bits
)


def agree(
    own: dict[str, int] | None,
    error: str,
    tokens: int,
    mesh: DeviceMesh,
    group: dist.ProcessGroup,
    names: Sequence[str] = NAMES,
) -> list[int]:
    """All ranks' numbers of tokens.

    Args:
        own: by `names`, or None where this rank has found a mistake, which `error` describes.
        tokens: that this rank holds.
        mesh: says on which kind of device the group talks: a rank whose tensors lie elsewhere has to
            be able to say so.

    Raises:
        ValueError: on every rank, if one has a mistake or two differ.
    """
    row = [0 if own is None else 1, tokens, *((own or {}).get(name, 0) for name in names)]
    mine = torch.tensor(row, dtype=torch.int64, device=mesh.device_type)
    table = all_gather(mine, group).tolist()
    wrong = [rank for rank, other in enumerate(table) if not other[0]]
    if own is None:
        raise ValueError(error)
    if wrong:
        raise ValueError(
            f"resona_ext.distributed: expected arguments without a mistake on every rank, got one on {wrong}"
        )
    for i, name in enumerate(names, start=2):
        values = [other[i] for other in table]
        if len(set(values)) > 1:
            raise ValueError(
                f"resona_ext.distributed: {name}: expected one value on all ranks, got {_words(name, values)}"
            )
    return [other[1] for other in table]


def checksum(numbers: object) -> int:
    """Of plain numbers, nested as one likes: equal on two ranks if and (nearly) only if they are."""
    return zlib.crc32(repr(numbers).encode())


def number_of(t: Tensor, argument: str) -> int:
    """Of a tensor's dtype, for `agree`."""
    require(t.dtype in DTYPES, argument, f"a dtype of {[str(d) for d in DTYPES]}", t.dtype)
    return DTYPES.index(t.dtype)


def bits(flags: Iterable[bool]) -> int:
    return sum(1 << i for i, flag in enumerate(flags) if flag)


def check_device(t: Tensor, argument: str, mesh: DeviceMesh) -> None:
    """Whether a tensor lies where this rank's group talks: collectives elsewhere would hang the others."""
    kind = t.device.type
    require(kind == mesh.device_type, argument, f"a tensor on {mesh.device_type}", kind)
    if kind == "cuda":
        current = torch.cuda.current_device()
        expected = f"a tensor on cuda:{current}, the current device of this rank"
        require(t.device.index == current, argument, expected, t.device)


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
    inclusive: bool,
    sequences: Sequence[int],
    pieces: object,
    gradients: int,
) -> dict[str, int]:
    """What `agree` compares; `sequences` are the borders in the whole, empty where nothing was said;
    `pieces` those of a layout, if given."""
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
        int(inclusive),
        len(sequences),
        sequences[-1] if sequences else 0,
        checksum((tuple(sequences), pieces)),
        gradients,
    )
    return dict(zip(NAMES, values, strict=True))
