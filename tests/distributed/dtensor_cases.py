"""What the processes run: the operator on DTensors against the operator on the whole."""

from __future__ import annotations

import itertools

import torch
from sharded_cases import Case, inputs
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import resona_ext
import resona_ext.distributed  # registers the sharding rules

SETTINGS = {"chunk_size": 4, "top_k": 3, "return_aux": True}


def _placement(name: str, by: str, retrieval_heads: int):
    if by == "batch":
        return Replicate() if name in ("sink", "score_scale") else Shard(0)
    searches = name in ("query_embedding", "context_embedding", "score_scale")
    if searches and retrieval_heads == 1:
        return Replicate()
    return Shard(0) if name in ("sink", "score_scale") else Shard(2)


def _loss(out, aux):
    return out.square().sum() + aux.lse[:, 8:].sum()


def check_dtensors(rank: int, ranks: int) -> str:
    mesh = init_device_mesh("cpu", (ranks,))
    for by, heads, has_scale in itertools.product(("batch", "heads"), (1, 2), (False, True)):
        case = Case("", length=33, batch=2, retrieval_heads=heads, score_scale=has_scale, sink=True)
        tensors = {name: t for name, t in inputs(case).items() if t is not None}
        whole = {name: t.clone().requires_grad_() for name, t in tensors.items()}
        out, aux = resona_ext.retrieve_attend(**whole, **SETTINGS)
        _loss(out, aux).backward()

        parts = {
            name: distribute_tensor(t, mesh, [_placement(name, by, heads)]).requires_grad_()
            for name, t in tensors.items()
        }
        got, got_aux = resona_ext.retrieve_attend(**parts, **SETTINGS)
        assert got.placements == parts["query"].placements, "nothing is gathered"
        _loss(got, got_aux).backward()
        torch.testing.assert_close(got.full_tensor(), out)
        assert torch.equal(got_aux.indices.full_tensor(), aux.indices)
        for name, t in whole.items():
            if t.grad is not None:
                torch.testing.assert_close(parts[name].grad.full_tensor(), t.grad)
    return "equal"
