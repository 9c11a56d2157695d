"""What the processes run: the operator over ranks against the operator in one process, and mistakes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch.distributed.device_mesh import init_device_mesh

import resona_ext
from resona_ext import distributed
from resona_ext.distributed import Layout
from resona_ext.distributed.collectives import Trip


@dataclass(frozen=True)
class Case:
    name: str
    length: int = 70
    layout: str = "contiguous"  # "contiguous", "balanced", "announced" or lengths
    exchange: str = "chunks"
    dtype: torch.dtype = torch.float64
    batch: int = 1
    heads: int = 4
    kv_heads: int = 2
    retrieval_heads: int = 1
    chunk_size: int = 4
    top_k: int = 3
    score_scale: bool = False
    sink: bool = False
    cu_seqlens: tuple[int, ...] | None = None
    device: str = "cpu"

    def on(self, device: str) -> Case:
        """CUDA has no float64."""
        narrow = device == "cuda" and self.dtype == torch.float64
        return replace(self, device=device, dtype=torch.float32 if narrow else self.dtype)


def _table():
    for exchange in ("chunks", "queries", "auto"):
        yield Case(f"contiguous {exchange}", exchange=exchange)
        yield Case(f"balanced {exchange}", layout="balanced", exchange=exchange, score_scale=True)
        yield Case(
            f"batch and heads {exchange}",
            batch=2,
            retrieval_heads=2,
            layout="balanced",
            exchange=exchange,
            score_scale=True,
            sink=True,
        )
        yield Case(
            f"packed {exchange}",
            length=90,
            cu_seqlens=(0, 33, 33, 40, 41, 90),
            layout="balanced",
            exchange=exchange,
            score_scale=True,
        )
        yield Case(f"float32 {exchange}", dtype=torch.float32, exchange=exchange, sink=True)
        yield Case(f"bfloat16 {exchange}", dtype=torch.bfloat16, exchange=exchange)
    yield Case("announced", length=72, layout="announced")
    yield Case("one chunk in all", length=7, chunk_size=5)
    yield Case("no chunk at all", length=3, chunk_size=5, sink=True)
    yield Case("fewer tokens than ranks", length=2, chunk_size=1, top_k=1)
    yield Case("nothing", length=0)
    yield Case("chunks of one token, more slots than chunks", chunk_size=1, top_k=90)
    yield Case("packed, one piece", length=40, cu_seqlens=(0, 13, 40), exchange="queries")


TABLE = tuple(_table())
NAMES = ("query", "key", "value", "query_embedding", "context_embedding")


def inputs(case: Case) -> dict[str, torch.Tensor]:
    c, generator = case, torch.Generator().manual_seed(5)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(c.device, c.dtype)

    tensors = {
        "query": draw(c.batch, c.length, c.heads, 8),
        "key": draw(c.batch, c.length, c.kv_heads, 8),
        "value": draw(c.batch, c.length, c.kv_heads, 8),
        "query_embedding": draw(c.batch, c.length, c.retrieval_heads, 6),
        "context_embedding": draw(c.batch, c.length, c.retrieval_heads, 6),
    }
    wide = torch.float64 if c.dtype == torch.float64 else torch.float32
    tensors["score_scale"] = draw(c.retrieval_heads).to(wide) if c.score_scale else None
    tensors["sink"] = draw(c.heads).to(wide) if c.sink else None
    return tensors


def layout_of(case: Case, ranks: int) -> Layout:
    make = Layout.balanced if case.layout == "balanced" else Layout.contiguous
    return make(case.length, ranks, case.chunk_size, case.cu_seqlens)


def _loss(
    out: torch.Tensor, scores: torch.Tensor, weight: torch.Tensor, case: Case
) -> torch.Tensor:
    loss = (out * weight).sum()
    if case.score_scale:
        loss = loss + scores[scores.isfinite()].sum()
    return loss


def check(case: Case, rank: int, ranks: int, mesh) -> None:
    whole = inputs(case)
    shared = {"chunk_size": case.chunk_size, "top_k": case.top_k, "return_aux": True}
    layout = layout_of(case, ranks)
    weight = torch.randn(whole["query"].shape, generator=torch.Generator().manual_seed(7))
    weight = weight.to(case.device, case.dtype)

    def leaves(tensors):
        return {n: None if t is None else t.clone().requires_grad_() for n, t in tensors.items()}

    one = leaves(whole)
    borders = None
    if case.cu_seqlens is not None:
        borders = torch.tensor(case.cu_seqlens, dtype=torch.int32, device=case.device)
    out, aux = resona_ext.retrieve_attend(**one, cu_seqlens=borders, **shared)
    _loss(out, aux.scores, weight, case).backward()

    part = lambda t: distributed.shard(t, layout, rank)  # noqa: E731
    mine = leaves({n: part(t) if n in NAMES else t for n, t in whole.items()})
    where = {"layout": None if case.layout == "announced" else layout}
    got, got_aux = distributed.retrieve_attend(
        **mine, mesh=mesh, exchange=case.exchange, **where, **shared
    )
    _loss(got, got_aux.scores, part(weight), case).backward()

    assert torch.equal(got_aux.indices, part(aux.indices)), "indices"
    assert torch.equal(got_aux.scores, part(aux.scores)), "scores"
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 4e-2}[case.dtype]
    close = {"rtol": tolerance, "atol": tolerance}
    torch.testing.assert_close(got, part(out), **close)
    torch.testing.assert_close(got_aux.lse, part(aux.lse), **close)
    for name in NAMES:
        expected = one[name].grad
        expected = torch.zeros_like(one[name]) if expected is None else expected
        found = mine[name].grad
        found = torch.zeros_like(mine[name]) if found is None else found
        torch.testing.assert_close(found, part(expected), **close, msg=lambda m: f"{name}: {m}")  # noqa: B023
    for name in ("score_scale", "sink"):
        if mine[name] is not None:
            torch.distributed.all_reduce(mine[name].grad)
            torch.testing.assert_close(mine[name].grad, one[name].grad, **close)


def check_all(rank: int, ranks: int, device: str = "cpu") -> dict[str, str]:
    """The cases that failed, and how."""
    mesh, failures = init_device_mesh(device, (ranks,)), {}
    for case in TABLE:
        try:
            check(case.on(device), rank, ranks, mesh)
        except Exception as error:
            failures[case.name] = f"{type(error).__name__}: {error}"
            if not isinstance(error, AssertionError):
                break  # the ranks may be out of step
    return failures


# --- mistakes: each returns the error text of a rank, or what came instead


def _arguments(rank: int, ranks: int, **changes) -> dict:
    case = Case("mistakes", length=32)
    part = lambda t: distributed.shard(t, layout_of(case, ranks), rank)  # noqa: E731
    whole = inputs(case)
    arguments = {n: part(t) if n in NAMES else t for n, t in whole.items()}
    return arguments | {"chunk_size": 4, "top_k": 3} | changes


def _of_another_dtype(rank, ranks):
    arguments = _arguments(rank, ranks)
    names = ("query", "key", "value", "query_embedding", "context_embedding")
    return arguments | {n: arguments[n].float() for n in names} if rank == 1 else arguments


def _mixed_dtypes(rank, ranks):
    arguments = _arguments(rank, ranks)
    return arguments | {"key": arguments["key"].float()} if rank == 1 else arguments


def _frozen_here(rank, ranks):
    arguments = _arguments(rank, ranks)
    return arguments | {"query": arguments["query"].requires_grad_(rank == 0)}


MISTAKES = {
    "another top_k": (
        lambda rank, ranks: _arguments(rank, ranks, top_k=3 + rank),
        "top_k: expected one value on all ranks, got [3, 4]",
    ),
    "another dtype": (
        _of_another_dtype,
        "dtype of query: expected one value on all ranks, got ['torch.float64', 'torch.float32']",
    ),
    "mixed dtypes on one": (_mixed_dtypes, "key"),
    "a piece that begins inside a chunk": (
        lambda rank, ranks: {
            n: t[:, : 15 + rank] if n in NAMES else t for n, t in _arguments(rank, ranks).items()
        },
        "pieces: expected a piece to begin at a multiple of 4 tokens",
    ),
    "a layout of other lengths": (
        lambda rank, ranks: _arguments(rank, ranks, layout=Layout.contiguous(48, ranks, 4)),
        "query: expected 24 tokens on rank",
    ),
    "a layout for other ranks": (
        lambda rank, ranks: _arguments(rank, ranks, layout=Layout.contiguous(32, 3, 4)),
        "layout: expected one for 2 ranks, got 3",
    ),
    "gradients on one rank": (_frozen_here, "requires_grad: expected one value on all ranks"),
    "an unknown exchange": (
        lambda rank, ranks: _arguments(rank, ranks, exchange="pigeons"),
        "exchange: expected auto or one of ['chunks', 'queries'], got pigeons",
    ),
    "a mistake on one rank only": (
        lambda rank, ranks: _arguments(rank, ranks, **({"exchange": "x"} if rank else {})),
        "exchange: expected",
    ),
}


def make_all_mistakes(rank: int, ranks: int) -> dict[str, str]:
    mesh, texts = init_device_mesh("cpu", (ranks,)), {}
    for name, (make, _) in MISTAKES.items():
        try:
            distributed.retrieve_attend(**make(rank, ranks), mesh=mesh)
            texts[name] = "no error"
        except ValueError as error:
            texts[name] = str(error)
    # And the ranks are still in step.
    distributed.retrieve_attend(**_arguments(rank, ranks), mesh=mesh)
    return texts


def count_bytes(rank: int, ranks: int) -> dict[str, tuple[int, int]]:
    """For each exchange what the plan foresees and what really left this rank, added up over the ranks."""
    mesh, totals, sent = init_device_mesh("cpu", (ranks,)), {}, []
    exchange = Trip.exchange

    def counting(trip, x, here, there):
        assert x.shape[0] == sum(there)
        sent.append(x.numel() * x.element_size())
        return exchange(trip, x, here, there)

    Trip.exchange = counting
    for name in ("chunks", "queries"):
        sent.clear()
        arguments = _arguments(rank, ranks, exchange=name)
        _, aux = distributed.retrieve_attend(**arguments, mesh=mesh, return_aux=True)
        moved = torch.tensor(sum(sent))
        torch.distributed.all_reduce(moved)
        totals[name] = (
            getattr(aux.plan, f"{name[:-1].replace('querie', 'query')}_bytes"),
            int(moved),
        )
    Trip.exchange = exchange
    return totals


def order_of_events(rank: int, ranks: int) -> dict[str, list[str]]:
    """What an exchange and the part at home do, in the order in which they do it."""
    from resona_ext.distributed import attention

    mesh, found, events = init_device_mesh("cpu", (ranks,)), {}, []
    at_home, exchange, wait = attention.at_home, Trip.exchange, Trip.wait

    def home(selection):
        out, lse = at_home(selection)
        events.append("home")
        out.register_hook(lambda gradient: events.append("home"))
        return out, lse

    def leaving(*arguments):
        events.append("leave")
        return exchange(*arguments)

    def waiting(trip):
        events.append("wait")
        wait(trip)

    attention.at_home, Trip.exchange, Trip.wait = home, leaving, waiting
    for name in ("chunks", "queries"):
        arguments = _arguments(rank, ranks, exchange=name)
        for tensor in NAMES[:3]:
            arguments[tensor].requires_grad_()
        out = distributed.retrieve_attend(**arguments, mesh=mesh)
        events.append("backward")
        out.sum().backward()
        found[name] = events.copy()
        events.clear()
    attention.at_home, Trip.exchange, Trip.wait = at_home, exchange, wait
    return found


def lose_a_rank(rank: int, ranks: int) -> str:
    if rank == 1:
        return "gone"
    mesh = init_device_mesh("cpu", (ranks,))
    try:
        distributed.retrieve_attend(**_arguments(rank, ranks), mesh=mesh)
        return "no error"
    except RuntimeError as error:
        return f"error: {error}"
