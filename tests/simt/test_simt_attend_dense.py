"""The dense attention kernel in the simulator, against resona_ext/reference.py."""

import itertools
import math

import harness
import planted
import pytest
import sanitized
import torch
from attend_cases import ANY, DTYPES, Attention, name_of
from harness import SCHEDULES

SHORT = DTYPES[1:]  # the kernel takes 16-bit types


@pytest.fixture(autouse=True)
def one_thread(threads):
    threads(1)  # problems are small: more threads only wait for each other


def dense(dtype=torch.bfloat16, *shape, **options) -> Attention:
    return Attention(dtype, *shape, distinct=True, **options)


def case_of(p: Attention, dim=None):
    dim = dim or next(n for n in (64, 128, 256) if n >= p.head_dim)
    return p.case("attend_dense", dim_instance=dim)


def check(sim, p: Attention, dim=None, **options):
    return p.check(sim, case_of(p, dim), **options)


SIZES = [1, 2, 3, 5, 8, 16, 37, 64, 128]


@pytest.mark.parametrize("dtype", SHORT, ids=name_of)
@pytest.mark.parametrize("chunk_size", SIZES)
def test_chunk_sizes_slots_and_groups(plain, dtype, chunk_size):
    for n, top_k in enumerate([1, 2, 4, 8, 16]):
        group = (1, 2, 8)[(n + SIZES.index(chunk_size)) % 3]
        queries = 70 // group + 9
        p = dense(
            dtype,
            queries=queries,
            context=queries + chunk_size * 3 + chunk_size // 2,
            heads=group,
            kv_heads=1,
            head_dim=(16, 40, 64)[n % 3],
            chunk_size=chunk_size,
            top_k=top_k,
            sink=n % 2 == 0,
        )
        check(plain, p)


@pytest.mark.parametrize("dtype", SHORT, ids=name_of)
@pytest.mark.parametrize("dim", [1, 8, 16, 40, 64, 72, 128, 200, 256])
def test_head_dims_and_heads(plain, dtype, dim):
    for heads, kv_heads, retrieval_heads in ((2, 2, 2), (6, 2, 1)):
        shape = {"heads": heads, "kv_heads": kv_heads, "retrieval_heads": retrieval_heads}
        check(plain, dense(dtype, 2, 40, 61, **shape, head_dim=dim, top_k=8, sink=True))


@pytest.mark.parametrize("dtype", SHORT, ids=name_of)
def test_every_instance_takes_narrower_rows(plain, dtype):
    for dim in (64, 128, 256):
        check(plain, dense(dtype, queries=30, head_dim=24), dim)


def test_several_windows(plain):
    """1024 keys at a time: chunks across their border, tiles that nobody reads."""
    for chunk_size, top_k in ((37, 3), (1500, 1), (5, 40)):
        shape = {"queries": 20, "context": 3300, "chunk_size": chunk_size, "top_k": top_k}
        check(plain, dense(**shape, head_dim=16, sink=True))
    p = dense(torch.float16, queries=70, context=2200, chunk_size=16, top_k=2, head_dim=200)
    p.tensors["indices"][..., 0] = 63  # the last tokens of the first window
    p.tensors["indices"][..., 1] = 64
    check(plain, p)


@pytest.mark.parametrize("dtype", SHORT, ids=name_of)
def test_wrong_indices_are_unused(plain, dtype):
    for shape in ({}, {"lengths": [9, 0, 2, 61]}):
        p = dense(dtype, **{"queries": 70, "context": 80, "sink": True, **shape})
        for wrong in (-(2**31), -2, 2**31 - 1, p.context // p.chunk_size, 10**6):
            where = torch.rand(p.tensors["indices"].shape) < 0.05
            p.tensors["indices"][where] = wrong
        check(plain, p)


@pytest.mark.parametrize("dtype", SHORT, ids=name_of)
def test_rows_with_nothing(plain, dtype):
    for sink in (None, torch.tensor([0.5, -math.inf]), torch.tensor([-3e38, 80.0])):
        p = dense(dtype, queries=70, context=70)
        p.tensors["indices"][:, 7:] = -1
        p.tensors["sink"] = sink
        out, lse = p.run(plain, check(plain, p))
        expected = torch.full((2,), -math.inf) if sink is None else sink
        assert torch.count_nonzero(out[:, 7:]) == 0
        torch.testing.assert_close(lse[0, 7:], expected.expand(63, 2))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["query", "key", "value"])
def test_nan_and_infinity_reach_only_rows_that_read_them(plain, where, bad):
    """The tile multiplies masked values by zero; rows that this breaks are computed again."""
    for dtype, dim in itertools.product(SHORT, (5, 64, 200)):
        p = dense(dtype, queries=50, context=50, heads=4, head_dim=dim, sink=True)
        p.tensors[where][0, 9, :, 3] = bad
        check(plain, p)


@pytest.mark.parametrize("scale", [0.0, 0.3, -0.5, 20.0])
def test_scale(plain, scale):
    for dtype in SHORT:
        check(plain, dense(dtype, queries=30, chunk_size=5, scale=scale))


@pytest.mark.parametrize("dtype", SHORT, ids=name_of)
def test_strides_and_alignment(plain, dtype):
    wide = {name: torch.randn(2, 60, 4, 80).to(dtype) for name in ("query", "key", "value")}
    views = {
        "columns": lambda x: x[:, :30, :, 16:56],
        "unaligned rows": lambda x: x[:, :30, :, 1:41],
        "every other token": lambda x: x[:, ::2, :, :40],
        "heads first": lambda x: x[:, :30].transpose(1, 2).contiguous().transpose(1, 2)[..., :40],
        "one head for all": lambda x: x[:, :30, :1, :40].expand(2, 30, 4, 40),
    }
    for view in views.values():
        p = dense(dtype, 2, 30, 30, 4, 4, 40, top_k=2)
        p.tensors |= {name: view(x) for name, x in wide.items()}
        check(plain, p)


@pytest.mark.parametrize("lengths", [[0, 17, 3, 0, 60, 1], [0, 0, 5], [140], [5] * 30])
def test_packed(plain, lengths):
    for dtype in SHORT:
        check(plain, dense(dtype, lengths=lengths, heads=4, sink=True))


@pytest.mark.parametrize(
    "shape",
    [{"queries": 0}, {"batch": 0}, {"queries": 0, "context": 0}, {"chunk_size": 10**12}],
    ids=str,
)
def test_nothing_to_do(plain, shape):
    p = dense(**shape)
    out, lse = p.run(plain, case_of(p))
    assert torch.count_nonzero(out) == 0 and lse.eq(-math.inf).all()


@pytest.mark.parametrize("cu_seqlens", [[0, 90, 10, 60], [-7, 20, 2**31 - 1], [5, 5, 5]])
def test_wrong_cu_seqlens_reach_no_foreign_memory(race, cu_seqlens):
    """The host never looks at them; the race build reports any access out of bounds."""
    p = dense(lengths=[70] + [0] * (len(cu_seqlens) - 2))
    p.tensors["cu_seqlens"] = torch.tensor(cu_seqlens, dtype=torch.int32)
    p.run(race, case_of(p))


def test_products_that_are_cut_off(plain):
    """Tensor cores do not round their sums; the tolerance holds all the same."""
    for dtype in SHORT:
        check(plain, dense(dtype, queries=40, head_dim=128, chunk_size=16), truncated_products=True)


def covering(plain):
    """Several blocks, tiles and windows; packed, unaligned, with rows computed again; small."""
    problems = [
        dense(torch.bfloat16, 1, 33, 44, 4, 2, 64, sink=True),
        dense(torch.float16, 2, 10, 30, 2, 1, 128, chunk_size=3),
        dense(torch.float16, 1, 5, 1200, 1, 1, 16, chunk_size=30, top_k=8),
        dense(torch.bfloat16, lengths=[9, 0, 20], heads=1, kv_heads=1, head_dim=200),
        dense(torch.bfloat16, 1, 20, 20, 2, 1, 5),
    ]
    broken = dense(torch.float16, 1, 20, 20, 2, 2, 24)
    broken.tensors["value"][0, 5] = math.nan
    return [check(plain, p) for p in [*problems, broken]]


def test_every_schedule_gives_the_same_without_races(plain, race):
    for case, schedule in itertools.product(covering(plain), SCHEDULES):
        case.check(plain, schedule)
        case.check(race, schedule)


def test_sanitizers(plain):
    made = covering(plain)
    sanitized.check([(case, SCHEDULES[::5]) for case in made])


DROPPED = {
    "block": ("__syncthreads();\n  load_queries", "load_queries"),
    "mask is built": ("__syncthreads();\n    attend_window", "attend_window"),
    "empty window": ("__syncthreads();  // `tiles` is read", "//"),
    "keys are here": ("__syncthreads();  // K is here", "//"),
    "values are here": ("__syncthreads();  // V is here", "//"),
    "keys have landed": (
        "ptx::cp_async_wait_all();\n    __syncthreads();  // K",
        "__syncthreads();  //",
    ),
    "output is staged": ("__syncwarp();\n  write_rows", "write_rows"),
    "primary": ("ptx::griddepcontrol_wait();", ""),
}


@pytest.mark.parametrize("old, new", DROPPED.values(), ids=DROPPED)
def test_race_build_notices_a_dropped_line(old, new):
    sim = harness.mutant("race", "attend_dense.cpp", "attend_dense.cuh", old, new)
    p = dense(lengths=[1300], chunk_size=50, heads=1, kv_heads=1, top_k=8)
    p.tensors["indices"][p.tensors["indices"] < 21] = -1  # nothing in the first window
    with planted.reported(sim):
        p.run(sim, case_of(p), ANY)
