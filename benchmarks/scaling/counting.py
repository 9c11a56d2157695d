"""Counted: what selections ask of other ranks, and what leaves the processes of a real run.

The processes are those of torch.distributed with gloo, on this machine's CPU. Every collective that
`resona_ext.distributed` uses is wrapped, and bytes for other ranks are added up by kind.
"""

from __future__ import annotations

import pickle
import socket
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

import resona_ext
from resona_ext import distributed
from resona_ext.distributed import Layout, collectives, shard

from ..kernels.data import autoregressive
from .model import Problem

NAMES = ("query", "key", "value", "query_embedding", "context_embedding")


def inputs(p: Problem, pattern: str, seed: int = 0) -> dict[str, Tensor]:
    """float32, batch 1. "random": neighbours select alike by chance only; "correlated": embeddings drift."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"query": (p.heads, p.head_dim), "key": (p.kv_heads, p.head_dim)}
    shapes["value"] = shapes["key"]
    for name in NAMES[3:]:
        shapes[name] = (p.retrieval_heads, p.retrieval_dim)
    tensors = {n: torch.randn(1, p.length, *s, generator=generator) for n, s in shapes.items()}
    if pattern == "correlated":
        tensors |= {name: autoregressive(tensors[name]) for name in NAMES[3:]}
    return tensors


# --- Selections ---------------------------------------------------------------------------------


def needs(chunk: Tensor, p: Problem) -> dict[str, int]:
    """Foreign chunks and pairs as in model.py, counted in a selection [1, L, R, k] of the whole."""
    layout = Layout.balanced(p.length, p.ranks, p.chunk_size)
    chunks = pairs = 0
    for rank in range(p.ranks):
        own = shard(chunk, layout, rank)[0].long()  # [T, R, k]
        owner = torch.where(own >= 0, layout.owner[own.clamp(min=0)], -1)
        is_foreign = (owner >= 0) & (owner != rank)
        head = torch.arange(p.retrieval_heads)[:, None]
        chunks += (own * p.retrieval_heads + head)[is_foreign].unique().numel()
        token = torch.arange(own.shape[0])[:, None, None]
        pairs += (token * p.ranks + owner)[is_foreign].unique().numel()
    return {"chunks": chunks, "queries": pairs}


def select(p: Problem, pattern: str) -> Tensor:
    tensors = inputs(replace(p, heads=1, kv_heads=1, head_dim=1), pattern)
    chunks = resona_ext.pool_chunks(tensors["context_embedding"], p.chunk_size)
    settings = {"chunk_size": p.chunk_size, "top_k": p.top_k, "context_length": p.length}
    return resona_ext.retrieve(tensors["query_embedding"], chunks, **settings).indices


# --- Processes ----------------------------------------------------------------------------------


class Meter:
    """Bytes that leave this process for others, and collectives, by kind."""

    def __init__(self) -> None:
        self.bytes, self.calls = Counter(), Counter()
        self._kept = {}

    def __enter__(self) -> Meter:
        self._wrap(collectives, "_all_gather", self._to_all("gather"))
        self._wrap(collectives, "_reduce_scatter", lambda out, own, **_: self._add("scatter", out))
        self._wrap(dist, "all_reduce", self._to_all("reduce", argument=0))
        self._wrap(dist, "all_to_all_single", self._exchanged)
        return self

    def __exit__(self, *_) -> None:
        for (module, name), function in self._kept.items():
            setattr(module, name, function)

    def _wrap(self, module, name: str, count) -> None:
        function = self._kept[module, name] = getattr(module, name)

        def counted(*args, **kwargs):
            count(*args, **kwargs)
            return function(*args, **kwargs)

        setattr(module, name, counted)

    def _add(self, kind: str, t: Tensor) -> None:
        """A tensor for each of the others."""
        self.calls[kind] += 1
        self.bytes[kind] += t.nbytes * (dist.get_world_size() - 1)

    def _to_all(self, kind: str, argument: int = 1):
        return lambda *args, **_: self._add(kind, args[argument])

    def _exchanged(self, out, own, here=None, there=None, group=None, **_) -> None:
        self.calls["exchange"] += 1
        counts = there or [own.shape[0] // dist.get_world_size()] * dist.get_world_size()
        foreign = sum(counts) - counts[dist.get_rank()]
        self.bytes["exchange"] += foreign * own[:1].numel() * own.element_size()


def _loss(out: Tensor, weight: Tensor) -> Tensor:
    return (out * weight).sum()


def _main(rank: int, p: Problem, cases: list[tuple[str, str]], port: int, folder: str) -> None:
    torch.set_num_threads(1)
    where = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=p.ranks)
    mesh = init_device_mesh("cpu", (p.ranks,))
    results = [_beside_one(p, rank, mesh, *case) for case in cases]
    Path(folder, str(rank)).write_bytes(pickle.dumps(results))
    dist.destroy_process_group()


def _beside_one(p: Problem, rank: int, mesh, pattern: str, exchange: str) -> dict:
    """This rank's part of a sharded call, beside the whole in one process."""
    layout = Layout.balanced(p.length, p.ranks, p.chunk_size)
    whole, settings = inputs(p, pattern), {"chunk_size": p.chunk_size, "top_k": p.top_k}
    weight = torch.randn(whole["query"].shape, generator=torch.Generator().manual_seed(1))

    one = {name: t.clone().requires_grad_(name in NAMES[:3]) for name, t in whole.items()}
    out, aux = resona_ext.retrieve_attend(**one, **settings, return_aux=True)
    (out * weight).sum().backward()

    part = {name: shard(t, layout, rank) for name, t in whole.items()}
    part = {name: t.requires_grad_(name in NAMES[:3]) for name, t in part.items()}
    settings |= {"mesh": mesh, "layout": layout, "exchange": exchange}
    with Meter() as forward:
        got, got_aux = distributed.retrieve_attend(**part, **settings, return_aux=True)
    with Meter() as backward:
        (got * shard(weight, layout, rank)).sum().backward()

    def error(got: Tensor, expected: Tensor) -> float:
        """The largest, as a share of the largest value of the whole."""
        return float((got - shard(expected, layout, rank)).abs().max() / expected.abs().max())

    return {
        "indices_equal": torch.equal(got_aux.indices, shard(aux.indices, layout, rank)),
        "out": error(got.detach(), out.detach()),
        "gradients": max(error(part[n].grad, one[n].grad) for n in NAMES[:3]),
        "forward": sum(forward.bytes.values()),
        "backward": sum(backward.bytes.values()),
        "calls": sum(forward.calls.values()),
        "planned": got_aux.plan.chunk_bytes if exchange == "chunks" else got_aux.plan.query_bytes,
    }


def run(p: Problem, cases: list[tuple[str, str]], folder: Path) -> list[tuple[dict, ...]]:
    """For each case, a pattern and an exchange: what each of p.ranks processes found."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(_main, (p, cases, port, str(folder)), p.ranks)
    found = [pickle.loads(Path(folder, str(rank)).read_bytes()) for rank in range(p.ranks)]
    return list(zip(*found, strict=True))
