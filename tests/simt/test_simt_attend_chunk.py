"""The chunk-stationary attention in the simulator, from the selection to the result."""

import itertools
import math

import harness
import numpy as np
import planted
import pytest
import sanitized
import torch
from attend_chunk_cases import ANY, attend_case, check, errors, run, select, tensor, with_expected
from cases import Case
from harness import SCHEDULES
from support import Problem, assert_no_worse, name_of

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
CHUNK_SIZES = [1, 2, 3, 5, 8, 16, 37, 64, 128]
SLOTS = [1, 2, 4, 8, 16]
GROUPS = [(2, 2), (4, 2), (8, 1)]  # heads, key/value heads: groups of 1, 2, 8
RESULTS = ["float", "half"]


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("chunk_size", CHUNK_SIZES)
def test_chunks_slots_and_groups(plain, dtype, chunk_size):
    """Every chunk size meets every k and every group; L > T."""
    start = CHUNK_SIZES.index(chunk_size)
    for i, top_k in enumerate(SLOTS):
        heads, kv_heads = GROUPS[(start + i) % 3]
        queries = 21 if chunk_size < 64 else 13
        p = Problem(
            batch=1 + (i == 1),
            queries=queries,
            context=max(queries + 9, 3 * chunk_size + chunk_size // 2),
            heads=heads,
            kv_heads=kv_heads,
            head_dim=(16, 64, 40)[(start + i) % 3],
            chunk_size=chunk_size,
            top_k=top_k,
            dtype=dtype,
        )
        result = "float" if dtype == torch.float32 else RESULTS[i % 2]
        check(
            plain,
            p,
            select(p),
            result="final" if top_k == 1 else result,
            ahead=i % 3 != 2,
            item_rows=(64, 512, 40)[i % 3],
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("dim", [1, 16, 40, 64, 72, 128, 200, 256])
def test_head_dims(plain, dtype, dim):
    """Rows of 16-byte pieces and others, with and without partial results, by way of every load."""
    for chunk_size, top_k, ahead in ((20, 2, True), (70, 3, False), (20, 1, True)):
        p = Problem(
            batch=1, queries=12, context=160, head_dim=dim, chunk_size=chunk_size, dtype=dtype
        )
        p.top_k = top_k
        p.tensors["sink"] = torch.randn(p.heads)
        how = "final" if top_k == 1 else "half" if dtype.itemsize == 2 and not ahead else "float"
        check(plain, p, select(p), result=how, ahead=ahead)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_large_chunks_are_streamed(plain, dtype):
    for chunk_size, head_dim, ahead in ((150, 64, True), (1000, 16, False), (129, 128, True)):
        p = Problem(
            batch=1,
            queries=20,
            context=2 * chunk_size + 30,
            head_dim=head_dim,
            chunk_size=chunk_size,
            top_k=2,
            dtype=dtype,
        )
        check(plain, p, select(p), ahead=ahead, item_rows=128)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_strides_and_alignment(plain, dtype):
    def views(x):
        batch, tokens, heads, dim = x.shape
        wide = torch.randn(batch, tokens, heads, 48).to(dtype)
        yield "unaligned", wide[..., 1 : 1 + dim]
        yield "columns", wide[..., 16 : 16 + dim]
        yield "heads first", x.transpose(1, 2).contiguous().transpose(1, 2)
        yield "one head for all", x[:, :, :1].expand_as(x)

    p = Problem(queries=20, context=50, dtype=dtype)
    rows = {name: dict(views(p.tensors[name])) for name in ("query", "key", "value")}
    for kind in rows["query"]:
        p.tensors |= {name: of[kind] for name, of in rows.items()}
        check(plain, p, select(p), name=kind)
    p.tensors["value"] = rows["value"]["unaligned"]
    check(plain, p, select(p), result="final" if p.top_k == 1 else "float")


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("retrieval_heads, kv_heads, heads", [(2, 2, 6), (2, 4, 8), (3, 3, 3)])
def test_retrieval_heads(plain, dtype, retrieval_heads, kv_heads, heads):
    for top_k in (1, 3):
        p = Problem(
            queries=25,
            context=40,
            heads=heads,
            kv_heads=kv_heads,
            retrieval_heads=retrieval_heads,
            top_k=top_k,
            dtype=dtype,
            sink=True,
        )
        bias = torch.randn(p.batch, p.queries, retrieval_heads, top_k)
        scale = torch.rand(retrieval_heads) * 2
        how = {"bias_scale": scale, "effective": bias * scale[:, None]}
        check(plain, p, select(p), bias, result="final" if top_k == 1 else "float", **how)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("lengths", [[0, 17, 3, 0, 30, 1, 20], [50], [5] * 12, [2, 1, 60]])
def test_packed(plain, dtype, lengths):
    for top_k in (1, 4):
        p = Problem(lengths=lengths, top_k=top_k, dtype=dtype, sink=True)
        check(plain, p, select(p), result="final" if top_k == 1 else "float")


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("top_k", [1, 3, 40])
@pytest.mark.parametrize("sink", [False, True])
def test_bias(plain, dtype, top_k, sink):
    """NaN in unused slots is ignored, -inf drops the chunk whatever it holds."""
    p = Problem(batch=1, queries=30, context=44, top_k=top_k, dtype=dtype, sink=sink)
    indices = select(p, unused=0.3)
    bias = torch.randn(indices.shape) * 3
    bias[torch.rand(bias.shape) < 0.2] = -math.inf
    p.tensors["value"][0, 4:8] = math.nan
    bias[indices == 1] = -math.inf
    poisoned = torch.where(indices < 0, math.nan, bias)
    for result in ["final"] if top_k == 1 else RESULTS[: 4 // dtype.itemsize]:
        check(plain, p, indices, poisoned, effective=bias, result=result)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_rows_with_nothing(plain, dtype):
    p = Problem(queries=10, context=61, dtype=dtype)
    for top_k, sink in itertools.product((1, 2), (None, torch.randn(p.heads))):
        p.top_k, p.tensors["sink"] = top_k, sink
        indices = torch.full((p.batch, p.queries, 1, top_k), -1, dtype=torch.int32)
        case = attend_case(p, indices, result="final" if top_k == 1 else "float")
        got = run(plain, case)
        lse = torch.full((p.heads,), -math.inf) if sink is None else sink
        assert not got["out"].any()
        torch.testing.assert_close(
            torch.from_numpy(got["lse"]), lse.expand(got["lse"].shape), rtol=1e-6, atol=1e-6
        )


def test_problems_without_chunks_or_rows(plain):
    for changes in (dict(chunk_size=100), dict(queries=0), dict(batch=0), dict(queries=1)):
        for top_k in (1, 2):
            p = Problem(**{**changes, "top_k": top_k})
            if p.batch * p.queries == 0:
                continue  # nothing is launched
            check(plain, p, select(p), result="final" if top_k == 1 else "float")


@pytest.mark.parametrize("scale", [0.0, 0.3, -0.5, 20.0])
def test_scale(plain, scale):
    for dtype in DTYPES:
        p = Problem(batch=1, queries=20, context=40, chunk_size=5, dtype=dtype)
        check(plain, p, select(p), scale=scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["query", "key", "value"])
def test_nan_and_infinity_reach_only_rows_that_read_them(plain, dtype, where, bad):
    p = Problem(batch=1, queries=40, context=40, dtype=dtype)
    p.tensors[where][0, 9, :, 0] = bad
    check(plain, p, select(p))


def test_large_logits_do_not_overflow(plain):
    for dtype in (torch.float32, torch.bfloat16):
        p = Problem(batch=1, dtype=dtype)
        p.tensors["query"] *= 1e4
        p.tensors["key"] *= 1e4
        check(plain, p, select(p))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_sums_cut_off_as_tensor_cores_do_it(plain, dtype):
    for head_dim, chunk_size in ((64, 64), (128, 37)):
        p = Problem(
            batch=1, queries=20, context=300, head_dim=head_dim, chunk_size=chunk_size, dtype=dtype
        )
        check(plain, p, select(p), truncated=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("lengths", [None, [40, 0, 3, 47]], ids=["", "packed"])
def test_how_it_is_launched_changes_no_bit(plain, dtype, lengths):
    """Grid, items, buffers and ranges of queries are free."""
    for chunk_size, top_k in ((4, 3), (70 if lengths is None else 9, 1)):
        p = Problem(
            queries=90,
            context=200,
            chunk_size=chunk_size,
            top_k=top_k,
            dtype=dtype,
            sink=True,
            lengths=lengths,
        )
        result = "final" if top_k == 1 else "float"
        indices, bias = select(p), torch.randn(p.batch, p.queries, 1, top_k)
        case = with_expected(plain, attend_case(p, indices, bias, result=result))
        for how in (
            dict(blocks=1),
            dict(blocks=50),
            dict(item_rows=64),
            dict(item_rows=17),
            dict(ahead=False),
            dict(ahead=False, key_slots=2),
            dict(query_range=90),
            dict(query_range=32),
        ):
            other = attend_case(p, indices, bias, result=result, **how)
            other.expected = case.expected
            other.check(plain, ANY)


def test_offsets_beyond_32_bits(plain):
    """Batch entries 2^31 elements apart; the memory between them is never touched."""
    apart, p = 2**31 + 64, Problem(dtype=torch.float16, queries=20, context=20)
    for name in ("query", "key", "value"):
        try:
            memory = torch.from_numpy(np.zeros(apart + 20 * 64, np.float16))
        except MemoryError:
            pytest.skip("no address space for 4 GiB")
        x = p.tensors[name]
        far = memory.as_strided(x.shape, (apart, *x.stride()[1:]))
        p.tensors[name] = far.copy_(x)
        check(plain, p, select(p))
        p.tensors[name] = x


@pytest.mark.parametrize("top_k", [1, 3])
def test_wrong_values_reach_no_foreign_memory(plain, race, top_k):
    """The host never looks at them; the race build reports any access out of bounds."""
    rng = np.random.default_rng(2)
    result = "final" if top_k == 1 else "float"
    for cu_seqlens in (None, [0, 90, 10, 61], [-7, 20, 2**31 - 1, 5], [5, 5, 5, 5]):
        p = Problem(lengths=[20, 21, 20], top_k=top_k) if cu_seqlens else Problem(batch=1)
        wild = rng.integers(-3, 25, (1, p.queries, 1, top_k), dtype=np.int32)
        wild = torch.from_numpy(np.where(rng.random(wild.shape) < 0.1, 2**31 - 1, wild))
        if cu_seqlens:
            p.tensors["cu_seqlens"] = torch.tensor(cu_seqlens, dtype=torch.int32)
        case = attend_case(p, wild, result=result)
        for sim in (plain, race):
            run(sim, case)
        if not cu_seqlens:
            position = torch.arange(p.queries) + p.context - p.queries
            eligible = (position // p.chunk_size)[None, :, None, None]
            valid = torch.where((wild >= 0) & (wild < eligible), wild, -1)
            for name, values in errors(p, run(plain, case), valid).items():
                assert_no_worse(name, *values)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=name_of)
def test_values_of_alternating_sign(plain, dtype):
    """Where partial results cancel, their rounding shows: why fp16 problems have fp32 partials."""
    for top_k in (2, 8, 16):
        p = Problem(
            batch=1, queries=40, context=400, head_dim=64, chunk_size=16, top_k=top_k, dtype=dtype
        )
        sign = torch.where(torch.arange(400) // 16 % 2 == 0, 1, -1)[None, :, None, None]
        p.tensors["query"] *= 0.1
        p.tensors["value"] = ((4 + torch.rand(1, 400, 2, 64)) * sign).to(dtype)
        indices = torch.arange(top_k).expand(1, 40, 1, top_k).int().contiguous()
        for result in RESULTS:
            got = run(plain, attend_case(p, indices, result=result))
            values = errors(p, got, indices)["out"]
            error, unaided = ((x.double() - values[2]).abs().max().item() for x in values[:2])
            print(f"{name_of(dtype)} k={top_k} {result}: {error:.2e}, {2 * unaided:.2e} allowed")
            if result == "float" or dtype == torch.bfloat16:
                assert_no_worse(f"k={top_k} {result}", *values)
            else:
                assert error > 2 * unaided, "the default could be fp16 partials"


def test_fp16_partials_of_any_magnitude(plain):
    """Values times a power of two: results times the same, though bfloat16 goes far beyond fp16."""
    p = Problem(batch=1, queries=40, context=50, dtype=torch.bfloat16)
    p.tensors["query"][0, 30:] *= 20  # weights of one and zero
    value, indices, outs = p.tensors["value"], select(p), []
    for factor in (1, 2.0**100, 2.0**-100):
        p.tensors["value"] = value * factor
        got = run(plain, attend_case(p, indices, result="half"))
        outs.append(tensor(got["out"], p.dtype).double() / factor)
    for out in outs[1:]:
        torch.testing.assert_close(out, outs[0], rtol=0, atol=1e-9)


def covering() -> list[Case]:
    """Every tile and every way out, small: resident and streamed, packed, unaligned, both partials, k = 1."""
    cases = []
    for dtype, (dim, chunk_size, result, ahead, lengths) in (
        (torch.bfloat16, (64, 5, "half", True, None)),
        (torch.bfloat16, (128, 70, "float", True, None)),
        (torch.bfloat16, (200, 40, "final", False, None)),
        (torch.float16, (40, 8, "final", True, [0, 20, 25])),
        (torch.float16, (37, 20, "half", True, None)),
        (torch.float16, (256, 33, "float", True, None)),
        (torch.float32, (64, 3, "final", True, None)),
        (torch.float32, (72, 40, "float", True, None)),
        (torch.float32, (3, 20, "float", False, [17, 0, 40])),
        (torch.float32, (256, 20, "float", True, None)),
    ):
        queries = 24 if dim <= 64 else 12
        p = Problem(
            batch=1,
            queries=queries,
            context=queries + 2 * chunk_size,
            heads=6,
            kv_heads=2,
            head_dim=dim,
            chunk_size=chunk_size,
            top_k=1 if result == "final" else 3,
            dtype=dtype,
            sink=True,
            lengths=lengths,
        )
        bias = torch.randn(1, p.queries, 1, p.top_k)
        cases.append(
            attend_case(p, select(p), bias, result=result, ahead=ahead, item_rows=80, blocks=2)
        )
    return cases


def test_every_schedule_gives_the_same(plain):
    for case in covering():
        with_expected(plain, case)
        for schedule in SCHEDULES:
            case.check(plain, schedule)


def test_no_race_under_any_schedule(plain, race):
    for i, case in enumerate(covering()):
        with_expected(plain, case)
        for schedule in SCHEDULES[i % 7 :: 7]:
            case.check(race, schedule)


def test_sanitizers(plain):
    cases = [with_expected(plain, case) for case in covering()]
    sanitized.check([(case, [SCHEDULES[i]]) for i, case in enumerate(cases)])


STEP = "__syncthreads();  // this step is there"
DROPPED = {
    "tokens": ("attend_chunk", "__syncthreads();\n    attend_item", "attend_item"),
    "items": ("attend_chunk", "__syncthreads();  // the item before", "//"),
    "copies": ("attend_chunk", "ptx::cp_async_wait_all();", ""),
    "steps": ("attend_chunk", STEP, "//"),
    "buffers": ("attend_chunk", "__syncthreads();  // the step before", "//"),
    "queries": ("attend_chunk", "if (staged) __syncwarp();", ""),
    "staging": ("attend_chunk", "return;\n  __syncwarp();", "return;"),
    "index": ("attend_chunk", "ptx::griddepcontrol_wait();", ""),
    "partials": ("attend_merge", "ptx::griddepcontrol_wait();", ""),
}


@pytest.mark.parametrize("header, old, new", DROPPED.values(), ids=DROPPED)
def test_race_build_notices_a_dropped_line(header, old, new):
    sim = harness.mutant("race", "attend_chunk.cpp", f"{header}.cuh", old, new)
    ahead = "the step before" not in old
    p = Problem(batch=1, queries=60, heads=6, head_dim=64, dtype=torch.bfloat16)
    case = attend_case(p, select(p), result="half", ahead=ahead, item_rows=200, blocks=1)
    with planted.reported(sim):
        for schedule in SCHEDULES[::4]:
            run(sim, case, schedule)
