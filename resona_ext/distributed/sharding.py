"""Sharding rules of the operators for DTensor: which dimensions may be split with no exchange at all.

    batch       every row by itself
    heads       attention by key/value heads; with one retrieval head all ranks search the same, with
                several they split too

Splitting the sequence is `retrieve_attend` of this package, not a sharding rule. Anything else that DTensor
is given is gathered first, as for torch's own operators.
"""

from __future__ import annotations

import torch
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

ops = torch.ops.resona

# What an argument or result is, by name. "slots": [B, T, R, ..]; "rows": [B, T, H or Hkv, ..].
KINDS = {
    "rows": "query key value out out_gradient dq dk dv lse lse_gradient",
    "slots": "query_embedding context_embedding chunk_embedding chunk_gradient indices scores bias "
    "score_gradient chunks dquery_embedding dchunks dcontext_embedding",
    "per head": "sink",
    "per head, summed": "dsink",
    "per retrieval head": "score_scale",
    "slots, summed": "dbias",
    "whole": "cu_seqlens",
}
KIND_OF = {name: kind for kind, names in KINDS.items() for name in names.split()}

RESULTS = {
    "pool_chunks": ("chunks",),
    "retrieve": ("indices", "scores"),
    "attend": ("out", "lse"),
    "fused_retrieve_attend": ("out", "lse", "indices", "scores"),
    "_pool_chunks_backward": ("dcontext_embedding",),
    "_retrieve_backward": ("dquery_embedding", "dchunks"),
    "_attend_backward": ("dq", "dk", "dv", "dbias", "dsink"),
}


def _by_batch(kind: str):
    if kind in ("rows", "slots", "slots, summed"):
        return Shard(0)
    return Partial() if kind == "per head, summed" else Replicate()


def _by_heads(kind: str, splits_search: bool):
    if kind == "rows":
        return Shard(2)
    if kind in ("per head", "per head, summed"):
        return Shard(0)
    if kind == "slots, summed":
        return Shard(2) if splits_search else Partial()
    if kind in ("slots", "per retrieval head") and splits_search:
        return Shard(2 if kind == "slots" else 0)
    return Replicate()


def _rule(name: str):
    schema = getattr(ops, name).default._schema

    def rule(*args, **kwargs):
        names = [a.name for a in schema.arguments]
        given = dict(zip(names, args, strict=False))
        tensors = {n: t for n, t in given.items() if n in KIND_OF and t is not None}
        retrieval_heads = next(t.shape[2] for n, t in tensors.items() if KIND_OF[n] == "slots")
        # An operator that gives no bias or sink a gradient returns it empty.
        empty = {f"d{n}" for n in ("bias", "sink") if n not in tensors}
        places = [_by_batch]
        has_rows = any(KIND_OF[n] == "rows" for n in tensors)
        if retrieval_heads > 1 or has_rows:
            places.append(lambda kind: _by_heads(kind, retrieval_heads > 1))
        places.append(lambda kind: Replicate())
        shardings = []
        for place in places:
            results = [Replicate() if n in empty else place(KIND_OF[n]) for n in RESULTS[name]]
            shardings.append(
                (results, [place(KIND_OF[n]) if n in tensors else None for n in given])
            )
        return shardings

    return rule


def register() -> None:
    for name in RESULTS:
        register_sharding(getattr(ops, name).default)(_rule(name))
