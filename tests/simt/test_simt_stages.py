"""Whole stages in the simulator: plans, workspaces and launches as they are, against the CPU operators.

The kernels have tests of their own; here the host code of the .cu files is what may be wrong.
"""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from cases import Case
from harness import SCHEDULES

import resona_ext  # noqa: F401  (registers torch.ops.resona)

ops = torch.ops.resona
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


@dataclass
class Problem:
    dtype: torch.dtype = F32
    batch: int = 1
    queries: int = 50
    context: int = 61
    heads: int = 1
    dim: int = 16
    chunk_size: int = 4
    top_k: int = 3
    lengths: tuple = ()
    batch_part: int = 0


PROBLEMS = {
    "plain": Problem(),
    "batch": Problem(BF16, batch=2, heads=2, dim=40),
    "odd rows": Problem(F16, batch=2, queries=30, heads=2, dim=37),
    "parts": Problem(batch=3, queries=30, heads=2, dim=40, batch_part=1),
    "uneven parts": Problem(batch=3, queries=30, dim=24, batch_part=2),
    "two passes of the sort": Problem(batch=2, queries=20, context=2100, chunk_size=1),
    "packed": Problem(queries=60, context=60, heads=2, dim=24, lengths=(17, 0, 3, 40)),
    "packed, odd rows": Problem(BF16, queries=60, context=60, dim=12, lengths=(30, 30)),
    "no chunk": Problem(queries=3, context=3, chunk_size=5),
    "no query": Problem(queries=0),
    "no batch": Problem(batch=0),
}


def storage(x: torch.Tensor) -> np.ndarray:
    return (x.view(torch.int16) if x.dtype in (F16, BF16) else x).numpy()


def case(kernel: str, p: Problem, inputs: dict, expected: dict) -> Case:
    arrays = {name: storage(t) for name, t in inputs.items() if t is not None}
    fields = ("batch", "queries", "context", "heads", "dim", "chunk_size", "top_k", "batch_part")
    dtype = str(p.dtype).removeprefix("torch.")
    return Case(
        name=f"{kernel} {p}",
        kernel=kernel,
        inputs=arrays,
        expected={name: storage(t) for name, t in expected.items()},
        workspace={"workspace": np.empty(1 << 18, np.uint8)},
        dtypes={name: dtype for name in expected},
        scalars={name: getattr(p, name) for name in fields}
        | {"dtype": dtype, "sequences": len(p.lengths), "workspace_bytes": 1 << 18},
        near={
            name: np.full(t.shape, 1e-5 if p.dtype == F32 else 2e-2, np.float32)
            for name, t in expected.items()
            if name.endswith("gradient")
        },
    )


def cases_of(p: Problem) -> list[Case]:
    torch.manual_seed(0)
    cu_seqlens = torch.tensor([0, *p.lengths]).cumsum(0).int() if p.lengths else None
    context = torch.randn(p.batch, p.context, p.heads, p.dim).to(p.dtype)
    query = torch.randn(p.batch, p.queries, p.heads, p.dim).to(p.dtype)
    chunks = ops.pool_chunks(context, p.chunk_size, cu_seqlens)
    indices, scores = ops.retrieve(query, chunks, p.chunk_size, p.top_k, p.context, cu_seqlens)
    chunk_gradient, score_gradient = torch.randn_like(chunks), torch.randn_like(scores)
    context_gradient = ops._pool_chunks_backward(chunk_gradient, context, p.chunk_size, cu_seqlens)
    gradients = ops._retrieve_backward(
        score_gradient, indices, query, chunks, p.chunk_size, p.context, cu_seqlens
    )
    packed = {"cu_seqlens": cu_seqlens}
    return [
        case("stage_pool", p, {"context": context, **packed}, {"chunks": chunks}),
        case(
            "stage_pool_backward",
            p,
            {"context": context, "chunk_gradient": chunk_gradient, **packed},
            {"context_gradient": context_gradient},
        ),
        case(
            "stage_retrieve_backward",
            p,
            {"query": query, "chunks": chunks, "indices": indices, **packed}
            | {"score_gradient": score_gradient},
            dict(zip(("query_gradient", "chunk_gradient"), gradients, strict=True)),
        ),
    ]


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
def test_equals_the_cpu(plain, problem):
    for stage in cases_of(problem):
        stage.check(plain, SCHEDULES[0])


@pytest.mark.parametrize("name", ["batch", "parts", "packed"])
def test_no_race_under_any_schedule(race, name):
    for stage in cases_of(PROBLEMS[name]):
        for schedule in SCHEDULES[::3]:
            stage.check(race, schedule)
