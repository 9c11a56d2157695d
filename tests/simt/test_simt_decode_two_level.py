"""decode_step_two_level in the simulator: what it finds and keeps has the bits of the CPU operator."""

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


def two_level(dtype: torch.dtype = torch.bfloat16, **options) -> Decode:
    sizes = dict(capacity=160, lengths=(149,), chunk_size=2, superchunk_size=5, probes=3)
    return Decode(dtype, **(sizes | options))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("sizes", [(1, 1), (1, 9), (4, 2), (7, 30), (40, 1), (200, 1)])
def test_sizes_of_superchunks(plain, dtype, sizes):
    """Of one chunk each, of more than a range, of none that is whole; past the closing of one."""
    for top_k, ranges in ((3, 0), (12, 17)):
        p = two_level(
            dtype,
            lengths=(149, 79, 3, 160, 0),
            superchunk_size=sizes[0],
            probes=sizes[1],
            top_k=top_k,
            range=ranges,
            scored=top_k == 3,
        )
        p.steps(plain, 3)


def test_which_launches_these_were():
    p = two_level()
    p.case()
    assert p.probes_centroids
    for few in (dict(probes=16), dict(superchunk_size=81), dict(superchunk_size=0)):
        p = two_level(**few)
        p.case()
        assert not p.probes_centroids


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_many_steps_from_nothing(plain, dtype):
    """Token by token until the sequences are full, and once more; against pooling the whole."""
    p = two_level(
        dtype,
        capacity=25,
        lengths=(0, 13),
        chunk_size=1,
        superchunk_size=3,
        probes=2,
        retrieval_heads=2,
        retrieval_dim=9,
    )
    tokens = []
    for position in range(25):
        tokens.append(p.new["context_embedding"][:1])
        p.step(plain)
        p.draw(position)
    chunks = ops.pool_chunks(torch.cat(tokens, dim=1), 1)
    assert torch.equal(p.state["superchunk_embedding"][:1], ops.pool_chunks(chunks, 3))
    assert p.state["lengths"].tolist() == [25, -26]
    p.steps(plain, 1)


@pytest.mark.parametrize("contents", ["repeated", "permuted", "zipf", "two_letters"])
def test_ties_go_to_the_lower_index(plain, contents):
    for dtype in DTYPES:
        for ranges in (0, 8):
            p = two_level(dtype, lengths=(121, 158), top_k=7, contents=contents, range=ranges)
            p.steps(plain, 3)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("dim", [1, 7, 64, 130, 300])
def test_retrieval_dims(plain, dtype, dim):
    p = two_level(dtype, retrieval_heads=2, retrieval_dim=dim, lengths=(149, 99))
    p.steps(plain, 2)


@pytest.mark.parametrize("embedding_dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_two_dtypes(plain, dtype, embedding_dtype):
    two_level(dtype, embedding_dtype=embedding_dtype, scored=True, heads=4).steps(plain, 1)


def test_long_caches(plain):
    """Many ranges of centroids; ranges of chunks that begin inside superchunks; all keys passed on."""
    for dtype in DTYPES:
        for top_k, probes in ((5, 20), (90, 70)):
            p = two_level(
                dtype,
                capacity=1300,
                lengths=(1299, 300, 2),
                chunk_size=1,
                top_k=top_k,
                superchunk_size=6,
                probes=probes,
                retrieval_dim=16,
                sms=1,
            )
            p.steps(plain, 1)
    two_level(capacity=2100, lengths=(2090,), chunk_size=1, superchunk_size=1, probes=1500).steps(
        plain, 1
    )


def test_fewer_chunks_searched_than_slots(plain):
    two_level(top_k=30, probes=1, own_slots=True, splits=3, lengths=(149, 140)).steps(plain, 2)
    two_level(capacity=700, lengths=(690,), chunk_size=1, top_k=600, head_dim=8).steps(plain, 1)


def test_rows_apart_and_nothing_to_do(plain):
    two_level(layout="apart", retrieval_heads=2).steps(plain, 2)
    two_level(lengths=()).step(plain)
    two_level(lengths=(3, 0), chunk_size=50).steps(plain, 2)


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
@pytest.mark.parametrize("where", ["query", "chunk", "centroid"])
def test_what_is_not_a_number(plain, where, value):
    p = two_level(lengths=(150, 150), top_k=20)
    if where == "query":
        p.new["query_embedding"][0] = value
    elif where == "chunk":
        p.state["chunk_embedding"][0, 70:74] = value
    else:
        p.state["superchunk_embedding"][0, 3:5] = value
    p.step(plain)


@settings(max_examples=25, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    chunk_size=st.integers(1, 4),
    capacity=st.integers(1, 120),
    lengths=st.lists(st.integers(-3, 120), min_size=1, max_size=3),
    top_k=st.integers(1, 12),
    sizes=st.tuples(st.integers(1, 9), st.integers(1, 6)),
    heads=st.tuples(st.integers(1, 3), st.booleans()),
    dims=st.tuples(st.integers(1, 24), st.integers(1, 40)),
    cut=st.tuples(st.sampled_from([0, 3, 16]), st.integers(0, 3)),
    schedule=st.sampled_from(SCHEDULES),
)
def test_any_problem(
    plain, race, dtype, chunk_size, capacity, lengths, top_k, sizes, heads, dims, cut, schedule
):
    kv_heads, several = heads
    p = two_level(
        dtype,
        capacity=capacity,
        lengths=tuple(min(n, capacity) for n in lengths),
        heads=2 * kv_heads,
        kv_heads=kv_heads,
        head_dim=dims[0],
        retrieval_heads=kv_heads if several else 1,
        retrieval_dim=dims[1],
        chunk_size=chunk_size,
        top_k=top_k,
        superchunk_size=sizes[0],
        probes=sizes[1],
        range=cut[0],
        splits=cut[1],
    )
    p.step(plain, schedule).check(race, schedule)


def covering() -> list[Decode]:
    """Several ranges of centroids and of chunks, superchunks that close, sequences of all kinds."""
    shared = dict(lengths=(149, 160, 8, -3), splits=2, sms=1)
    return [
        two_level(contents="two_letters", top_k=14, range=7, scored=True, **shared),
        two_level(torch.float16, retrieval_dim=140, retrieval_heads=2, range=4, **shared),
        two_level(torch.float32, retrieval_dim=7, range=9, superchunk_size=3, probes=7, **shared),
        two_level(torch.float32, lengths=(19, 149), superchunk_size=1, probes=4, range=5),
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


REFINE, APPEND = "decode_refine.cuh", "decode_append.cuh"
CHANGED = {
    "refinement waits for the search": (REFINE, "ptx::griddepcontrol_wait();", ""),
    "superchunks are written": (REFINE, "__syncthreads();  // thread 0 has", "//"),
    "numbers are written": (REFINE, "__syncthreads();  // all numbers", "//"),
    "attention waits for the refinement": (ATTEND, "ptx::griddepcontrol_wait();", ""),
    "both rounds": (SELECT, "storage.largest[slot % 2]", "storage.largest[0]"),
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
    "the open superchunk": (REFINE, "last >= probed) superchunks", "false) superchunks"),
    "as many rounds as the last ranks": (REFINE, "? last + 1 : probed", "? last : probed"),
    "the sum of the open superchunk": (
        APPEND,
        "if (p.superchunk_sum == nullptr) continue;",
        "continue;",
    ),
    "superchunks that close": (APPEND, "% p.superchunk_size == 0)", "% p.superchunk_size == 1)"),
    "lists of searched chunks": (ATTEND, "(found.searched + p.range", "(found.eligible + p.range"),
}


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG)
def test_wrong_numbers_are_noticed(plain, change):
    sim = harness.mutant("plain", "stage_decode.cpp", *change)
    with pytest.raises((AssertionError, sim.Error), match=r"elements of|out of bounds|faults at"):
        for p in covering():
            p.step(plain).check(sim, ANY)
