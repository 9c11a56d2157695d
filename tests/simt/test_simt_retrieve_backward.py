"""The kernels of retrieve_backward.cuh in the simulator, against torch.ops.resona._retrieve_backward."""

import itertools
import math
from dataclasses import replace

import harness
import numpy as np
import planted
import pytest
import sanitized
import torch
from cases import Case, index_workspace
from harness import SCHEDULES
from hypothesis import given, settings
from hypothesis import strategies as st
from test_simt_pool import DTYPES, name_of, storage

ANY = SCHEDULES[0]


def chunk_rows(indices, context, chunk_size, lengths) -> tuple[np.ndarray, np.ndarray]:
    """Of each slot: its row of the chunk tensor, and whether it counts."""
    queries = indices.shape[1]
    row = np.arange(queries)
    position, first = row + context - queries, np.zeros(queries, np.int64)
    if lengths is not None:
        borders = np.cumsum([0, *lengths])
        sequence = np.searchsorted(borders, row, side="right") - 1
        position = row - borders[sequence]
        first = np.cumsum([0, *(n // chunk_size for n in lengths)])[sequence]
    used = (indices >= 0) & (indices < (position // chunk_size)[None, :, None, None])
    return np.where(used, first[None, :, None, None] + indices, 0), used


def bounds(gradient, rows, used, query, chunks) -> tuple[np.ndarray, np.ndarray]:
    """What float32 sums may be off by: 16 units in the last place of the summands' magnitudes."""
    norm = query.double().norm(dim=-1, keepdim=True).numpy()
    with np.errstate(all="ignore"):
        factor = np.where(used & (norm > 0), np.abs(gradient) / norm, 0)
        summand = factor * norm
    size = chunks.double().norm(dim=-1).numpy()
    if size.shape[1] == 0:  # nothing can be selected, and nothing gathered
        return np.zeros((*norm.shape[:3], 1)), np.zeros((*size.shape, 1))
    batch = np.arange(rows.shape[0])[:, None, None, None]
    head = np.arange(rows.shape[2])[None, None, :, None]
    of_queries = (factor * size[batch, rows, head]).sum(-1)
    of_chunks = np.zeros(size.shape)
    np.add.at(of_chunks, np.broadcast_arrays(batch, rows, head), summand)
    unit = 16 * np.finfo(np.float32).eps
    return unit * of_queries[..., None], unit * of_chunks[..., None]


def retrieve_backward_case(
    query, chunks, indices, context, chunk_size, lengths=None, gradient=None, name="", **choices
) -> Case:
    """query [B, T, R, E], chunks [B, C, R, E], any strides; indices [B, T, R, k] with anything in them.
    `choices`: lanes, vector, segment, blocks."""
    batch, queries, heads, dim = query.shape
    top_k, count, keys = indices.shape[-1], indices.size, batch * heads * chunks.shape[1]
    if gradient is None:
        gradient = torch.randn(indices.shape).numpy()
    rows, used = chunk_rows(indices, context, chunk_size, lengths)
    inputs = {
        **{"query": storage(query), "chunks": storage(chunks)},
        **{"indices": indices, "score_gradient": np.where(used, gradient, np.float32(math.nan))},
    }
    cu_seqlens = None
    if lengths is not None:
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
        inputs["cu_seqlens"] = cu_seqlens.numpy()
    truth = torch.ops.resona._retrieve_backward(
        torch.from_numpy(np.where(used, gradient, 0)).double(),
        torch.from_numpy(np.where(used, indices, -1)),
        *(query.double(), chunks.double(), chunk_size, context, cu_seqlens),
    )
    off_by = bounds(np.where(used, gradient, 0), rows, used, query, chunks)
    limits = torch.finfo(query.dtype)
    names = ("query_gradient", "chunk_gradient")
    strides = dict(zip(("batch", "token", "head"), query.stride(), strict=False))
    strides = {f"query_{key}_stride": value for key, value in strides.items()}
    for key, value in zip(("batch", "row", "head"), chunks.stride(), strict=False):
        strides[f"chunk_{key}_stride"] = value
    lanes = min(32, 1 << max(0, (dim - 1) // 8).bit_length())
    vector = all(is_vector(x) for x in (query, chunks))
    chosen = {"lanes": lanes, "vector": int(vector), "segment": 64, "blocks": 3} | choices
    partials = 2 * -(-count // chosen["segment"]) * -(-dim // 8) * 8
    workspace = {
        "workspace": index_workspace(count, keys),
        "factors": np.empty(count, np.float32),
        "partials": np.empty(partials, np.float32),
    }
    if lengths is not None:
        workspace["chunk_begin"] = np.empty(len(lengths) + 1, np.int32)
    return Case(
        name=f"retrieve_backward {name} {name_of(query.dtype)} {tuple(indices.shape)} E={dim} "
        f"S={chunk_size} {chosen}",
        kernel="retrieve_backward",
        inputs=inputs,
        expected={k: storage(x.to(query.dtype)) for k, x in zip(names, truth, strict=True)},
        near={
            k: limits.eps * np.abs(x.numpy()) + bound + limits.smallest_normal * limits.eps
            for k, x, bound in zip(names, truth, off_by, strict=True)
        },
        workspace=workspace,
        dtypes={k: name_of(query.dtype) for k in names},
        scalars={
            **strides,
            **chosen,
            **{"batch": batch, "queries": queries, "heads": heads, "top_k": top_k, "dim": dim},
            **{"context": context, "chunk_size": chunk_size, "sequences": len(lengths or [])},
            **{"dtype": name_of(query.dtype), "workspace_bytes": workspace["workspace"].size},
        },
    )


def is_vector(x) -> bool:
    rows = (*x.stride()[:-1], x.shape[-1])
    return x.data_ptr() % 16 == 0 and all(n * x.element_size() % 16 == 0 for n in rows)


def random_case(
    batch, queries, context, heads, dim, chunk_size, top_k, dtype, lengths=None, **choices
):
    """Indices as a search gives them, a few replaced by ones that nobody may follow."""
    query = torch.randn(batch, queries, heads, dim).to(dtype)
    tokens = torch.randn(batch, context, heads, dim).to(dtype)
    cu_seqlens = None if lengths is None else torch.tensor([0, *lengths]).cumsum(0).int()
    chunks = torch.ops.resona.pool_chunks(tokens, chunk_size, cu_seqlens)
    indices, _ = torch.ops.resona.retrieve(query, chunks, chunk_size, top_k, context, cu_seqlens)
    wrong = np.random.default_rng(0).integers(0, 60, indices.shape)
    indices = np.where(wrong == 1, -(2**31), np.where(wrong == 2, 2**31 - 1, indices.numpy()))
    return retrieve_backward_case(
        query, chunks, indices.astype(np.int32), context, chunk_size, lengths, **choices
    )


def exactly(case: Case, sim) -> Case:
    """The case that expects the very bits of a first run."""
    got = case.check(sim, ANY)
    return replace(case, expected={name: got[name] for name in case.expected}, near={})


@pytest.mark.parametrize("dim", [16, 40, 64, 128, 256, 768])
@pytest.mark.parametrize("top_k", [1, 2, 8, 24])
@pytest.mark.parametrize("chunk_size", [1, 2, 3, 5, 8, 16, 37, 64])
def test_equals_the_cpu(plain, dim, top_k, chunk_size):
    """Every dtype for each dim and top_k, and for each chunk size."""
    dtype = DTYPES[(chunk_size + top_k // 2 + dim // 8) % 3]
    context = max(30, 3 * chunk_size) + 1
    random_case(2, 29, context, 2, dim, chunk_size, top_k, dtype).check(plain, ANY)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_lanes_and_access_are_free_choices(plain, dtype):
    """More lanes than a row needs, or fewer: then it comes in slices."""
    for dim, (lanes, vector) in itertools.product(
        (8, 72, 264), itertools.product((1, 4, 8, 16, 32), (0, 1))
    ):
        random_case(1, 20, 24, 2, dim, 4, 3, dtype, lanes=lanes, vector=vector).check(plain, ANY)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_strides_and_alignment(plain, dtype):
    wide = torch.randn(2, 42, 3, 90).to(dtype)
    views = {
        "columns": wide[..., 16:56],
        "unaligned rows": wide[..., 1:41],
        "every other row": wide[:, ::2, :, :48],
        "heads first": wide.transpose(1, 2).contiguous().transpose(1, 2),
        "one head for all": wide[:, :, :1, :64].expand(2, 42, 4, 64),
    }
    for name, view in views.items():
        chunks = view[:, :10] / 8
        indices = torch.randint(-1, 10, (2, 20, view.shape[2], 5), dtype=torch.int32).numpy()
        case = retrieve_backward_case(view[:, 1:21], chunks, indices, 40, 4, name=name)
        case.check(plain, ANY)


@pytest.mark.parametrize("segment", [1, 16, 64, 512])
@pytest.mark.parametrize("lanes", [2, 8, 32])
def test_long_lists_are_cut(plain, lanes, segment):
    """One chunk that everybody selects, two that many do, others in no list: exact zeros."""
    rng = np.random.default_rng(segment)
    query, chunks = torch.randn(1, 150, 2, 72), torch.randn(1, 75, 2, 72)
    chunks /= chunks.norm(dim=-1, keepdim=True)
    indices = rng.choice([1, 2, 3, 60], (1, 150, 2, 3)).astype(np.int32)
    indices[..., 0] = 0
    case = retrieve_backward_case(query, chunks, indices, 300, 4, lanes=lanes, segment=segment)
    case = exactly(case, plain)
    for blocks in (1, 40):
        replace(case, scalars=case.scalars | {"blocks": blocks}).check(plain, ANY)
    assert (case.expected["chunk_gradient"][:, 4:60] == 0).all()
    assert (case.expected["chunk_gradient"][:, 61:] == 0).all()


def test_many_chunks_take_two_passes(plain):
    random_case(1, 700, 3000, 1, 8, 1, 2, torch.float16).check(plain, ANY)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_hard_values(plain, dtype):
    query, chunks = torch.randn(1, 40, 1, 24).to(dtype), torch.randn(1, 10, 1, 24).to(dtype)
    query[:, 10:14], chunks[:, 3] = 0, 0  # zero norm
    query[:, 15] *= 1e-3
    query[:, 16] = torch.finfo(dtype).max / 4
    query[:, 17] = chunks[:, 1]  # parallel: nothing is left of the query's gradient
    indices = np.random.default_rng(1).integers(-1, 11, (1, 40, 1, 6)).astype(np.int32)
    gradient = torch.randn(indices.shape).numpy()
    gradient[:, 20] = 0
    gradient[:, 12] = math.nan  # of a zero query: zero all the same
    clean = np.where(np.isnan(gradient), 0, gradient)
    case = retrieve_backward_case(query, chunks, indices, 40, 4, gradient=clean)
    case.inputs["score_gradient"] = np.where(indices < 0, np.float32(math.nan), gradient)
    got = case.check(plain, ANY)
    assert (got["query_gradient"][:, 10:14] == 0).all()


def test_nan_and_infinity_stay_in_their_rows(plain):
    """As on the CPU: rows that hold one, chunks that such a row selected, and nothing else."""
    for place, value in itertools.product(("query", "chunks", "gradient"), (math.nan, math.inf)):
        query, chunks = torch.randn(1, 40, 1, 24), torch.randn(1, 10, 1, 24)
        indices = np.random.default_rng(1).integers(-1, 10, (1, 40, 1, 3)).astype(np.int32)
        indices[:, 6] = -1
        gradient = torch.randn(indices.shape).numpy()
        if place == "query":
            query[:, 6, :, 3] = query[:, 20, :, 3] = value
        elif place == "chunks":
            chunks[:, 2, :, 3] = value
        else:
            gradient[:, 30] = value
        case = retrieve_backward_case(query, chunks, indices, 40, 4, gradient=gradient)
        case.workspace |= {name: np.empty_like(x) for name, x in case.expected.items()}
        expected, case.expected = case.expected, {}
        got = case.check(plain, ANY)
        for name, there in expected.items():
            tainted = ~np.isfinite(got[name]).all(-1)
            np.testing.assert_array_equal(tainted, ~np.isfinite(there).all(-1), f"{place} {value}")
            assert np.allclose(got[name][~tainted], there[~tainted], rtol=1e-4, atol=1e-5)


def test_nothing_to_do(plain):
    """No chunk at all; and no slot that counts."""
    for dtype in DTYPES:
        random_case(2, 3, 3, 2, 8, 5, 2, dtype).check(plain, ANY)
        query, chunks = torch.randn(1, 9, 2, 16).to(dtype), torch.randn(1, 4, 2, 16).to(dtype)
        indices = np.full((1, 9, 2, 3), -1, np.int32)
        got = retrieve_backward_case(query, chunks, indices, 16, 4).check(plain, ANY)
        assert not got["query_gradient"].any() and not got["chunk_gradient"].any()


def test_offsets_beyond_32_bits(plain):
    """Batch entries 2^31 elements apart; the memory between them is never touched."""
    apart = 2**31 + 64
    try:
        memory = torch.from_numpy(np.zeros(apart + 960, np.float16))
    except MemoryError:
        pytest.skip("no address space for 4 GiB")
    x = memory.as_strided((2, 30, 1, 32), (apart, 32, 32, 1))
    x.copy_(torch.randn(2, 30, 1, 32))
    indices = np.random.default_rng(1).integers(-1, 5, (2, 20, 1, 3)).astype(np.int32)
    retrieve_backward_case(x[:, :20], x[:, 20:25], indices, 20, 4).check(plain, ANY)


PACKINGS = {
    "ragged": [0, 17, 3, 0, 64, 1, 40, 0],
    "short": [2, 3, 1],
    "one": [50],
    "many": [5] * 60,
}


@pytest.mark.parametrize("lengths", PACKINGS.values(), ids=PACKINGS)
def test_packed(plain, lengths):
    for dtype in DTYPES:
        length = sum(lengths)
        random_case(1, length, length, 2, 20, 4, 3, dtype, lengths).check(plain, ANY)


def with_wrong_cu_seqlens() -> list[Case]:
    """Any numbers, no foreign memory, and still one writer of each element."""
    cases = []
    for cu_seqlens in ([0, 90, 10, 60], [-7, 20, 2**31 - 1], [5, 5, 5], [0, 61, 0, 61], [9, 1, 40]):
        lengths = [61] + [0] * (len(cu_seqlens) - 2)
        case = random_case(1, 61, 61, 1, 8, 4, 3, torch.float32, lengths, name=str(cu_seqlens))
        case.inputs["cu_seqlens"] = np.array(cu_seqlens, np.int32)
        case.inputs["score_gradient"] = np.ones_like(case.inputs["score_gradient"])
        case.workspace |= case.expected
        case.expected = {}
        cases.append(case)
    return cases


def test_wrong_cu_seqlens_reach_no_foreign_memory(race):
    for case in with_wrong_cu_seqlens():
        case.check(race, ANY)


@settings(max_examples=25, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    shape=st.tuples(*(st.integers(1, most) for most in (2, 40, 3, 100))),
    before=st.integers(0, 20),
    chunk_size=st.integers(1, 12),
    top_k=st.integers(1, 5),
    cuts=st.lists(st.integers(0, 40), max_size=4),
    segment=st.integers(1, 20),
    schedule=st.sampled_from(SCHEDULES),
    blocks=st.integers(1, 4),
)
def test_any_problem(
    plain, race, dtype, shape, before, chunk_size, top_k, cuts, segment, schedule, blocks
):
    batch, queries, heads, dim = shape
    lengths = None
    if cuts:
        batch, before = 1, 0
        borders = [0, *sorted(min(cut, queries) for cut in cuts), queries]
        lengths = np.diff(borders).tolist()
    case = random_case(
        *(batch, queries, queries + before, heads, dim, chunk_size, top_k, dtype, lengths),
        **{"segment": segment, "blocks": blocks},
    )
    for sim in (plain, race):
        case.check(sim, schedule)


def covering() -> list[Case]:
    """Each dtype; groups of lanes of all kinds, slices, unaligned rows; short lists and cut ones."""
    shapes = [
        (torch.float32, 2, 16, 1, None),
        (torch.float16, 16, 96, 1, None),
        (torch.bfloat16, 32, 264, 1, [9, 0, 13]),
        (torch.float32, 32, 270, 0, [22]),
        (torch.float16, 8, 37, 0, [10, 12]),
        (torch.bfloat16, 4, 72, 1, None),
    ]
    return [
        random_case(
            *(1, 22, 22, 2, dim, 4, 3, dtype, lengths),
            **{"lanes": lanes, "vector": vector, "segment": 2 + i, "blocks": 2},
        )
        for i, (dtype, lanes, dim, vector, lengths) in enumerate(shapes)
    ]


def test_same_bits_under_every_schedule_without_races(plain, race):
    for case in covering():
        case = exactly(case, plain)
        for schedule in SCHEDULES:
            case.check(race, schedule)
        for schedule in SCHEDULES[1::5]:
            case.check(plain, schedule)


def test_sanitizers():
    cases = [*covering(), *with_wrong_cu_seqlens()]
    sanitized.check([(case, SCHEDULES[::5]) for case in cases])


WAIT = "ptx::griddepcontrol_wait();\n  "
DROPPED = {
    "query gradient, primary": f"{WAIT}for (int64_t first = warp * groups",
    "segments, primary": f"{WAIT}const int64_t items = work_items",
    "chunk gradient, primary": f"{WAIT}for (int64_t item = group;",
}


@pytest.mark.parametrize("old", DROPPED.values(), ids=DROPPED)
def test_race_build_notices_a_dropped_line(old):
    new = old.removeprefix(WAIT)
    sim = harness.mutant("race", "retrieve_backward.cpp", "retrieve_backward.cuh", old, new)
    case = random_case(1, 60, 60, 1, 16, 4, 3, torch.float32, [40, 20], segment=8)
    with planted.reported(sim):
        case.check(sim, ANY)
