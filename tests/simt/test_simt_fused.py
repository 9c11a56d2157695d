"""The CUDA side of fused_retrieve_attend in the simulator: all stages of a call, in its one workspace.

Indices and scores are the CPU operator's bits, attention is held to the reference's rule, and what the plan
says about launches is counted.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import harness
import numpy as np
import pytest
import sanitized
import torch
from cases import Case
from harness import SCHEDULES
from support import assert_no_worse

from resona_ext import reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ANY = SCHEDULES[0]
PATHS = ["query", "query_mma", "dense", "chunk"]  # of common/plan_attend_cuda.h
SIZES = ("batch", "queries", "context", "heads", "kv_heads", "head_dim")
SIZES += ("retrieval_heads", "retrieval_dim", "chunk_size", "top_k")


def name_of(dtype) -> str:
    return str(dtype).removeprefix("torch.")


def storage(x: torch.Tensor) -> np.ndarray:
    return (x if x.dtype in (torch.float32, torch.int32) else x.view(torch.int16)).numpy()


@dataclass
class Fused:
    """Arguments of the operator, random; `spoil` changes the embeddings of the context."""

    dtype: torch.dtype = torch.bfloat16
    embedding_dtype: torch.dtype | None = None  # None: dtype
    batch: int = 1
    queries: int = 50
    context: int = 61
    heads: int = 2
    kv_heads: int = 2
    head_dim: int = 16
    retrieval_heads: int = 1
    retrieval_dim: int = 24
    chunk_size: int = 4
    top_k: int = 3
    lengths: tuple[int, ...] = ()
    scored: bool = False
    sink: bool = False
    letters: int = 0  # of an alphabet that embeddings come from; 0: random
    spoil: object = None
    sms: int = 2
    part: int = 0  # batch entries at a time; 0: as the plan says
    apart: int = 0  # 1: search and attention are launches of their own, whatever the plan says
    range_heads: int = 0  # key/value heads of a list at a time; 0: as the plan says

    def __post_init__(self):
        torch.manual_seed(0)
        if self.lengths:
            self.batch, self.queries, self.context = 1, sum(self.lengths), sum(self.lengths)
        rows, tokens = (self.batch, self.queries), (self.batch, self.context)
        width = (self.retrieval_heads, self.retrieval_dim)
        context = torch.randn(*tokens, *width)
        if self.letters:
            context = torch.randn(self.letters, *width)[torch.randint(self.letters, tokens)]
        query = context.roll(3, dims=1)[:, self.context - self.queries :].clone()
        if self.spoil:
            self.spoil(context)
        embedding = self.embedding_dtype or self.dtype
        self.tensors = {
            "query": torch.randn(*rows, self.heads, self.head_dim).to(self.dtype),
            "key": torch.randn(*tokens, self.kv_heads, self.head_dim).to(self.dtype),
            "value": torch.randn(*tokens, self.kv_heads, self.head_dim).to(self.dtype),
            "query_embedding": query.to(embedding),
            "context_embedding": context.to(embedding),
            "score_scale": torch.rand(self.retrieval_heads) + 0.5 if self.scored else None,
            "sink": torch.randn(self.heads) if self.sink else None,
            "cu_seqlens": torch.tensor([0, *self.lengths]).cumsum(0).int()
            if self.lengths
            else None,
        }

    def operator(self) -> tuple[torch.Tensor, ...]:
        *rows, scale, sink, cu_seqlens = self.tensors.values()
        return torch.ops.resona.fused_retrieve_attend(
            *rows, self.chunk_size, self.top_k, scale, sink, cu_seqlens
        )

    def attention(self, dtype, indices, scores) -> tuple[torch.Tensor, torch.Tensor]:
        t = self.tensors
        bias, rows = None, [t[name].to(dtype) for name in ("query", "key", "value")]
        if self.scored:
            bias = scores.to(t["score_scale"].dtype if dtype != torch.float64 else dtype)
            bias = torch.where(indices >= 0, bias * t["score_scale"][:, None], 0.0)
        sink = None if t["sink"] is None else t["sink"].to(dtype)
        return reference.attend(*rows, indices, self.chunk_size, bias, sink, t["cu_seqlens"])

    def case(self) -> Case:
        inputs = {name: storage(x) for name, x in self.tensors.items() if x is not None}
        scalars = {
            name: getattr(self, name) for name in (*SIZES, "sms", "part", "apart", "range_heads")
        }
        scalars |= {"sequences": len(self.lengths), "scale": repr(self.head_dim**-0.5)}
        embedding = self.tensors["context_embedding"].dtype
        scalars |= {"dtype": name_of(self.dtype), "embedding_dtype": name_of(embedding)}
        out, lse, self.indices, self.scores = self.operator()
        plan = plan_of(inputs, scalars)
        return Case(
            name=f"fused {scalars} {self.lengths or ''} letters={self.letters}",
            kernel="fused",
            inputs=inputs,
            expected={
                "indices": storage(self.indices),
                "scores": storage(self.scores),
                "launches": np.array([plan.launches]),
            },
            workspace={
                "out": np.empty_like(storage(out)),
                "lse": np.empty_like(storage(lse)),
                "workspace": np.empty(max(1, plan.workspace_bytes), np.uint8),
            },
            scalars=scalars,
            dtypes={"out": name_of(self.dtype)},
        )

    def check(self, sim, schedule=ANY, **options) -> Case:
        """Returns a case that expects the very bits of this run."""
        case = self.case()
        got = case.check(sim, schedule, **options)
        case.expected |= {name: got[name] for name in ("out", "lse")}
        for name in ("out", "lse"):
            del case.workspace[name]
        if self.queries and self.batch:
            results = torch.from_numpy(got["out"]).view(self.dtype), torch.from_numpy(got["lse"])
            plain = self.attention(self.dtype, self.indices, self.scores)
            truth = self.attention(torch.float64, self.indices, self.scores)
            for name, *values in zip(("out", "lse"), results, plain, truth, strict=True):
                assert_no_worse(f"{case.name}: {name}", *values)
        return case


@dataclass
class Plan:
    workspace_bytes: int
    launches: int
    path: str
    attends: bool  # the search does, in its own launch


def plan_of(inputs, scalars) -> Plan:
    facts = np.zeros(4, np.int64)
    harness.build("plain").run("fused_plan", inputs, {"facts": facts}, **scalars)
    return Plan(int(facts[0]), int(facts[1]), PATHS[facts[2]], bool(facts[3]))


# Fields, and the launches that they must not exceed.
PROBLEMS = {
    "query": (dict(chunk_size=2, top_k=2), 3),
    "query, one chunk": (dict(chunk_size=2, top_k=1, queries=200, context=200, head_dim=40), 3),
    "query_mma": (dict(chunk_size=4, top_k=9, head_dim=64, heads=4), 3),
    "dense": (dict(chunk_size=4, top_k=6, head_dim=40, queries=80, context=100), 3),
    "chunk": (dict(chunk_size=8, top_k=4, head_dim=40, queries=150, context=150, scored=True), 5),
    "chunk, final": (dict(chunk_size=20, top_k=1, queries=230, context=230, scored=True), 4),
    "batch, heads": (
        dict(batch=2, heads=8, kv_heads=4, retrieval_heads=2, top_k=4, scored=True, sink=True),
        3,
    ),
    "parts of a batch": (
        dict(batch=3, part=2, heads=4, retrieval_heads=2, scored=True, sink=True),
        6,
    ),
    "packed": (dict(lengths=(40, 0, 3, 47, 9)), 4),
    "packed, odd rows": (dict(lengths=(30, 30), retrieval_dim=37, head_dim=20, sink=True), 4),
    "packed, chunk": (
        dict(lengths=(90, 0, 3, 70), chunk_size=8, top_k=4, head_dim=40, scored=True),
        6,
    ),
    "splits": (dict(chunk_size=1, queries=20, context=1100, top_k=2, sms=4), 3),
    "splits and passes": (dict(chunk_size=1, queries=10, context=1100, top_k=20, sms=4), 3),
    "long rows": (dict(retrieval_dim=200, top_k=8, chunk_size=1), 3),
    "other embeddings": (dict(embedding_dtype=torch.float32), 3),
    "ties": (dict(letters=2, queries=150, context=300, chunk_size=2, top_k=5), 3),
    "no chunk": (dict(queries=3, context=3, chunk_size=5), 2),
    "no query": (dict(queries=0), 2),
    "no batch": (dict(batch=0), 0),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("fields, most", PROBLEMS.values(), ids=PROBLEMS)
def test_equals_the_cpu_in_so_many_launches(plain, dtype, fields, most):
    case = Fused(dtype, **fields).check(plain)
    assert case.expected["launches"][0] <= most


def test_those_problems_take_every_path():
    taken = {
        plan_of(case.inputs, case.scalars).path
        for fields, _ in PROBLEMS.values()
        for case in [Fused(torch.bfloat16, **fields).case()]
    }
    assert taken == set(PATHS)


def some_nan(context: torch.Tensor) -> None:
    context[:, 10:12, :, 3] = math.nan


def mostly_bad(context: torch.Tensor) -> None:
    """Fewer chunks without a NaN than slots; infinities of both signs in one chunk."""
    context[:, ::3, :, 0] = math.inf
    context[:, 1::5, :, 1] = -math.inf
    context[:, 2::9] = 0


def huge(context: torch.Tensor) -> None:
    """Finite in float32, but their sum is not."""
    context[:, ::4] = 3e38


def tiny(context: torch.Tensor) -> None:
    context *= 1e-38


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("spoil", [some_nan, mostly_bad, huge, tiny], ids=lambda f: f.__name__)
def test_contexts_whose_chunks_have_no_unit_norm(plain, dtype, spoil):
    """There is no look at the chunks' norms: NaN must be seen by what it does not leave behind."""
    for fields in (
        dict(chunk_size=2, top_k=2),
        dict(chunk_size=1, top_k=8, context=150),
        dict(chunk_size=2, top_k=5, lengths=(40, 0, 61)),
        dict(chunk_size=1, top_k=20, context=90),
    ):
        Fused(dtype, spoil=spoil, **fields).check(plain)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_some_heads_at_a_time_share_what_the_search_counted(plain, dtype):
    fields = PROBLEMS["chunk"][0] | dict(heads=10, kv_heads=5, sink=True)
    case = Fused(dtype, **fields).check(plain)
    assert case.expected["launches"] == 5  # one of them for the index
    for heads, launches in ((1, 13), (2, 9), (4, 7)):
        case.scalars["range_heads"], case.expected["launches"][:] = heads, launches
        case.check(plain, ANY)


# One sequence of some hundred queries on one multiprocessor: enough tiles for the search to attend itself.
TINY = dict(queries=150, context=150, chunk_size=2, top_k=2, sms=1)
TOGETHER = {
    "two chunks": TINY,
    "one chunk, 16 lanes": {**TINY, "chunk_size": 4, "top_k": 1, "head_dim": 72},
    "single tokens": {**TINY, "chunk_size": 1, "context": 163},
    "scored, sink": {**TINY, "head_dim": 40, "scored": True, "sink": True},
    "heads": {
        **TINY,
        **dict(queries=20, context=23, batch=2, heads=12, kv_heads=4, retrieval_heads=2),
        **dict(scored=True, sink=True),
    },
    "packed": {**TINY, "lengths": (90, 0, 1, 3, 70), "scored": True},
    "packed heads": {
        **TINY,
        **dict(lengths=(7, 60, 30), heads=4, kv_heads=4, retrieval_heads=2),
    },
    "parts of a batch": {
        **TINY,
        "queries": 5,
        "batch": 5,
        "part": 2,
        "sink": True,
    },  # the last: apart
    "ties": {**TINY, "letters": 2, "scored": True, "retrieval_dim": 37},
    "spoilt": {**TINY, "spoil": mostly_bad, "head_dim": 128},
    "no chunk": {**TINY, "chunk_size": 4, "top_k": 1, "lengths": (3,) * 50},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("fields", TOGETHER.values(), ids=TOGETHER)
def test_search_that_attends_gives_the_bits_of_two_launches(plain, dtype, fields):
    """Results are held to the CPU and to the reference, then to those of the same call in more launches."""
    problem = Fused(dtype, **fields)
    problem.tensors["query_embedding"][:, ::7] = 0  # they retrieve the first chunks
    case = problem.check(plain)
    for schedule in SCHEDULES[3::8]:
        case.check(plain, schedule)
    together = plan_of(case.inputs, case.scalars)
    case.scalars["apart"] = 1
    apart = plan_of(case.inputs, case.scalars)
    assert together.attends and not apart.attends and together.launches < apart.launches
    case.expected["launches"][:] = apart.launches
    case.check(plain, ANY)


@pytest.mark.parametrize("wrong", [[0, 90, 10, 161], [-7, 20, 2**31 - 1, 5], [5, 5, 5, 5]])
@pytest.mark.parametrize("name", ["query", "query_mma", "dense", "chunk", "search attends"])
def test_wrong_cu_seqlens_reach_no_foreign_memory(race, name, wrong):
    """The host never looks at them; the race build reports any access out of bounds."""
    fields = TINY if name == "search attends" else PROBLEMS[name][0]
    case = Fused(
        torch.float16, **{**fields, "lengths": (60, 41, 60), "scored": name != "dense"}
    ).case()
    plan = plan_of(case.inputs, case.scalars)
    assert plan.attends if fields is TINY else plan.path == name
    case.inputs["cu_seqlens"] = np.array(wrong, np.int32)
    case.workspace |= {name: case.expected.pop(name) for name in ("indices", "scores")}
    case.check(race, ANY)


def covering() -> list[Fused]:
    names = ("query", "chunk", "packed", "ties", "splits")
    fields = [PROBLEMS[name][0] for name in names] + [TOGETHER["heads"], TOGETHER["ties"]]
    return [Fused(dtype, **f) for f, dtype in zip(fields, itertools.cycle(DTYPES), strict=False)]


def test_no_race_under_any_schedule(plain, race):
    for problem in covering():
        case = problem.check(plain)
        for schedule in SCHEDULES[::5]:
            case.check(race, schedule)


def test_sanitizers(plain):
    sanitized.check([(problem.check(plain), SCHEDULES[::7]) for problem in covering()])
