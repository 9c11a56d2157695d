"""pool_kernel and chunk_offsets_kernel in the simulator: the bits of torch.ops.resona.pool_chunks."""

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

import resona_ext  # noqa: F401  (registers torch.ops.resona)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ANY = SCHEDULES[0]


def name_of(dtype) -> str:
    return str(dtype).removeprefix("torch.")


def storage(x: torch.Tensor) -> np.ndarray:
    """The same memory, strides included; numpy has no bfloat16."""
    return (x if x.dtype == torch.float32 else x.view(torch.int16)).numpy()


def instance(x: torch.Tensor) -> tuple[int, bool]:
    """(lanes per row, vector loads), as a launch chooses them: the first that holds a row."""
    size, rows = x.element_size(), (*x.stride()[:-1], x.shape[-1])
    vector = x.data_ptr() % 16 == 0 and all(stride * size % 16 == 0 for stride in rows)
    lanes = next((lanes for lanes in (8, 16) if 8 * lanes >= x.shape[-1]), 32)
    return (lanes, True) if vector else (32, False)


def pool_case(x, chunk_size, lengths=None, blocks=None, choice=None, name="pool") -> Case:
    """x [B, L, R, E], any strides; lengths of packed sequences."""
    batch, length, heads, dim = x.shape
    cu_seqlens = None
    inputs, workspace = {"context": storage(x)}, {}
    if lengths is not None:
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
        inputs["cu_seqlens"] = cu_seqlens.numpy()
        workspace["chunk_begin"] = np.empty(len(lengths) + 1, np.int32)
    expected = torch.ops.resona.pool_chunks(x, chunk_size, cu_seqlens)
    lanes, vector = choice or instance(x)
    rows = batch * (length // chunk_size) * heads
    stride = dict(zip(("batch", "token", "head"), x.stride(), strict=False))
    return Case(
        name=f"{name} {name_of(x.dtype)} {tuple(x.shape)} S={chunk_size} lanes={lanes} vector={vector}",
        kernel="pool",
        inputs=inputs,
        expected={"chunks": storage(expected)},
        workspace=workspace,
        dtypes={"chunks": name_of(x.dtype)},
        scalars={
            **{f"{name}_stride": value for name, value in stride.items()},
            **{"batch": batch, "length": length, "heads": heads, "dim": dim},
            **{"chunk_size": chunk_size, "dtype": name_of(x.dtype)},
            **{"sequences": len(lengths or []), "lanes": lanes, "vector": int(vector)},
            "blocks": blocks or max(1, math.ceil(rows / 16)),
        },
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("dim", [1, 2, 7, 8, 16, 24, 40, 64, 72, 128, 136, 256, 264, 600])
@pytest.mark.parametrize("chunk_size", [1, 2, 3, 5, 8, 37, 64])
def test_equals_the_cpu(plain, dtype, dim, chunk_size):
    x = torch.randn(2, 3 * chunk_size + chunk_size // 2, 2, dim).to(dtype)
    pool_case(x, chunk_size).check(plain, ANY)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_every_instance_takes_any_width(plain, dtype):
    """A launch may choose more lanes than a row needs, or fewer: then the row comes in slices."""
    for dim in (8, 64, 72, 200, 264):
        x = torch.randn(1, 21, 3, dim).to(dtype)
        for choice in ((8, True), (16, True), (32, True), (32, False)):
            pool_case(x, 4, choice=choice).check(plain, ANY)


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
        pool_case(view, 4, name=name).check(plain, ANY)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_hard_values(plain, dtype):
    x = torch.randn(1, 48, 1, 40).to(dtype)
    x[:, 0:4] = 0  # zero norm
    x[:, 4:6] = -x[:, 6:8].flip(1)  # cancels in part
    x[:, 8, :, 3] = math.nan
    x[:, 12, :, 3] = math.inf
    x[:, 16, :, 3], x[:, 17, :, 3] = math.inf, -math.inf
    x[:, 20:24] = torch.finfo(dtype).tiny / 8  # subnormal
    x[:, 24:28] = torch.finfo(dtype).max  # fp32 sums overflow
    x[:, 28:32] = -0.0
    x[:, 32:36] *= 1e-3
    for choice in ((8, True), (16, True), (32, False)):
        pool_case(x, 4, choice=choice).check(plain, ANY)
        pool_case(x, 1, choice=choice).check(plain, ANY)


def test_no_chunk_at_all(plain):
    for dtype in DTYPES:
        pool_case(torch.randn(2, 3, 1, 8).to(dtype), 5).check(plain, ANY)


def test_offsets_beyond_32_bits(plain):
    """Batch entries 2^31 elements apart; the memory between them is never touched."""
    apart = 2**31 + 64
    try:
        memory = torch.from_numpy(np.zeros(apart + 640, np.float16))
    except MemoryError:
        pytest.skip("no address space for 4 GiB")
    x = memory.as_strided((2, 20, 1, 32), (apart, 32, 32, 1))
    x.copy_(torch.randn(2, 20, 1, 32))
    pool_case(x, 4).check(plain, ANY)


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    shape=st.tuples(*(st.integers(1, most) for most in (3, 60, 3, 150))),
    chunk_size=st.integers(1, 20),
    offset=st.integers(0, 9),
    cuts=st.lists(st.integers(0, 60), max_size=4),
    schedule=st.sampled_from(SCHEDULES),
    blocks=st.integers(1, 5),
)
def test_any_problem(dtype, shape, chunk_size, offset, cuts, schedule, blocks):
    batch, length, heads, dim = shape
    x = torch.randn(batch, length, heads, dim + offset).to(dtype)[..., offset:]
    lengths = None
    if cuts:
        x = x[:1]
        borders = [0, *sorted(min(cut, length) for cut in cuts), length]
        lengths = np.diff(borders).tolist()
    case = pool_case(x, chunk_size, lengths, blocks)
    for build in ("plain", "race"):
        case.check(harness.build(build), schedule)


PACKINGS = {
    "ragged": [0, 17, 3, 0, 64, 1, 40],
    "empty": [0, 0, 0],
    "one": [50],
    "many": [5] * 300,
    "more than one tile of the scan": [1, 4, 9, 0, 3] * 110,
}


@pytest.mark.parametrize("lengths", PACKINGS.values(), ids=PACKINGS)
def test_packed(plain, lengths):
    if sum(lengths) < 4:
        lengths = [*lengths, 3, 3]  # two tokens short of a chunk: a row of zeros
    x = torch.randn(1, sum(lengths), 2, 20).bfloat16()
    for schedule in SCHEDULES[::4]:
        pool_case(x, 4, lengths).check(plain, schedule)


@pytest.mark.parametrize(
    "cu_seqlens", [[0, 90, 10, 60], [-7, 20, 2**31 - 1], [5, 5, 5], [0, 61, 0, 61, 0, 61]]
)
def test_wrong_cu_seqlens_reach_no_foreign_memory(plain, race, cu_seqlens):
    """The host never looks at them; the race build reports any access out of bounds."""
    x = torch.randn(1, 61, 1, 8)
    case = pool_case(x, 4, [61] + [0] * (len(cu_seqlens) - 2))
    case.inputs["cu_seqlens"] = np.array(cu_seqlens, np.int32)
    case.expected, chunks = {}, case.expected["chunks"]
    for sim in (plain, race):
        case.workspace["chunks"] = np.empty_like(chunks)
        case.check(sim, ANY)


def test_few_blocks_take_many_rows(plain):
    x = torch.randn(3, 100, 2, 33)
    for blocks in (1, 2, 7, 100):
        pool_case(x, 2, blocks=blocks).check(plain, ANY)


def covering() -> list[Case]:
    """Every instance once, ragged and packed and in slices, small."""
    cases = []
    for dtype in DTYPES:
        for choice, dim in (
            ((8, True), 40),
            ((16, True), 136),
            ((32, True), 264),
            ((32, False), 37),
        ):
            x = torch.randn(2, 14, 2, dim).to(dtype)
            cases.append(pool_case(x, 4, choice=choice))
            cases.append(pool_case(x[:1], 3, [5, 0, 9], choice=choice, blocks=2, name="packed"))
    return cases


def test_no_race_under_any_schedule(race):
    for case in covering():
        for schedule in SCHEDULES:
            case.check(race, schedule)


def test_every_schedule_gives_the_same(plain):
    for case in covering():
        for schedule in SCHEDULES:
            case.check(plain, schedule)


def test_sanitizers():
    sanitized.check([(case, SCHEDULES[::3]) for case in covering()])


DROPPED = {
    "sums are written": ("pool.cuh", "__syncwarp();\n        if (pass == 0)", "if (pass == 0)"),
    "sums are read": ("pool.cuh", "__syncwarp();  // read before the next", "//"),
    "primary": ("pool.cuh", "ptx::griddepcontrol_wait();\n  if", "if"),
    "totals are written": ("scan.cuh", "__syncthreads();\n  BlockSums", "BlockSums"),
    "totals are read": ("scan.cuh", "__syncthreads();  // the totals are read", "//"),
}


RUNNERS = {"pool.cuh": "pool.cpp", "scan.cuh": "launches.cpp"}


@pytest.mark.parametrize("header, old, new", DROPPED.values(), ids=DROPPED)
def test_race_build_notices_a_dropped_line(header, old, new):
    # chunk_offsets_kernel, which has the scan, is in the runner of packed.cu.
    sim = harness.mutant("race", RUNNERS[header], header, old, new)
    x = torch.randn(1, 1100, 1, 264)
    case = pool_case(x, 3, [4] * 275, choice=(16, True))
    with planted.reported(sim):
        case.check(sim, ANY)
