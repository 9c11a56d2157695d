"""The gradients of attend in the simulator: autograd through the reference in float64 is the truth."""

import itertools
import math
import re
from dataclasses import replace

import harness
import numpy as np
import planted
import pytest
import sanitized
import torch
from attend_cases import ANY, DTYPES, Attention, name_of, poison
from attend_gradients import Backward, arguments, forward, plan
from cases import Case
from harness import SCHEDULES

LARGE = {  # B, T, L, H, Hkv, R, D, S, k; batch entries, queries and heads at once; MiB
    "4K": ((4, 4096, 4096, 16, 16, 1, 128, 64, 8), (4, 4096, 6), 512),
    "64K": ((1, 65536, 65536, 16, 16, 1, 128, 64, 8), (1, 65536, 1), 512),
    "small chunks": ((2, 65536, 65536, 16, 16, 1, 128, 2, 1), (2, 65536, 16), 512),
    "grouped": ((2, 65536, 65536, 16, 2, 1, 128, 64, 8), (1, 11328, 1), 512),
    # d K and d V of one head of a list, in float32, cannot be cut.
    "own selections": ((1, 65536, 65536, 16, 16, 16, 64, 64, 8), (1, 6208, 1), 1024),
    "1M": ((1, 2**20, 2**20, 16, 16, 1, 128, 64, 8), (1, 51136, 1), 1536),
    "beyond all tensors": ((2**20, 2**30, 2**30, 8, 8, 1, 256, 1, 64), (1, 3904, 1), 2**62),
}


@pytest.mark.parametrize("shape, parts, most", LARGE.values(), ids=LARGE)
def test_workspace_is_bounded(shape, parts, most):
    names = ("batch", "queries", "context", "heads", "kv_heads", "retrieval_heads", "head_dim")
    scalars = dict(zip((*names, "chunk_size", "top_k"), shape, strict=True))
    rows = ("query", "key", "value", "out", "out_gradient")
    rows += ("query_gradient", "key_gradient", "value_gradient")
    scalars |= {f"{name}_{axis}_stride": 0 for name in rows for axis in ("batch", "token", "head")}
    scalars |= {"dtype": "bfloat16", "vector": 1, "scale": "1", "sequences": 0, "sms": 132}
    size, *found, _ = plan(scalars)
    assert tuple(found) == parts and size <= most << 20


SIZES = [1, 2, 3, 5, 8, 16, 37, 64, 128]
TOP_K = [1, 2, 4, 8, 16]
GROUPS = [1, 2, 8]
DIMS = [16, 40, 64, 128, 200, 256]


TILES = {"lane_keys": 0}


def check_paths(backward: Backward, sim) -> None:
    """What the plan chooses, and tiles too if it chooses a warp per list."""
    backward.check(sim)
    *_, lane_keys = plan(backward.case().scalars)
    if lane_keys:
        backward.scalars |= TILES
        backward.check(sim)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("chunk_size", SIZES)
def test_equals_autograd(plain, dtype, chunk_size):
    """Every k, group and dim for each dtype and chunk size, if not with each other."""
    for i, top_k in enumerate(TOP_K):
        at = i + SIZES.index(chunk_size) + DTYPES.index(dtype)
        p = Attention(
            dtype,
            queries=9,
            context=3 * chunk_size + 8,
            heads=GROUPS[at % 3],
            kv_heads=1,
            head_dim=DIMS[at % 6],
            chunk_size=chunk_size,
            top_k=top_k,
            sink=at % 2 == 0,
            bias=at % 3 == 0,
        )
        check_paths(Backward(p, lse_gradient=at % 4 == 0), plain)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_heads_and_batches(plain, dtype):
    """Retrieval heads, groups of three, batches; a bias with a factor, a scale."""
    for retrieval_heads, kv_heads, heads in ((1, 2, 6), (2, 4, 8), (3, 3, 3)):
        p = Attention(
            dtype,
            batch=2,
            heads=heads,
            kv_heads=kv_heads,
            retrieval_heads=retrieval_heads,
            sink=True,
            bias=True,
            bias_scale=True,
            scale=0.3,
        )
        Backward(p, lse_gradient=True, sms=2).check(plain)


PACKINGS = {"ragged": [0, 17, 3, 0, 30, 1, 12, 0], "short": [2, 3, 1], "one": [50], "many": [7] * 9}


@pytest.mark.parametrize("lengths", PACKINGS.values(), ids=PACKINGS)
def test_packed(plain, lengths):
    for dtype, chunk_size in zip(DTYPES, (4, 1, 6), strict=True):
        p = Attention(dtype, lengths=lengths, chunk_size=chunk_size, heads=4, sink=True, bias=True)
        Backward(p, lse_gradient=True).check(plain)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_wrong_indices_are_unused_slots(plain, dtype):
    """And so are slots whatever their bias; -inf drops the chunk of one that counts."""
    for lengths, top_k in ((None, 1), (None, 6), ([5, 30, 0, 9], 1), ([5, 30, 0, 9], 6)):
        p = Attention(dtype, queries=30, lengths=lengths, bias=True, top_k=top_k, sink=True)
        poison(p)
        got = Backward(p, lse_gradient=True).check(plain)
        dropped = p.tensors["bias"] == -math.inf
        assert dropped.any() and not got["bias_gradient"][dropped].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_strides_and_alignment(plain, dtype):
    wide = torch.randn(2, 42, 4, 90).to(dtype)
    views = {
        "columns": wide[..., 16:56],
        "unaligned rows": wide[..., 1:41],
        "every other row": wide[:, ::2, :, :37],
        "heads first": wide.transpose(1, 2).contiguous().transpose(1, 2),
        "one head for all": wide[:, :, :1, :64].expand(2, 42, 4, 64),
    }
    for name, view in views.items():
        batch, tokens, heads, dim = view.shape
        p = Attention(
            dtype, batch, 12, tokens, heads, heads, dim, chunk_size=4, top_k=2, retrieval_heads=2
        )
        p.tensors |= {"query": view[:, 3:15], "key": view, "value": view.flip(1)}
        backward = Backward(p)
        if name == "columns":
            backward.out_gradient = view[:, 20:32]
        backward.check(plain)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_large_common_bias(plain, dtype):
    """A float32 lse of 10^4 is coarse; the weights are not."""
    for level, sink in itertools.product((1e4, -1e4), (False, True)):
        p = Attention(dtype, queries=20, bias=True, sink=sink, top_k=4)
        p.tensors["bias"] += level
        if sink:
            p.tensors["sink"] += level
        Backward(p, lse_gradient=True).check(plain)


def test_weights_sum_to_one_under_a_large_bias(plain):
    """Which a lse that is rounded to 10^-3 would not give: sums of d logit vanish without d lse."""
    p = Attention(torch.float32, queries=20, bias=True, top_k=4)
    p.tensors["bias"] = (p.tensors["bias"] * 64).round() / 64  # 10^4 + bias is exact
    backward = Backward(p)
    p.tensors["bias"] += 1e4
    backward.lse = forward(p)[1]  # `out` stays what it is
    assert backward.run(plain)["bias_gradient"].sum(-1).abs().max() < 2e-5


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_long_lists_are_cut(plain, dtype):
    """One chunk that every row selects, some that many do; segments that end within a group."""
    p = Attention(
        dtype, queries=90, context=120, heads=3, kv_heads=1, top_k=4, sink=True, bias=True
    )
    p.tensors["indices"][..., 0] = torch.where(p.eligible() > 0, 0, -1).view(1, -1, 1).int()
    for segment in (64, 100, 256):
        check_paths(Backward(p, segment=segment), plain)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_parts(plain, dtype):
    """Some batch entries, heads and queries at a time: as if the workspace were small."""
    shape = dict(queries=20, context=50, heads=4, kv_heads=2, sink=True, bias=True)
    for lengths, parts in (
        (None, {"plan_batch": 1}),
        (None, {"plan_heads": 1}),
        (None, {"plan_batch": 1, "plan_heads": 1, "plan_queries": 8}),
        ([5, 0, 13, 6], {"plan_queries": 16}),
    ):
        p = Attention(dtype, 2, lengths=lengths, **shape)
        check_paths(Backward(p, lse_gradient=True, **parts), plain)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=name_of)
def test_sums_cut_off_as_hardware_does(plain, dtype):
    for head_dim, chunk_size in ((64, 16), (128, 70), (256, 40)):
        p = Attention(dtype, context=150, head_dim=head_dim, chunk_size=chunk_size, sink=True)
        Backward(p).check(plain, truncated_products=True)


def test_nothing_to_do(plain):
    for dtype in DTYPES:
        for shape in ({"context": 12, "chunk_size": 13}, {"queries": 0}, {"batch": 0}):
            got = Backward(Attention(dtype, sink=True, bias=True, **shape)).run(plain)
            assert not any(x.any() for x in got.values())
        p = Attention(dtype, sink=True)
        p.tensors["indices"][:] = -1
        Backward(p, lse_gradient=True).check(plain)


def on_the_cpu(p: Attention, out_gradient) -> dict[str, torch.Tensor]:
    """The CPU operator: the reference reads token 0 for slots that are not used."""
    a = arguments(p)
    for name in ("query", "key", "value"):
        a[name] = a[name].detach().clone().requires_grad_()
    out, _ = torch.ops.resona.attend(a["query"], a["key"], a["value"], a["indices"], p.chunk_size)
    (out * out_gradient).sum().backward()
    return {name: a[name].grad for name in ("query", "key", "value")}


@pytest.mark.parametrize("place", ["query", "key", "value", "out_gradient"])
def test_nan_and_infinity_stay_with_those_who_read_them(plain, place):
    for value in (math.nan, math.inf, -math.inf):
        p = Attention(torch.float32, queries=40, context=40, top_k=2)
        if place != "out_gradient":
            p.tensors[place][0, 20, 0, 3] = value
        backward = Backward(p)
        if place == "out_gradient":
            backward.out_gradient[0, 20, 0, 3] = value
        got, truth = backward.run(plain), on_the_cpu(p, backward.out_gradient)
        for name, there in truth.items():
            here = got[f"{name}_gradient"]
            tainted = ~here.isfinite().all(-1)
            assert torch.equal(tainted, ~there.isfinite().all(-1)), (place, value, name)
            torch.testing.assert_close(here[~tainted], there[~tainted], rtol=1e-4, atol=1e-5)


def test_offsets_beyond_32_bits(plain):
    """Batch entries 2^31 elements apart; the memory between them is never touched."""
    apart = 2**31 + 64
    try:
        memory = torch.from_numpy(np.zeros(apart + 1920, np.float16))
    except MemoryError:
        pytest.skip("no address space for 4 GiB")
    x = memory.as_strided((2, 30, 2, 32), (apart, 64, 32, 1))
    x.copy_(torch.randn(2, 30, 2, 32))
    p = Attention(torch.float16, 2, 12, 30, head_dim=32)
    p.tensors |= {"query": x[:, :12], "key": x, "value": x}
    Backward(p).check(plain)


def with_wrong_cu_seqlens() -> list[Case]:
    """Any numbers: chunks may share tokens, and so have several writers, but reach no foreign memory."""
    cases = []
    for cu_seqlens in ([0, 40, 5, 20], [-7, 20, 2**31 - 1], [5, 5, 5], [0, 31, 0, 31], [9, 1, 20]):
        lengths = [31] + [0] * (len(cu_seqlens) - 2)
        p = Attention(torch.float32, lengths=lengths, head_dim=24, top_k=2)
        case = Backward(p, item_blocks=2, row_blocks=2).case()
        case.inputs["cu_seqlens"] = np.array(cu_seqlens, np.int32)
        cases.append(replace(case, name=f"{case.name} {cu_seqlens}"))
    return cases


def test_wrong_cu_seqlens_reach_no_foreign_memory(race):
    for case in with_wrong_cu_seqlens():
        try:
            case.check(race, ANY)
        except race.Error as error:
            assert re.search(r"race: writes byte \d+ of '(key|value)_gradient'", str(error))


def covering() -> list[Case]:
    """Each tile, 16-bit and fp32; several tiles of keys, cut lists, unaligned rows, parts; warps alone."""
    small = dict(queries=10, context=26, heads=2, kv_heads=1, top_k=2, sink=True)
    problems = [
        (Attention(torch.bfloat16, head_dim=64, bias=True, **small), {"segment": 64, **TILES}),
        (Attention(torch.float16, head_dim=40, lengths=[9, 0, 13], chunk_size=3), TILES),
        (Attention(torch.float32, head_dim=40, bias=True, **small), {"plan_queries": 8, **TILES}),
        (Attention(torch.float16, head_dim=37, **small), TILES),
        (Attention(torch.float32, head_dim=130, **{**small, "chunk_size": 18}), {}),
        (Attention(torch.bfloat16, head_dim=136, **{**small, "context": 90, "chunk_size": 40}), {}),
        (Attention(torch.bfloat16, head_dim=64, bias=True, **small), {"segment": 8}),
        (Attention(torch.float16, head_dim=100, lengths=[9, 0, 13], chunk_size=3), {}),
        (Attention(torch.float32, head_dim=80, bias=True, **small), {"plan_queries": 8}),
        (Attention(torch.float32, head_dim=129, **small), {}),
        (Attention(torch.bfloat16, head_dim=128, **{**small, "chunk_size": 8, "top_k": 1}), {}),
    ]
    return [
        Backward(p, lse_gradient=True, item_blocks=2, row_blocks=2, **plan).case()
        for p, plan in problems
    ]


def exactly(case: Case, sim) -> Case:
    """The case that expects the very bits of a first run."""
    got = case.check(sim, ANY)
    results = {name: got[name] for name in got if name.endswith("_gradient")}
    workspace = {"workspace": case.workspace["workspace"]}
    return replace(case, expected=results, workspace=workspace)


def test_same_bits_under_every_schedule_without_races(plain, race):
    for case in covering():
        case = exactly(case, plain)
        for schedule in SCHEDULES:
            case.check(plain, schedule)
        for schedule in SCHEDULES[::5]:
            case.check(race, schedule)


def test_same_bits_on_any_grid(plain):
    for case in covering():
        case = exactly(case, plain)
        for blocks in (1, 7):
            scalars = case.scalars | {"item_blocks": blocks, "row_blocks": blocks}
            replace(case, scalars=scalars).check(plain, ANY)


def test_sanitizers():
    cases = [*covering(), *with_wrong_cu_seqlens()[:3]]
    sanitized.check([(case, SCHEDULES[::10]) for case in cases])


DROPPED = {
    "step": "    __syncthreads();  // this step is there\n",
    "weights": "    __syncthreads();  // weights are there\n",
    "rows read": "    __syncthreads();  // Q and d O have been read\n",
    "keys": "  __syncthreads();  // the tile of keys before has been worked off\n",
    "copies": "    ptx::cp_async_wait_all();\n",
    "item": "    __syncthreads();  // the item before has been worked off\n",
    "primary": "  ptx::griddepcontrol_wait();\n  const int key_tiles",
}


LANES_DROPPED = {
    "items": "    __syncwarp();  // items are there\n",
    "items before": "    __syncwarp();  // the batch before has been worked off\n",
    "primary": "  ptx::griddepcontrol_wait();\n",
}


@pytest.mark.parametrize("old", LANES_DROPPED.values(), ids=LANES_DROPPED)
def test_race_build_notices_a_dropped_line_of_a_warp(old):
    sim = harness.mutant("race", "attend_backward.cpp", "attend_backward_lanes.cuh", old, "")
    p = Attention(torch.bfloat16, queries=150, context=800, top_k=2)
    case = Backward(p, item_blocks=1).case()
    with planted.reported(sim):
        for schedule in SCHEDULES[::3]:
            case.check(sim, schedule)


@pytest.mark.parametrize("old", DROPPED.values(), ids=DROPPED)
def test_race_build_notices_a_dropped_line(old):
    new = "  const int key_tiles" if "key_tiles" in old else ""
    sim = harness.mutant("race", "attend_backward.cpp", "attend_backward.cuh", old, new)
    p = Attention(
        torch.bfloat16, queries=50, context=100, head_dim=136, chunk_size=33, top_k=2, bias=True
    )
    case = Backward(p, item_blocks=1).case()
    with planted.reported(sim):
        for schedule in SCHEDULES[:3]:
            case.check(sim, schedule)
