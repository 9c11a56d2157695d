"""The CUDA side of retrieve in the simulator: the bits of torch.ops.resona.retrieve on the CPU."""

import itertools
import math
import re

import harness
import numpy as np
import planted
import pytest
import sanitized
import torch
from cases import Case
from harness import SCHEDULES
from hypothesis import given, settings
from hypothesis import strategies as st

import resona_ext  # noqa: F401  (registers torch.ops.resona)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ANY = SCHEDULES[0]


def name_of(dtype) -> str:
    return str(dtype).removeprefix("torch.")


def storage(x: torch.Tensor) -> np.ndarray:
    """The same memory, strides included; numpy has no bfloat16."""
    return (x if x.dtype == torch.float32 else x.view(torch.int16)).numpy()


def strides(name: str, x: torch.Tensor) -> dict[str, int]:
    return {
        f"{name}_{axis}_stride": x.stride(i) for i, axis in enumerate(("batch", "token", "head"))
    }


def plan_facts(inputs, scalars) -> list[int]:
    """Bytes of workspace, whether queries are pinned, slots per lane."""
    facts = np.zeros(3, np.int64)
    harness.build("plain").run("search_plan", inputs, {"facts": facts}, **scalars)
    return facts.tolist()


def search_case(
    query, context, chunk_size, top_k, lengths=None, name="search", chunks=None, sms=1, **plan
) -> Case:
    """query [B, T, R, E] against the pooled chunks of context [B, L, R, E], or against `chunks`.

    `plan` replaces what the plan for a device of `sms` multiprocessors says.
    """
    batch, queries, heads, dim = query.shape
    context_length = context.shape[1]
    cu_seqlens = None if lengths is None else torch.tensor([0, *lengths]).cumsum(0).int()
    if chunks is None:
        chunks = torch.ops.resona.pool_chunks(context, chunk_size, cu_seqlens)
    indices, scores = torch.ops.resona.retrieve(
        query, chunks, chunk_size, top_k, context_length, cu_seqlens
    )
    inputs = {"query": storage(query), "chunk": storage(chunks)}
    if cu_seqlens is not None:
        inputs["cu_seqlens"] = cu_seqlens.numpy()
    scalars = {
        **strides("query", query),
        **strides("chunk", chunks),
        **{"batch": batch, "queries": queries, "heads": heads, "dim": dim},
        **{"context": context_length, "chunk_size": chunk_size, "top_k": top_k},
        **{"dtype": name_of(query.dtype), "sequences": len(lengths or []), "sms": sms, **plan},
    }
    facts = plan_facts(inputs, scalars)
    shape = "x".join(map(str, query.shape))
    return Case(
        name=f"{name} {name_of(query.dtype)} {shape} S={chunk_size} k={top_k} {lengths or ''} {plan or ''}",
        kernel="search",
        inputs=inputs,
        expected={"indices": indices.numpy(), "scores": scores.numpy()},
        workspace={"workspace": np.empty(facts[0], np.uint8)},
        scalars=scalars,
    )


def random(*shape, dtype) -> torch.Tensor:
    return torch.randn(*shape).to(dtype)


def letters(count, batch, length, heads, dim, dtype) -> torch.Tensor:
    """Embeddings of a text over an alphabet of `count` letters: most scores have an equal."""
    alphabet = torch.randn(count, heads, dim)
    return alphabet[torch.randint(count, (batch, length))].to(dtype)


def tying(*shape, dtype) -> torch.Tensor:
    return letters(4, *shape, dtype)


def all_equal(*shape, dtype) -> torch.Tensor:
    return letters(1, *shape, dtype)


def permuted(batch, length, heads, dim, dtype) -> torch.Tensor:
    """A stretch of tokens again and again in other orders: float sums differ in their last bits."""
    stretch = torch.randn(16, heads, dim)
    order = torch.cat([torch.randperm(16) for _ in range(-(-length // 16))])[:length]
    return stretch[order].expand(batch, length, heads, dim).to(dtype)


def zipf(batch, length, heads, dim, dtype) -> torch.Tensor:
    words = (1 / torch.rand(batch, length)).long().clamp(max=50) - 1
    return torch.randn(50, heads, dim)[words].to(dtype)


def nearly_tying(queries, count, dim, dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and chunks whose exact products differ by less than the error of quick ones."""
    query, chunks = torch.randn(1, queries, 1, dim), torch.randn(1, count, 1, dim)
    query[..., dim // 2 :] = 2.0**-24
    chunks[..., : dim // 2] = torch.randn(dim // 2)
    return query.to(dtype), chunks.to(dtype)


DATA = {f.__name__: f for f in (random, tying, all_equal, permuted, zipf)}


SIZES = [1, 2, 3, 5, 8, 16, 37, 64, 128]
TOP_K = [1, 2, 4, 8, 16, 24]
DIMS = [16, 40, 64, 128, 256, 768]


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("chunk_size", SIZES)
def test_equals_the_cpu(plain, dtype, dim, chunk_size):
    """Random and tying data; queries at the end of a ragged context, and packed sequences."""
    length = 30 * chunk_size + chunk_size // 2
    packed = (
        [2 * chunk_size, 9 * chunk_size + 1, 0, 1] if chunk_size < 16 else [2 * chunk_size + 1, 5]
    )
    for data in (random, tying):
        context = data(1, length, 1, dim, dtype=dtype)
        query = data(1, 20, 1, dim, dtype=dtype)
        tokens = data(1, sum(packed), 1, dim, dtype=dtype)
        for top_k in TOP_K:
            search_case(query, context, chunk_size, top_k, name=data.__name__).check(plain, ANY)
            search_case(tokens, tokens.flip(1), chunk_size, top_k, packed, data.__name__).check(
                plain, ANY
            )


def test_those_problems_reach_every_instance():
    """The instances that the plan picks for them are all that search.cuh has."""
    text = (harness.ROOT / "csrc/cuda/search.cuh").read_text()
    listed = set(re.findall(r"X\((\w+), (true|false), (\d)\)", text))
    elements = {torch.float32: "float", torch.float16: "Half", torch.bfloat16: "BFloat16"}
    reached = set()
    for dtype, dim, top_k in itertools.product(DTYPES, DIMS, TOP_K):
        context = random(1, 30, 1, dim, dtype=dtype)
        case = search_case(context, context, 1, top_k)
        _, pinned, per_lane = plan_facts(case.inputs, case.scalars)
        reached.add((elements[dtype], "true" if pinned else "false", str(per_lane)))
    assert reached == listed


@pytest.mark.parametrize("data", DATA.values(), ids=DATA)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_long_contexts(plain, data, dtype):
    """Several steps of 64 chunks; products as exact as can be, and cut off as hardware does."""
    for chunk_size, top_k, dim, plan in (
        (1, 8, 24, {}),
        (2, 16, 136, {}),
        (1, 2, 40, {"splits": 3}),
        (1, 40, 16, {"splits": 2}),
    ):
        x = data(1, 200 * chunk_size, 1, dim, dtype=dtype)
        case = search_case(x[:, -40:], x, chunk_size, top_k, name=data.__name__, **plan)
        for truncated in (False, True):
            case.check(plain, ANY, truncated_products=truncated)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_batch_heads_windows(plain, dtype):
    """Tiles of several batch entries and heads, in one launch and in windows of one or two tiles."""
    query, context = random(3, 140, 2, 40, dtype=dtype), tying(3, 160, 2, 40, dtype=dtype)
    for window in (12, 2, 1):
        search_case(query, context, 3, 5, window_tiles=window).check(plain, ANY)
    search_case(query, context, 3, 30, window_tiles=5, splits=2).check(plain, ANY)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_strides_and_alignment(plain, dtype):
    wide = random(2, 60, 3, 100, dtype=dtype)
    views = {
        "columns": wide[..., 16:56],
        "unaligned rows": wide[..., 1:41],
        "every other token": wide[:, ::2, :, :48],
        "heads first": wide.transpose(1, 2).contiguous().transpose(1, 2),
        "one head for all": wide[:, :, :1, :64].expand(2, 60, 4, 64),
    }
    for name, view in views.items():
        search_case(view, view.contiguous(), 2, 3, name=name).check(plain, ANY)
        chunks = view[:, : view.shape[1] // 2]
        search_case(view, view, 2, 3, name=f"chunks, {name}", chunks=chunks).check(plain, ANY)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_hard_values(plain, dtype):
    query, chunks = random(1, 64, 1, 40, dtype=dtype), random(1, 32, 1, 40, dtype=dtype)
    finite = torch.finfo(dtype)
    query[:, 10:14] = 0
    query[:, 20] *= 1e-4
    query[:, 21:23] = finite.max
    query[:, 23:25] = finite.tiny / 4
    query[:, 25, :, 3] = math.nan
    query[:, 26, :, 3] = math.inf
    query[:, 27:30] = -0.0
    for name, change in {
        "as they are": lambda c: c,
        "nan": lambda c: c.index_fill(1, torch.tensor([3, 9]), math.nan),
        "inf": lambda c: c.index_fill(1, torch.tensor([4]), math.inf),
        "zero": lambda c: c.index_fill(1, torch.tensor([0, 5, 6]), 0),
        "large": lambda c: c * (finite.max / 1e2),
        "small": lambda c: c * finite.tiny,
        "one large": lambda c: c.index_fill(1, torch.tensor([7]), finite.max),
    }.items():
        for top_k in (1, 6, 20):
            case = search_case(query, query, 2, top_k, name=name, chunks=change(chunks).to(dtype))
            case.check(plain, ANY)


def test_no_chunk_no_query(plain):
    for dtype in DTYPES:
        x = random(2, 3, 1, 8, dtype=dtype)
        search_case(x, x, 5, 2).check(plain, ANY)  # L < S
        search_case(x, x, 1, 2, name="one chunk").check(plain, ANY)
        search_case(x[:1], x[:1], 2, 9, [0, 3, 0], name="packed").check(plain, ANY)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_exact_path_for_all_rows(plain, dtype):
    x = tying(1, 150, 2, 24, dtype=dtype)
    search_case(x, x, 2, 7, candidates=0).check(plain, ANY)
    search_case(x, x, 2, 7, [80, 0, 70], candidates=0, exact_blocks=3).check(plain, ANY)
    search_case(x, x, 1, 300, name="k above what bags hold").check(plain, ANY)


NO_SCAN = ("search_finish.cuh", "i < uncertain; ++i) scan_row", "i < 0 * uncertain; ++i) scan_row")


@pytest.fixture(scope="module")
def unscanned():
    """Leaves uncertain rows as their candidates make them."""
    return harness.mutant("plain", "search.cpp", *NO_SCAN)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("top_k", [1, 2, 8, 16, 40])
def test_random_rows_are_certain(unscanned, dtype, top_k):
    x = random(1, 300, 1, 128, dtype=dtype)
    for truncated in (False, True):
        case = search_case(x[:, -40:], x, 1, top_k)
        case.check(unscanned, ANY, truncated_products=truncated)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_near_ties_are_not_certain(plain, unscanned, dtype):
    """Only canonical scores of all chunks tell who comes first, and they are asked for."""
    query, chunks = nearly_tying(40, 200, 64, dtype)
    context = torch.empty(1, 200, 1, 64, dtype=dtype)
    for truncated in (False, True):
        case = search_case(query, context, 1, 2, chunks=chunks)
        case.check(plain, ANY, truncated_products=truncated)
        with pytest.raises(AssertionError, match="differ"):
            case.check(unscanned, ANY, truncated_products=truncated)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_uncertain_rows_of_many_chunks(plain, dtype):
    """Chunks come 256 at a time, in orders that keep few, and that replace all that were kept."""
    scale = torch.linspace(1, 2, 600).view(1, 600, 1, 1)
    unit = torch.nn.functional.normalize(torch.randn(1, 1, 1, 16), dim=-1)
    query = unit.expand(1, 3, 1, 16).to(dtype)
    for top_k in (1, 16, 30, 230):
        for chunks in (unit * scale, unit * scale.flip(1), unit * scale[:, torch.randperm(600)]):
            chunks = chunks.to(dtype)
            chunks[:, ::7, :, 2] = math.nan
            context = torch.empty(1, 600, 1, 16, dtype=dtype)
            search_case(query, context, 1, top_k, chunks=chunks).check(plain, ANY)


@pytest.mark.parametrize("cu_seqlens", [[0, 90, 10, 60], [-7, 20, 2**31 - 1, 5], [61, 0, 61, 0]])
def test_wrong_cu_seqlens_reach_no_foreign_memory(plain, race, cu_seqlens):
    """The host never looks at them; the race build reports any access out of bounds."""
    x = random(1, 61, 1, 8, dtype=torch.float16)
    case = search_case(x, x, 4, 3, [61, 0, 0])
    case.inputs["cu_seqlens"] = np.array(cu_seqlens, np.int32)
    results, case.expected = case.expected, {}
    case.workspace |= {name: np.empty_like(array) for name, array in results.items()}
    for sim in (plain, race):
        case.check(sim, ANY)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    dtype=st.sampled_from(DTYPES),
    data=st.sampled_from(list(DATA.values())),
    shape=st.tuples(*(st.integers(1, most) for most in (2, 60, 2, 150))),
    queries=st.integers(1, 60),
    chunk_size=st.integers(1, 6),
    top_k=st.integers(1, 30),
    splits=st.integers(1, 3),
    cuts=st.lists(st.integers(0, 60), max_size=3),
    schedule=st.sampled_from(SCHEDULES),
)
def test_any_problem(dtype, data, shape, queries, chunk_size, top_k, splits, cuts, schedule):
    context, lengths = data(*shape, dtype=dtype), None
    length = shape[1]
    query = context[:, length - min(queries, length) :]
    if cuts:
        context = query = context[:1]
        borders = [0, *sorted(min(cut, length) for cut in cuts), length]
        lengths = np.diff(borders).tolist()
    case = search_case(query, context, chunk_size, top_k, lengths, splits=splits)
    for build in ("plain", "race"):
        case.check(harness.build(build), schedule)


def covering() -> list[Case]:
    """Every instance once or more, with passes, splits, windows and packed sequences, small."""
    cases = []
    for dtype in DTYPES:
        for (top_k, dim), lengths in itertools.product(
            ((2, 24), (8, 200), (12, 100), (20, 40)), (None, [9, 0, 24])
        ):
            x = tying(1, 33, 1, dim, dtype=dtype)
            plan = {"splits": 2} if dim == 24 else {"window_tiles": 1}
            cases.append(search_case(x, x, 1, top_k, lengths, name="covering", **plan))
    return cases


def test_every_schedule_gives_the_same(plain):
    for case in covering():
        for schedule in SCHEDULES:
            case.check(plain, schedule)


def test_no_race_under_any_schedule(race):
    for case in covering():
        for schedule in SCHEDULES[::2]:
            case.check(race, schedule)


def test_sanitizers():
    sanitized.check([(case, SCHEDULES[::5]) for case in covering()])


DROPPED = {
    "a stage has landed": ("search_tile.cuh", "ptx::cp_async_wait_group<kStages - 2>();", ""),
    "a stage is free": ("search_tile.cuh", "__syncthreads();  // the stage has landed", "//"),
    "queries are read": ("search_tile.cuh", "__syncthreads();  // the first chunks take", "//"),
    "stages make way": ("search.cuh", "__syncthreads();  // the stages are done with", "//"),
    "splits are stored": ("search.cuh", "__syncthreads();  // the block's candidates", "//"),
    "rows are stored": ("search.cuh", "__syncthreads();  // whoever finishes", "//"),
    "keys are written": ("search_finish.cuh", "__syncwarp();  // keys are there", "//"),
    "the list is complete": ("search_finish.cuh", "__syncthreads();  // the list is", "//"),
    "ranked, then moved": ("search_finish.cuh", "__syncthreads();  // all are ranked", "//"),
    "read, then replaced": ("search_finish.cuh", "__syncthreads();  // written before", "//"),
    "maxima are read": ("search_exact.cuh", "__syncthreads();  // read before the next", "//"),
}


@pytest.mark.parametrize("header, old, new", DROPPED.values(), ids=DROPPED)
def test_race_build_notices_a_dropped_line(header, old, new):
    sim = harness.mutant("race", "search.cpp", header, old, new)
    x = all_equal(1, 190, 1, 40, dtype=torch.bfloat16)  # three steps: the last stage gives way too
    plans = [{"splits": 2}] if "block's" in old else [{}]
    if header == "search_exact.cuh":
        plans = [{"candidates": 0, "exact_blocks": 1}]
    with planted.reported(sim):
        for plan in plans:
            search_case(x, x, 1, 3, name="mutant", **plan).check(sim, ANY)


WRONG = {
    "ties go to whoever comes first": (
        "search.cuh",
        "acc[n][i] >= bags[i / 2].worst",
        "acc[n][i] > bags[i / 2].worst",
    ),
    "a pass forgets the last": (
        "search.cuh",
        "if (is_later_pass) hide_kept",
        "if (false) hide_kept",
    ),
    "foreign columns": ("search.cuh", "if (!__all_sync(kAllLanes, sees_all))", "if (false)"),
}


@pytest.mark.parametrize("header, old, new", WRONG.values(), ids=WRONG)
def test_these_cases_notice_a_wrong_line(unscanned, header, old, new):
    """Mistakes that no sanitizer sees, and that the scan of uncertain rows would hide."""
    sim = harness.mutant("plain", "search.cpp", header, old, new, NO_SCAN)
    x, y = (data(1, 120, 1, 24, dtype=torch.bfloat16) for data in (all_equal, random))
    cases = [search_case(x, x, 1, 2, name="ties"), search_case(y, y, 1, 30, name="two passes")]

    def outcome(which, case):
        try:
            case.check(which, ANY)
        except AssertionError:
            return "differs"
        return "equal"

    assert any(outcome(sim, case) != outcome(unscanned, case) for case in cases)


HIDDEN = {
    "certain without proof": (
        "if (bound == kLowest) return",
        "return true; if (bound == kLowest) return",
    ),
    "NaN leaves no trace": ("storage.found[row] == storage.eligible[row];", "true;"),
}


@pytest.mark.parametrize("old, new", HIDDEN.values(), ids=HIDDEN)
def test_rows_certain_by_mistake_come_out_wrong(old, new):
    sim = harness.mutant("plain", "search.cpp", "search_finish.cuh", old, new)
    query, chunks = nearly_tying(20, 120, 64, torch.bfloat16)
    x = random(1, 40, 1, 16, dtype=torch.bfloat16)
    bad = torch.ops.resona.pool_chunks(x, 1).index_fill(1, torch.arange(0, 38), math.nan)
    cases = [
        search_case(query, torch.empty_like(chunks), 1, 2, name="near ties", chunks=chunks),
        search_case(x, x, 1, 4, name="NaN", chunks=bad, unit=1),
    ]
    with pytest.raises(AssertionError, match="differ"):
        for case in cases:
            case.check(sim, ANY)
