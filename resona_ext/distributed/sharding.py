"""Sharding rules of the operators for DTensor: which dimensions may be split with no exchange at all.

    batch       every row by itself; not with packed sequences, which are one row
    heads       attention by key/value heads; with one retrieval head all ranks search the same, with
                several they split too

Splitting the sequence is `retrieve_attend` of this package, not a sharding rule. Anything else that DTensor
is given is gathered first, as for torch's own operators; but for operators that write into a cache, which
would write into a copy: they want every argument in its place.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

ops = torch.ops.resona


class Kind(NamedTuple):
    """Of an argument or result: which dimensions are batch and heads, if any."""

    batch: int | None = None
    heads: int | None = None
    of_search: bool = False  # heads are retrieval heads, or all of them share one selection
    is_sum: bool = False  # over the batch, and over the heads where they share a selection


KINDS = {
    # [B, T, H or Hkv, ..]
    Kind(0, 2): "query key value out out_gradient dq dk dv lse lse_gradient key_cache value_cache "
    "prefix_key prefix_value dprefix_key dprefix_value",
    # [B, T, R, ..]
    Kind(0, 2, of_search=True): "query_embedding context_embedding chunk_embedding chunk_gradient "
    "indices scores bias score_gradient chunks dquery_embedding dchunks dcontext_embedding history "
    "superchunk_embedding",
    Kind(0, 2, of_search=True, is_sum=True): "dbias",
    Kind(0, 1, of_search=True): "open_sum superchunk_sum",
    # [n, H, ..]
    Kind(
        0, 1
    ): "state normalizer initial_state initial_normalizer state_gradient normalizer_gradient "
    "dinitial_state dinitial_normalizer",
    Kind(None, 0): "sink",
    Kind(None, 0, is_sum=True): "dsink",
    Kind(None, 0, of_search=True): "score_scale",
    Kind(0, None): "lengths prefix_lengths mask",
    Kind(): "cu_seqlens",
}
KIND_OF = {name: kind for kind, names in KINDS.items() for name in names.split()}

RESULTS = {
    "pool_chunks": ("chunks",),
    "retrieve": ("indices", "scores"),
    "retrieve_two_level": ("indices", "scores"),
    "attend": ("out", "lse"),
    "fused_retrieve_attend": ("out", "lse", "indices", "scores"),
    "decode_step": ("out", "lse", "indices", "scores"),
    "decode_step_two_level": ("out", "lse", "indices", "scores"),
    "prefix_linear_attention": ("out", "state", "normalizer"),
    "prefix_linear_attention_step": ("out",),
    "_pool_chunks_backward": ("dcontext_embedding",),
    "_retrieve_backward": ("dquery_embedding", "dchunks"),
    "_attend_backward": ("dq", "dk", "dv", "dbias", "dsink"),
    "_prefix_linear_attention_backward": (
        *("dq", "dk", "dv", "dprefix_key", "dprefix_value"),
        *("dinitial_state", "dinitial_normalizer"),
    ),
}


def _whole(kind: Kind):
    return Replicate()


def _by_batch(kind: Kind):
    if kind.batch is None:
        return Partial() if kind.is_sum else Replicate()
    return Shard(kind.batch)


def _by_heads(splits_search: bool):
    def place(kind: Kind):
        if kind.of_search and not splits_search:
            return Partial() if kind.is_sum else Replicate()
        return Replicate() if kind.heads is None else Shard(kind.heads)

    return place


def _rule(name: str):
    schema = getattr(ops, name).default._schema
    written = [a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write]

    def rule(*args, **kwargs):
        names = [a.name for a in schema.arguments]
        given = dict(zip(names, args, strict=False))
        tensors = {n: t for n, t in given.items() if n in KIND_OF and t is not None}
        kinds = {n: KIND_OF[n] for n in tensors}
        # An operator that gives no bias, sink or state a gradient returns it empty.
        optional = ("bias", "sink", "initial_state", "initial_normalizer")
        empty = {f"d{n}" for n in optional if n not in tensors}
        places = _places(tensors, kinds)
        if written:
            places = _in_place(name, places, tensors, kinds)
        return [
            (
                [Replicate() if n in empty else place(KIND_OF[n]) for n in RESULTS[name]],
                [place(kinds[n]) if n in tensors else None for n in given],
            )
            for place in places
        ]

    return rule


def _places(tensors: dict, kinds: dict[str, Kind]) -> list:
    """The ways to split. Of equal costs DTensor takes the first, so what is whole stays whole."""
    searching = [tensors[n] for n, kind in kinds.items() if kind.of_search and kind.heads == 2]
    retrieval_heads = searching[0].shape[2] if searching else 1
    places = [_whole]
    has_heads = any(not k.of_search and k.heads is not None for k in kinds.values())
    if has_heads or retrieval_heads > 1:
        places.append(_by_heads(retrieval_heads > 1))
    if "cu_seqlens" not in tensors:
        places.append(_by_batch)
    return places


def _in_place(name: str, places: list, tensors: dict, kinds: dict[str, Kind]) -> list:
    """The ways in which the arguments are split already, dimension by dimension of the mesh."""
    kept = set()
    for dim in range(next(iter(tensors.values())).mesh.ndim):
        now = {n: t.placements[dim] for n, t in tensors.items()}
        fits = [i for i, place in enumerate(places) if all(now[n] == place(kinds[n]) for n in now)]
        if not fits:
            raise ValueError(
                f"resona::{name}: placements: expected all arguments split by batch or by heads, or whole, "
                f"as what is written in place cannot be moved, got {now}"
            )
        kept.add(fits[0])
    return [places[i] for i in sorted(kept)]


def register() -> None:
    for name in RESULTS:
        register_sharding(getattr(ops, name).default)(_rule(name))
