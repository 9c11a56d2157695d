"""The CUDA side of the two-level search in the simulator: the bits of the CPU operator."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from cases import Case
from harness import SCHEDULES

import resona_ext  # noqa: F401  (registers torch.ops.resona)

ops = torch.ops.resona
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
WORKSPACE = 1 << 18


@dataclass
class Problem:
    dtype: torch.dtype = F32
    batch: int = 1
    queries: int = 60
    context: int = 61
    heads: int = 1
    dim: int = 16
    chunk_size: int = 1
    top_k: int = 3
    superchunk_size: int = 5
    probes: int = 2
    lengths: tuple = ()
    letters: int = 0  # of an alphabet: most scores tie
    part_queries: int = 0  # parts of one batch entry, head and this many queries

    @property
    def sizes(self) -> dict[str, int]:
        return {"superchunk_size": self.superchunk_size, "probes": self.probes}


PROBLEMS = {
    "plain": Problem(),
    "batch": Problem(BF16, batch=2, heads=2, dim=40),
    "odd rows": Problem(F16, batch=2, queries=30, heads=2, dim=37, chunk_size=2, context=80),
    "ties": Problem(BF16, queries=70, context=90, letters=3, top_k=8),
    "more slots than lanes": Problem(
        queries=20, context=150, top_k=70, superchunk_size=33, letters=4
    ),
    "more slots than chunks searched": Problem(top_k=40, probes=1),
    "many probes": Problem(BF16, queries=40, context=120, superchunk_size=3, probes=20),
    "packed": Problem(queries=80, context=80, heads=2, dim=24, lengths=(17, 0, 3, 60)),
    "packed, odd rows": Problem(BF16, queries=80, context=80, dim=12, lengths=(40, 40)),
    "parts": Problem(BF16, batch=2, heads=2, dim=24, part_queries=23),
    "parts, packed": Problem(queries=60, context=60, heads=2, lengths=(17, 43), part_queries=1),
    "exact": Problem(superchunk_size=9, probes=9),
    "superchunks beyond the context": Problem(superchunk_size=1000, probes=1),
    "no chunk": Problem(queries=3, context=3, chunk_size=5),
    "no query": Problem(queries=0),
    "no batch": Problem(batch=0),
}


def storage(x: torch.Tensor) -> np.ndarray:
    return (x.view(torch.int16) if x.dtype in (F16, BF16) else x).numpy()


def case(p: Problem) -> Case:
    torch.manual_seed(0)
    cu_seqlens = torch.tensor([0, *p.lengths]).cumsum(0).int() if p.lengths else None
    alphabet = torch.randn(p.letters or 1, p.heads, p.dim)

    def rows(count: int) -> torch.Tensor:
        if p.letters:
            return alphabet[torch.randint(p.letters, (p.batch, count))].to(p.dtype)
        return torch.randn(p.batch, count, p.heads, p.dim).to(p.dtype)

    query, chunks = rows(p.queries), ops.pool_chunks(rows(p.context), p.chunk_size, cu_seqlens)
    search = (query, chunks, p.chunk_size, p.top_k, p.context, cu_seqlens)
    indices, scores = ops.retrieve_two_level(*search, **p.sizes)
    inputs = {"query": query, "chunks": chunks, "cu_seqlens": cu_seqlens}
    fields = ("batch", "queries", "context", "heads", "dim", "chunk_size", "top_k", "part_queries")
    return Case(
        name=str(p),
        kernel="stage_two_level",
        inputs={name: storage(t) for name, t in inputs.items() if t is not None},
        expected={"indices": indices.numpy(), "scores": scores.numpy()},
        workspace={"workspace": np.empty(WORKSPACE, np.uint8)},
        scalars={name: getattr(p, name) for name in fields}
        | p.sizes
        | {
            "dtype": str(p.dtype).removeprefix("torch."),
            "sequences": len(p.lengths),
            "workspace_bytes": WORKSPACE,
        },
    )


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
def test_equals_the_cpu(plain, problem):
    case(problem).check(plain, SCHEDULES[0])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite(plain, bad):
    p = Problem(top_k=9)
    given = case(p)
    query, chunks = (torch.from_numpy(given.inputs[name].copy()) for name in ("query", "chunks"))
    query[:, 30, :, 1] = chunks[:, 20:26, :, 3] = bad
    indices, scores = ops.retrieve_two_level(query, chunks, 1, p.top_k, p.context, **p.sizes)
    given.inputs |= {"query": query.numpy(), "chunks": chunks.numpy()}
    given.expected = {"indices": indices.numpy(), "scores": scores.numpy()}
    given.check(plain, SCHEDULES[0])


@pytest.mark.parametrize("name", ["batch", "packed", "parts"])
def test_no_race_under_any_schedule(race, name):
    given = case(PROBLEMS[name])
    for schedule in SCHEDULES[::4]:
        given.check(race, schedule)
