"""The CUDA side of attend in the simulator, from the problem on: plan, launches and kernels of every path."""

import pytest
from attend_cases import ANY, DTYPES, PATHS, Attention, attend_case, name_of, poison
from harness import SCHEDULES


def problem(path: str, dtype, **changes) -> Attention:
    """The smallest that takes the path."""
    fields = {
        "query": dict(chunk_size=2, top_k=2, head_dim=24),
        "query_mma": dict(chunk_size=4, top_k=9, head_dim=64, heads=4),
        "dense": dict(chunk_size=4, top_k=6, head_dim=40, queries=80, context=100, distinct=True),
        "chunk": dict(chunk_size=8, top_k=4, head_dim=40, queries=60, context=70),
    }[path]
    return Attention(dtype=dtype, **{**fields, **changes})


def paths_of(dtype) -> list[str]:
    return [path for path in PATHS if dtype.itemsize == 2 or path in ("query", "chunk")]


EVERY = [(path, dtype) for dtype in DTYPES for path in paths_of(dtype)]
every_path = pytest.mark.parametrize(
    "path, dtype", EVERY, ids=[f"{path}-{name_of(dtype)}" for path, dtype in EVERY]
)


@every_path
def test_equals_the_reference(plain, path, dtype):
    extras = {"sink": True} if path == "dense" else {"bias": True, "bias_scale": True, "sink": True}
    for changes in (
        {},
        extras,
        {"batch": 2, "heads": 8, "kv_heads": 4, "retrieval_heads": 2},
        {"lengths": [70, 0, 5, 66]},
    ):
        p = problem(path, dtype, **changes)
        poison(p)
        p.check(plain, attend_case(p, path))


@every_path
def test_every_schedule_gives_the_same(plain, race, path, dtype):
    p = problem(path, dtype, lengths=[64, 0, 40])
    case = p.check(plain, attend_case(p, path))
    for schedule in SCHEDULES[::5]:
        case.check(race, schedule)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize(
    "changes", [{"batch": 2}, {"lengths": [90, 0, 3, 47]}], ids=["batch", "packed"]
)
def test_ranges_of_queries_change_nothing(plain, dtype, changes):
    p = problem("chunk", dtype, **changes)
    case = p.check(plain, attend_case(p, "chunk"))
    for queries in (64, 32, 7):
        ranged = attend_case(p, "chunk", range=queries)
        ranged.expected = case.expected
        ranged.check(plain, ANY)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("retrieval_heads", [1, 2])
def test_some_heads_at_a_time_change_nothing(plain, dtype, retrieval_heads):
    """Three or six key/value heads share a list; two query heads each."""
    sizes = dict(heads=12, kv_heads=6, retrieval_heads=retrieval_heads, queries=40, context=70)
    p = problem("chunk", dtype, batch=2, bias=True, bias_scale=True, sink=True, **sizes)
    case = p.check(plain, attend_case(p, "chunk"))
    for heads, queries in ((1, 0), (2, 0), (2, 32), (6 // retrieval_heads, 32)):
        parts = attend_case(p, "chunk", range=queries, range_heads=heads)
        parts.expected = case.expected
        parts.check(plain, ANY)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_one_chunk_per_query_needs_no_merge(plain, dtype):
    for changes in ({}, {"sink": True, "bias": True}, {"chunk_size": 70}):
        fields = {"top_k": 1, "chunk_size": 20, "queries": 230, "context": 230, **changes}
        p = problem("chunk", dtype, **fields)
        p.check(plain, attend_case(p, "chunk"))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_nothing_to_attend_to(plain, dtype):
    for changes in ({"queries": 0}, {"context": 12, "chunk_size": 20}, {"batch": 0}):
        p = Attention(dtype=dtype, sink=True, **changes)
        p.check(plain, attend_case(p, "query"))
