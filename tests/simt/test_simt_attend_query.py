"""The query-stationary attention kernels in the simulator, against resona_ext/reference.py."""

import itertools
import math

import harness
import numpy as np
import planted
import pytest
import sanitized
import torch
from attend_cases import ANY, DTYPES, Attention, name_of, poison
from harness import SCHEDULES

LANES, TENSOR = "attend_query_kernel", "attend_query_mma_kernel"


@pytest.fixture(autouse=True)
def one_thread(threads):
    threads(1)  # problems are small: more threads only wait for each other


def instances(p: Attention):
    """The choices that a launch has for a problem: those that read the fewest bytes, one per kernel."""
    group = p.heads // p.kv_heads
    lanes = next(n for n in (8, 16, 32) if 8 * n >= p.head_dim) if p.vector else 32
    several = p.vector and p.dtype == torch.float32 and group > 1
    yield {
        "lanes": max(lanes, 16) if several else lanes,
        "heads_at_once": 4 if several else 1,
        "dim_instance": 0,
    }
    if p.vector and p.dtype != torch.float32:
        dim = next(n for n in (64, 128, 256) if n >= p.head_dim)
        heads = 16 if dim == 128 and group > 8 else 8
        yield {"lanes": 0, "heads_at_once": heads, "dim_instance": dim}


def cases(p: Attention, splits=1, blocks=3, kernel=None):
    for choice in instances(p):
        if kernel is None or (choice["dim_instance"] == 0) == (kernel == LANES):
            yield p.case("attend_query", splits=splits, blocks=blocks, **choice)


def check(sim, p: Attention, **options):
    for case in cases(p, **options):
        p.check(sim, case)


SIZES = [1, 2, 3, 5, 8, 16, 37, 64, 128]


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("chunk_size", SIZES)
def test_chunk_sizes_slots_and_groups(plain, dtype, chunk_size):
    for n, top_k in enumerate([1, 2, 4, 8, 16]):
        group = (1, 2, 8)[(n + SIZES.index(chunk_size)) % 3]
        queries = 3 if chunk_size * top_k > 100 else 10
        context = queries + chunk_size * min(top_k, 6) + chunk_size // 2
        p = Attention(
            dtype,
            queries=queries,
            context=context,
            heads=group,
            kv_heads=1,
            head_dim=(16, 40, 64)[n % 3],
            chunk_size=chunk_size,
            top_k=top_k,
            bias=n % 2 == 0,
            sink=n % 3 == 0,
        )
        check(plain, p, splits=(1, 2, 4)[n % 3])


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("dim", [1, 8, 16, 40, 64, 72, 128, 200, 256])
def test_head_dims_and_heads(plain, dtype, dim):
    for heads, kv_heads, retrieval_heads in ((2, 2, 2), (6, 2, 1), (20, 2, 2)):
        shape = {"heads": heads, "kv_heads": kv_heads, "retrieval_heads": retrieval_heads}
        p = Attention(dtype, 2, 5, 26, **shape, head_dim=dim, chunk_size=3, bias=True, sink=True)
        check(plain, p)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_every_instance_takes_narrower_rows_and_fewer_heads(plain, dtype):
    p = Attention(dtype, heads=9, kv_heads=3, head_dim=24, chunk_size=5, bias=True)
    lanes = [(8, 1), (16, 1), (32, 1)]
    lanes += [(16, 4), (32, 4)] if dtype == torch.float32 else []
    for count, heads in lanes:
        choice = {"lanes": count, "heads_at_once": heads, "dim_instance": 0}
        p.check(plain, p.case("attend_query", splits=1, blocks=2, **choice))
    for dim, heads in ((64, 8), (128, 8), (128, 16), (256, 8)):
        if dtype != torch.float32:
            choice = {"lanes": 0, "heads_at_once": heads, "dim_instance": dim}
            p.check(plain, p.case("attend_query", splits=1, blocks=2, **choice))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_what_must_not_matter_does_not(plain, dtype):
    """Wrong indices, NaN in the bias of unused slots; and -inf drops a chunk."""
    for shape in ({"head_dim": 64}, {"chunk_size": 1, "top_k": 9}, {"lengths": [9, 0, 2, 31]}):
        p = Attention(dtype, **shape, bias=True, bias_scale=True, sink=True)
        poison(p)
        check(plain, p)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_rows_with_nothing(plain, dtype):
    for sink in (None, torch.tensor([0.5, -math.inf]), torch.tensor([-3e38, 80.0])):
        p = Attention(dtype, queries=14, context=14, bias=True)
        p.tensors["indices"][:, 7:] = -1
        p.tensors["bias"][:, 5:7] = -math.inf
        p.tensors["sink"] = sink
        for case in cases(p):
            out, lse = p.run(plain, p.check(plain, case))
            expected = torch.full((2,), -math.inf) if sink is None else sink
            assert torch.count_nonzero(out[:, 5:]) == 0
            torch.testing.assert_close(lse[0, 5:], expected.expand(9, 2))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_a_repeated_index_counts_each_time(plain, dtype):
    p = Attention(dtype, top_k=1, sink=True)
    p.tensors["indices"] = p.tensors["indices"].repeat(1, 1, 1, 5)
    p.top_k = 5
    check(plain, p)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["query", "key", "value"])
def test_nan_and_infinity_reach_only_rows_that_read_them(plain, where, bad):
    for dtype in DTYPES:
        p = Attention(dtype, queries=24, context=24, heads=4, sink=True)
        p.tensors[where][0, 9, :, 3] = bad
        check(plain, p)


@pytest.mark.parametrize("scale", [0.0, 0.3, -0.5, 20.0])
def test_scale_and_large_logits(plain, scale):
    for dtype in DTYPES:
        check(plain, Attention(dtype, chunk_size=5, scale=scale))
    p = Attention(torch.float32, bias=True, sink=True)
    p.tensors["bias"] += 1e9 * (scale - 0.1)
    check(plain, p)


def test_large_finite_bias_does_not_overflow(plain):
    p = Attention(torch.float32, bias=True)
    p.tensors["bias"][:] = torch.finfo(torch.float32).min
    check(plain, p)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
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
        p = Attention(dtype, 2, 30, 30, 4, 4, 40, top_k=2)
        p.tensors |= {name: view(x) for name, x in wide.items()}
        check(plain, p)


@pytest.mark.parametrize("lengths", [[0, 17, 3, 0, 20, 1], [0, 0, 5], [40], [5] * 9])
def test_packed(plain, lengths):
    for dtype in DTYPES:
        check(plain, Attention(dtype, lengths=lengths, heads=4, bias=True, sink=True), splits=2)


@pytest.mark.parametrize(
    "shape",
    [{"queries": 0}, {"batch": 0}, {"queries": 0, "context": 0}, {"chunk_size": 10**12}],
    ids=str,
)
def test_nothing_to_do(plain, shape):
    for dtype in DTYPES:
        p = Attention(dtype, **shape)
        for case in cases(p):
            out, lse = p.run(plain, case)
            assert torch.count_nonzero(out) == 0 and lse.eq(-math.inf).all()


def test_offsets_beyond_32_bits(plain):
    """Batch entries 2^31 elements apart; the memory between them is never touched."""
    apart = 2**31 + 64
    try:
        memory = torch.from_numpy(np.zeros(apart + 1024, np.float16))
    except MemoryError:
        pytest.skip("no address space for 4 GiB")
    p = Attention(torch.float16, 2, 16, 16, 2, 2, 32)
    x = memory.as_strided((2, 16, 2, 32), (apart, 64, 32, 1))
    x.copy_(torch.randn(2, 16, 2, 32))
    p.tensors |= {"query": x, "key": x, "value": x}
    check(plain, p)


@pytest.mark.parametrize("cu_seqlens", [[0, 90, 10, 60], [-7, 20, 2**31 - 1], [5, 5, 5]])
def test_wrong_cu_seqlens_reach_no_foreign_memory(race, cu_seqlens):
    """The host never looks at them; the race build reports any access out of bounds."""
    for dtype in (torch.float32, torch.float16):
        p = Attention(dtype, lengths=[30] + [0] * (len(cu_seqlens) - 2))
        p.tensors["cu_seqlens"] = torch.tensor(cu_seqlens, dtype=torch.int32)
        for case in cases(p):
            p.run(race, case)


def test_the_number_of_blocks_changes_no_bit(plain):
    for dtype in DTYPES:
        p = Attention(dtype, 2, 9, 30, bias=True)
        for kernel in (LANES, TENSOR):
            runs = [
                p.run(plain, case)
                for blocks in (1, 2, 7, 50)
                for case in cases(p, blocks=blocks, kernel=kernel)
            ]
            assert all(torch.equal(a, b) for run in runs for a, b in zip(run, runs[0], strict=True))


def test_products_that_are_cut_off(plain):
    """Tensor cores do not round their sums; the tolerance holds all the same."""
    for dtype in DTYPES[1:]:
        p = Attention(dtype, heads=8, head_dim=128, chunk_size=16)
        for case in cases(p, kernel=TENSOR):
            p.check(plain, case, truncated_products=True)


def covering(plain):
    """Both kernels, split and not, packed, poisoned, unaligned; small. Results of the plain build."""
    shapes = [
        (torch.float32, {"heads": 4, "head_dim": 72, "queries": 5}, 2),
        (torch.float32, {"head_dim": 5, "chunk_size": 1, "queries": 5}, 1),
        (torch.bfloat16, {"lengths": [9, 0, 8], "head_dim": 64, "top_k": 2}, 4),
        (torch.bfloat16, {"head_dim": 128, "chunk_size": 9, "queries": 3, "heads": 24}, 2),
        (torch.float16, {"head_dim": 200, "chunk_size": 2, "queries": 3}, 1),
        (torch.float16, {"head_dim": 16, "chunk_size": 16, "top_k": 4, "queries": 2}, 4),
    ]
    made = []
    for dtype, shape, splits in shapes:
        p = Attention(dtype, **shape, bias=True, bias_scale=True, sink=True)
        poison(p)
        made += [p.check(plain, case) for case in cases(p, splits=splits, blocks=2)]
    return made


def test_every_schedule_gives_the_same_without_races(plain, race):
    made = covering(plain)
    assert len(made) <= 12
    for case, schedule in itertools.product(made, SCHEDULES):
        case.check(plain, schedule)
        case.check(race, schedule)


def test_sanitizers(plain):
    made = covering(plain)
    sanitized.check([(case, SCHEDULES[::5]) for case in made])


ROW = "attend_query_row.cuh"
DROPPED = {
    "splits are written": (ROW, LANES, "__syncthreads();\n  if (first)", "if (first)"),
    "splits are read": (ROW, TENSOR, "__syncthreads();  // read before the next", "//"),
    "primary of the lanes": ("attend_query.cuh", LANES, "ptx::griddepcontrol_wait();", ""),
    "primary of the tensor cores": (
        *("attend_query_mma.cuh", TENSOR),
        *("ptx::griddepcontrol_wait();", ""),
    ),
}


@pytest.mark.parametrize("header, kernel, old, new", DROPPED.values(), ids=DROPPED)
def test_race_build_notices_a_dropped_line(header, kernel, old, new):
    sim = harness.mutant("race", "attend_query.cpp", header, old, new)
    p = Attention(torch.bfloat16, lengths=[40])
    (case,) = cases(p, splits=2, blocks=1, kernel=kernel)
    with planted.reported(sim):
        p.run(sim, case, ANY)
