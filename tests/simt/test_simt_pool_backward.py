"""pool_backward_kernel in the simulator: the bits of torch.ops.resona._pool_chunks_backward."""

import math

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
from test_simt_pool import DTYPES, PACKINGS, instance, name_of, storage

ANY = SCHEDULES[0]


def pool_backward_case(
    x, chunk_size, lengths=None, blocks=None, choice=None, gradient=None, name=""
) -> Case:
    """x [B, L, R, E], any strides; lengths of packed sequences."""
    batch, length, heads, dim = x.shape
    cu_seqlens = None
    shape = (batch, length // chunk_size, heads, dim)
    gradient = torch.randn(shape).to(x.dtype) if gradient is None else gradient
    inputs, workspace = {"context": storage(x), "chunk_gradient": storage(gradient)}, {}
    if lengths is not None:
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
        inputs["cu_seqlens"] = cu_seqlens.numpy()
        workspace["chunk_begin"] = np.empty(len(lengths) + 1, np.int32)
    expected = torch.ops.resona._pool_chunks_backward(gradient, x, chunk_size, cu_seqlens)
    lanes, vector = choice or instance(x)
    stride = dict(zip(("batch", "token", "head"), x.stride(), strict=False))
    return Case(
        name=f"pool_backward {name} {name_of(x.dtype)} {tuple(x.shape)} S={chunk_size} "
        f"lanes={lanes} vector={vector}",
        kernel="pool_backward",
        inputs=inputs,
        expected={"context_gradient": storage(expected)},
        workspace=workspace,
        dtypes={"context_gradient": name_of(x.dtype)},
        scalars={
            **{f"{name}_stride": value for name, value in stride.items()},
            **{"batch": batch, "length": length, "heads": heads, "dim": dim},
            **{"chunk_size": chunk_size, "dtype": name_of(x.dtype)},
            **{"sequences": len(lengths or []), "lanes": lanes, "vector": int(vector)},
            "blocks": blocks or max(1, math.ceil(math.prod(shape[:3]) / 16)),
        },
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("dim", [1, 7, 16, 40, 64, 128, 256, 264, 768])
@pytest.mark.parametrize("chunk_size", [1, 2, 3, 5, 8, 16, 37, 64])
def test_equals_the_cpu(plain, dtype, dim, chunk_size):
    x = torch.randn(2, 2 * chunk_size + chunk_size // 2, 2, dim).to(dtype)
    pool_backward_case(x, chunk_size).check(plain, ANY)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_every_instance_takes_any_width(plain, dtype):
    for dim in (8, 72, 200, 264):
        x = torch.randn(1, 21, 3, dim).to(dtype)
        for choice in ((8, True), (16, True), (32, True), (32, False)):
            pool_backward_case(x, 4, choice=choice).check(plain, ANY)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_strides_and_alignment(plain, dtype):
    wide = torch.randn(2, 30, 3, 100).to(dtype)
    views = {
        "columns": wide[..., 16:56],
        "unaligned rows": wide[..., 1:41],
        "every other token": wide[:, ::2, :, :48],
        "heads first": wide.transpose(1, 2).contiguous().transpose(1, 2),
        "one head for all": wide[:, :, :1, :64].expand(2, 30, 4, 64),
    }
    for name, view in views.items():
        pool_backward_case(view, 4, name=name).check(plain, ANY)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_hard_values(plain, dtype):
    x = torch.randn(1, 52, 1, 40).to(dtype)
    gradient = torch.randn(1, 13, 1, 40).to(dtype)
    x[:, 0:8] = 0  # zero norm, once with a gradient of NaN: zero all the same
    gradient[:, 1] = math.nan
    x[:, 8:10] = -x[:, 10:12].flip(1)  # cancels in part
    x[:, 12, :, 3], x[:, 16, :, 3] = math.nan, math.inf
    x[:, 20:24] = torch.finfo(dtype).tiny / 8  # subnormal: gradients overflow
    x[:, 24:28] = torch.finfo(dtype).max  # fp32 sums overflow
    x[:, 28:32] *= 1e-3
    gradient[:, 8, :, 5], gradient[:, 9, :, 5] = math.inf, math.nan
    gradient[:, 10] = 0
    gradient[:, 11] = x[:, 44]  # along the chunk
    x[:, 45:48] = 0
    for choice in ((8, True), (16, True), (32, False)):
        pool_backward_case(x, 4, choice=choice, gradient=gradient).check(plain, ANY)


def test_no_chunk_at_all(plain):
    for dtype in DTYPES:
        pool_backward_case(torch.randn(2, 3, 2, 8).to(dtype), 5).check(plain, ANY)
        pool_backward_case(torch.randn(1, 70, 1, 9).to(dtype), 99, [30, 0, 40]).check(plain, ANY)


def test_offsets_beyond_32_bits(plain):
    """Batch entries 2^31 elements apart; the memory between them is never touched."""
    apart = 2**31 + 64
    try:
        memory = torch.from_numpy(np.zeros(apart + 640, np.float16))
    except MemoryError:
        pytest.skip("no address space for 4 GiB")
    x = memory.as_strided((2, 20, 1, 32), (apart, 32, 32, 1))
    x.copy_(torch.randn(2, 20, 1, 32))
    pool_backward_case(x, 4).check(plain, ANY)


@settings(max_examples=50, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    shape=st.tuples(*(st.integers(1, most) for most in (3, 60, 3, 150))),
    chunk_size=st.integers(1, 20),
    offset=st.integers(0, 9),
    cuts=st.lists(st.integers(0, 60), max_size=4),
    schedule=st.sampled_from(SCHEDULES),
    blocks=st.integers(1, 5),
)
def test_any_problem(plain, race, dtype, shape, chunk_size, offset, cuts, schedule, blocks):
    batch, length, heads, dim = shape
    x = torch.randn(batch, length, heads, dim + offset).to(dtype)[..., offset:]
    lengths = None
    if cuts:
        x = x[:1]
        borders = [0, *sorted(min(cut, length) for cut in cuts), length]
        lengths = np.diff(borders).tolist()
    case = pool_backward_case(x, chunk_size, lengths, blocks)
    for sim in (plain, race):
        case.check(sim, schedule)


@pytest.mark.parametrize("lengths", PACKINGS.values(), ids=PACKINGS)
def test_packed(plain, lengths):
    if sum(lengths) < 4:
        lengths = [*lengths, 3, 3]  # two tokens short of a chunk: zeros only
    x = torch.randn(1, sum(lengths), 2, 20).bfloat16()
    for schedule in SCHEDULES[::4]:
        pool_backward_case(x, 4, lengths).check(plain, schedule)


def test_few_blocks_take_many_rows(plain):
    x = torch.randn(3, 101, 2, 33)
    for blocks in (1, 2, 7, 100):
        pool_backward_case(x, 2, blocks=blocks).check(plain, ANY)


def covering() -> list[Case]:
    """Every instance once, ragged or packed, whole rows and slices, small."""
    choices = {(8, True): 40, (16, True): 136, (32, True): 264, (32, False): 37}
    cases = []
    for i, dtype in enumerate(DTYPES):
        for j, (choice, dim) in enumerate(choices.items()):
            x = torch.randn(1, 14, 2, dim).to(dtype)
            lengths = [5, 0, 9] if (i + j) % 2 else None
            cases.append(pool_backward_case(x, 4, lengths, 1 + j % 2, choice))
    return cases


def test_no_race_under_any_schedule(race):
    for case in covering():
        for schedule in SCHEDULES:
            case.check(race, schedule)


def test_every_schedule_gives_the_same(plain):
    for case in covering():
        for schedule in SCHEDULES:
            case.check(plain, schedule)


def wrong_cu_seqlens() -> list[Case]:
    """Sequences that overlap, run backwards or leave the context: any numbers, no foreign memory."""
    cases = []
    for cu_seqlens in (
        [0, 90, 10, 60],
        [-7, 20, 2**31 - 1],
        [5, 5, 5],
        [0, 61, 0, 61],
        [9, 1, 40],
    ):
        x = torch.randn(1, 61, 1, 8)
        case = pool_backward_case(x, 4, [61] + [0] * (len(cu_seqlens) - 2), name=str(cu_seqlens))
        case.inputs["cu_seqlens"] = np.array(cu_seqlens, np.int32)
        case.workspace["context_gradient"] = case.expected.pop("context_gradient")
        cases.append(case)
    return cases


def test_sanitizers():
    """The race build would report wrong cu_seqlens: overlapping chunks have tokens with two writers."""
    cases = [*covering(), *wrong_cu_seqlens()]
    sanitized.check([(case, SCHEDULES[::5]) for case in cases])


DROPPED = {
    "rows are written": ("__syncwarp();\n        if (pass == kNorm)", "if (pass == kNorm)"),
    "rows are read": ("__syncwarp();  // written before", "//"),
    "primary": ("ptx::griddepcontrol_wait();\n  for", "for"),
}


@pytest.mark.parametrize("old, new", DROPPED.values(), ids=DROPPED)
def test_race_build_notices_a_dropped_line(old, new):
    sim = harness.mutant("race", "pool_backward.cpp", "pool_backward.cuh", old, new)
    x = torch.randn(1, 110, 1, 264)
    case = pool_backward_case(x, 3, [4] * 27 + [2], choice=(16, True))
    with planted.reported(sim):
        case.check(sim, ANY)
