"""decode_step in the simulator, the plan and decode.cu as they are, against the CPU operator. In two levels:
test_simt_decode_two_level.py.

What the search decides and what the cache holds has the very bits; outputs are near by the tolerance rule.
"""

import math

import harness
import planted
import pytest
import sanitized
import torch
from attend_cases import ANY, DTYPES, name_of
from decode_problems import ATTEND, SELECT, Decode, one_thread  # noqa: F401
from harness import SCHEDULES
from hypothesis import given, settings
from hypothesis import strategies as st

ops = torch.ops.resona


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("chunk_size", [1, 2, 3, 8, 16, 37])
def test_chunk_sizes_slots_and_groups(plain, dtype, chunk_size):
    """From an empty cache or a filled one, over the border of a chunk, to the end of the capacity."""
    for n, top_k in enumerate([1, 2, 8, 30]):
        group = (1, 2, 4, 12)[(n + chunk_size) % 4]
        capacity = 7 * chunk_size + chunk_size // 2 + 2
        p = Decode(
            dtype,
            capacity=capacity,
            lengths=((0, capacity - 2), (5 * chunk_size - 1,), (chunk_size, 3, 0))[n % 3],
            heads=2 * group,
            head_dim=(16, 40, 64, 128)[n],
            chunk_size=chunk_size,
            top_k=top_k,
            scored=n % 2 == 0,
            sink=n % 3 == 0,
            splits=(0, 3)[n % 2],
        )
        p.steps(plain, 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("dim", [1, 8, 16, 72, 128, 200, 256])
def test_head_dims(plain, dtype, dim):
    """On and off the borders of 16 bytes; 4 and more heads of a group take another kernel in float32."""
    for heads in (2, 10):
        sizes = dict(capacity=160, lengths=(150,), chunk_size=9, top_k=9, splits=2)
        Decode(dtype, heads=heads, head_dim=dim, **sizes).steps(plain, 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("dim", [1, 7, 64, 128, 130, 300])
def test_retrieval_dims(plain, dtype, dim):
    """Rows in slices, and off the borders of 16 bytes."""
    p = Decode(
        dtype, kv_heads=2, retrieval_heads=2, retrieval_dim=dim, capacity=90, lengths=(79, 3)
    )
    p.steps(plain, 2)


def test_which_kernels_these_were():
    """The tables above reach every instance."""
    reached = set()
    for dtype in DTYPES:
        for dim in (16, 40, 64, 72, 128, 200):
            for heads in (2, 10, 24):
                p = Decode(dtype, heads=heads, head_dim=dim)
                p.case()
                reached.add((name_of(dtype), *p.path))
    half = [(1, 64, 8), (1, 128, 8), (1, 128, 16), (1, 256, 8)]
    whole = [(0, 64, 1), (0, 128, 1), (0, 256, 1), (0, 128, 4), (0, 256, 4)]
    assert reached == {("float32", *c) for c in whole} | {
        (name_of(dtype), *c) for dtype in DTYPES[1:] for c in half
    }


@pytest.mark.parametrize("embedding_dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_two_dtypes(plain, dtype, embedding_dtype):
    Decode(dtype, embedding_dtype, lengths=(27, 3), scored=True).steps(plain, 2)


@pytest.mark.parametrize("contents", ["repeated", "permuted", "zipf", "two_letters"])
def test_ties_go_to_the_lower_index(plain, contents):
    for dtype in DTYPES:
        for ranges in (0, 8):
            p = Decode(
                dtype,
                capacity=130,
                lengths=(121, 128),
                chunk_size=2,
                top_k=7,
                contents=contents,
                range=ranges,
            )
            p.steps(plain, 3)


def test_many_steps_from_nothing(plain):
    """A cache is filled token by token; every sequence ends full, and stays as it is."""
    p = Decode(capacity=21, lengths=(0, 0, 13), chunk_size=3, history_rows=4, sink=True)
    p.steps(plain, 21)
    assert p.state["lengths"].tolist() == [21, 21, -22]
    p.steps(plain, 2)
    assert p.state["lengths"].tolist() == [-22, -22, -22]


def test_a_closed_chunk_has_the_bits_of_prefill(plain):
    for dtype in DTYPES:
        p = Decode(dtype, capacity=12, lengths=(0,), chunk_size=4, retrieval_heads=2)
        tokens = []
        for _ in range(12):
            tokens.append(p.new["context_embedding"])
            p.step(plain)
            p.draw()
        pooled = ops.pool_chunks(torch.cat(tokens, dim=1), 4)
        assert torch.equal(p.state["chunk_embedding"], pooled)


def test_more_slots_than_chunks_and_than_shared_memory(plain):
    p = Decode(capacity=700, lengths=(690, 30), chunk_size=1, top_k=600, head_dim=8)
    p.steps(plain, 1)
    Decode(own_slots=True, splits=3, lengths=(29, 5)).steps(plain, 2)
    Decode(capacity=300, lengths=(299,), chunk_size=2, top_k=1000).steps(plain, 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_ranges_of_a_long_cache(plain, dtype):
    """Tiles within ranges, a last range in part, and ranges that a short sequence does not reach."""
    for top_k in (5, 90):
        p = Decode(
            dtype,
            capacity=700,
            lengths=(699, 300, 2),
            chunk_size=1,
            top_k=top_k,
            retrieval_dim=16,
            sms=1,
        )
        p.steps(plain, 1)
        p = Decode(dtype, capacity=300, lengths=(290, 20), chunk_size=1, top_k=top_k, range=17)
        p.steps(plain, 1)


def test_rows_apart(plain):
    for dtype in DTYPES:
        Decode(dtype, layout="apart", lengths=(27, 12), retrieval_heads=2).steps(plain, 2)


def test_nothing_to_do(plain):
    Decode(lengths=()).step(plain)
    Decode(lengths=(3, 0), chunk_size=50).steps(plain, 2)  # not one chunk
    Decode(history_rows=0).steps(plain, 2)


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_queries_and_chunks_that_are_not_numbers(plain, value):
    for where in ("query", "chunk"):
        p = Decode(capacity=60, lengths=(50, 50), top_k=20, scored=where == "query" and value == 0)
        if where == "query":
            p.new["query_embedding"][0] = value
        else:
            p.state["chunk_embedding"][0, 3] = value
        p.step(plain)


@settings(max_examples=25, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    chunk_size=st.integers(1, 9),
    capacity=st.integers(1, 60),
    lengths=st.lists(st.integers(-3, 60), min_size=1, max_size=3),
    top_k=st.integers(1, 12),
    heads=st.tuples(st.integers(1, 3), st.integers(1, 5), st.booleans()),
    dims=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    history_rows=st.integers(0, 4),
    extras=st.tuples(st.booleans(), st.booleans()),
    cut=st.tuples(st.sampled_from([0, 3, 16]), st.integers(0, 3)),
    schedule=st.sampled_from(SCHEDULES),
)
def test_any_problem(
    plain,
    race,
    dtype,
    chunk_size,
    capacity,
    lengths,
    top_k,
    heads,
    dims,
    history_rows,
    extras,
    cut,
    schedule,
):
    kv_heads, group, several = heads
    p = Decode(
        dtype,
        capacity=capacity,
        lengths=tuple(min(n, capacity) for n in lengths),
        heads=kv_heads * group,
        kv_heads=kv_heads,
        head_dim=dims[0],
        retrieval_heads=kv_heads if several else 1,
        retrieval_dim=dims[1],
        chunk_size=chunk_size,
        top_k=top_k,
        history_rows=history_rows,
        scored=extras[0],
        sink=extras[1],
        range=cut[0],
        splits=cut[1],
    )
    p.step(plain, schedule).check(race, schedule)


def covering() -> list[Decode]:
    """Each kernel: ranges and splits of several blocks, chunks that close, sequences of all kinds."""
    shared = dict(capacity=160, lengths=(149, 160, 8, -3), chunk_size=2, splits=2, sms=1)
    many, few = {**shared, "top_k": 40, "range": 17}, {**shared, "top_k": 12}
    return [
        Decode(torch.bfloat16, heads=6, sink=True, scored=True, contents="two_letters", **many),
        Decode(torch.float16, head_dim=136, retrieval_dim=140, **many),
        Decode(torch.float16, head_dim=5, retrieval_dim=7, retrieval_heads=2, range=20, **few),
        Decode(torch.float32, heads=8, head_dim=36, **many),
        Decode(torch.float32, head_dim=130, own_slots=True, **few),
    ]


def test_same_bits_under_every_schedule_without_races(plain, race):
    """Two steps in a row: the second begins while the first one ends."""
    for p in covering():
        case = p.step(plain, times=2)
        for schedule in SCHEDULES[::4]:
            case.check(race, schedule)
        for schedule in SCHEDULES[1::4]:
            case.check(plain, schedule)


def test_sanitizers(plain):
    cases = [p.step(plain) for p in covering()]
    sanitized.check([(case, SCHEDULES[::7]) for case in cases])


SEARCH, SCORE = "decode_search.cuh", "decode_score.cuh"
CHANGED = {
    "the search waits for the step before": (SEARCH, "ptx::griddepcontrol_wait();", ""),
    "rows have landed": (SCORE, "  ptx::cp_async_wait_all();\n", ""),
    "keys are written": (SCORE, "__syncthreads();  // all keys", "//"),
    "tickets are zeroed": (SEARCH, "* p.tickets_per_batch + i] = 0", "* p.tickets_per_batch + i]"),
    "both rounds": (SELECT, "storage.largest[slot % 2]", "storage.largest[0]"),
    "attention waits for the search": (ATTEND, "ptx::griddepcontrol_wait();", ""),
    "partials are published": (ATTEND, "atom_add_acq_rel_gpu", "atom_add_relaxed_gpu"),
    "lengths as they were": (ATTEND, "= p.positions[batch];", "= p.lengths[batch];"),
}


@pytest.mark.parametrize("change", CHANGED.values(), ids=CHANGED)
def test_race_build_notices_a_mistake(plain, change):
    sim = harness.mutant("race", "stage_decode.cpp", *change)
    cases = [p.step(plain, times=2) for p in covering()]
    with planted.reported(sim):
        for schedule in SCHEDULES[::7]:
            for case in cases:
                case.check(sim, schedule)


WRONG = {
    "the sum of the open chunk": ("decode_append.cuh", "sum[e] = 0;", ";"),
    "partials of all splits": (ATTEND, "s = team; s < splits", "s = team + kTeams; s < splits"),
}


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG)
def test_wrong_numbers_are_noticed(plain, change):
    sim = harness.mutant("plain", "stage_decode.cpp", *change)
    with pytest.raises(AssertionError, match="elements of"):
        for p in covering():
            p.step(plain).check(sim, ANY)
