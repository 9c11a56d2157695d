"""Prefix linear attention and its step in the simulator, prefix.cu as it is, against plain PyTorch."""

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
from prefix_cases import (
    ANY,
    BF16,
    DROPPED,
    DTYPES,
    F16,
    F32,
    PLANS,
    PROBLEMS,
    ROWS,
    WAIT,
    exactly,
    facts_of,
    forgiving,
    forward_case,
    mutant_without,
    name_of,
    planned,
    step_case,
    wrong_values,
)
from prefix_support import Prefix


@pytest.fixture(autouse=True)
def one_thread(threads):
    threads(1)  # problems are small: more threads only wait for each other


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_agrees_with_the_reference(plain, problem, dtype):
    forward_case(plain, Prefix(**PROBLEMS[problem], dtype=dtype)).check(plain, ANY)


def test_plans_are_what_they_are_called(plain):
    for name, choices in PLANS.items():
        _, pieces, slices, *_ = facts_of(forward_case(plain, planned(name, F32), **choices), plain)
        assert (pieces > 1) == ("segment" in choices) and (slices > 1) == ("sliced" in choices)
    for name, vector in (("16-byte rows", (1, 1)), ("odd sizes", (0, 0))):
        case = forward_case(plain, Prefix(**PROBLEMS[name], dtype=BF16))
        assert tuple(facts_of(case, plain)[3:]) == vector


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("plan", PLANS)
def test_any_plan(plain, plan, dtype):
    case = forward_case(plain, planned(plan, dtype), **PLANS[plan])
    case.check(plain, ANY)
    case.check(plain, ANY, truncated_products=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_long_sums_with_truncated_products(plain, dtype):
    """Tensor cores cut off where an addition rounds: over many tiles that must not add up."""
    p = Prefix(batch=1, heads=1, tokens=1500, rows=1200, value_dim=3, dtype=dtype)
    p.arguments["value"].abs_(), p.arguments["prefix_value"].abs_()
    for choices in ({}, dict(segment=512)):
        forward_case(plain, p, **choices).check(plain, ANY, truncated_products=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_strides_and_alignment(plain, dtype):
    for name in ("heads first", "unaligned rows", "one head for all"):
        p = Prefix(feature_dim=8, value_dim=16, mask=True, dtype=dtype)
        for row in ROWS:
            x = p.arguments[row]
            if name == "heads first":
                x = x.transpose(1, 2).contiguous().transpose(1, 2)
            elif name == "unaligned rows":
                x = torch.cat([x, x[..., :3]], -1)[..., : x.shape[-1]]
            else:
                x = x[:, :, :1].expand_as(x)
            p.arguments[row] = x
        forward_case(plain, p).check(plain, ANY)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_padding_may_hold_anything(plain, poison):
    for choices in ({}, dict(segment=64)):
        p = Prefix(
            mask=True, prefix_lengths=True, state=True, batch=3, tokens=130, rows=80, dtype=F16
        )
        p.arguments["mask"][1] = False  # all of a sequence
        case = exactly(forward_case(plain, p, **choices), plain)
        pads = ~p.arguments["mask"]
        beyond = torch.arange(p.rows) >= p.arguments["prefix_lengths"][:, None]
        for row in ROWS:
            bad = pads[:, : p.rows] | beyond if row.startswith("prefix") else pads
            p.arguments[row][bad] = poison  # the memory that the case reads
        case.check(plain, ANY)
        assert (case.expected["out"][pads.numpy()] == 0).all()


def test_offsets_beyond_32_bits(plain):
    """Batch entries 2^31 elements apart; the memory between them is never touched."""
    apart = 2**31 + 64
    try:
        memory = torch.from_numpy(np.zeros(apart + 4096, np.float16))
    except MemoryError:
        pytest.skip("no address space for 4 GiB")
    p = Prefix(tokens=20, rows=20, heads=1, dtype=F16)
    x = memory.as_strided((2, 20, 1, 6), (apart, 8, 8, 1))
    x.copy_(p.arguments["value"])
    p.arguments["value"] = x
    forward_case(plain, p).check(plain, ANY)


def test_wrong_values_reach_no_foreign_memory(plain):
    for case in wrong_values(plain, forward_case):
        case.check(plain, ANY)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    dtype=st.sampled_from(DTYPES),
    sizes=st.fixed_dictionaries(
        dict(
            batch=st.integers(1, 3),
            tokens=st.integers(0, 140),
            heads=st.integers(1, 3),
            feature_dim=st.integers(1, 17),
            value_dim=st.integers(1, 40),
            prefix_lengths=st.booleans(),
            mask=st.booleans(),
            state=st.booleans(),
        )
    ),
    share=st.floats(0, 1),
    plan=st.sampled_from([{}, *PLANS.values()]),
    schedule=st.sampled_from(SCHEDULES),
)
def test_any_problem(plain, race, dtype, sizes, share, plan, schedule):
    torch.manual_seed(0)
    p = Prefix(**sizes, rows=int(share * sizes["tokens"]), dtype=dtype)
    case = forgiving(forward_case, plain, p, **plan)
    for sim in (plain, race):
        case.check(sim, schedule)


STEPS = {
    "plain": {},
    "masked": dict(batch=5, mask=True),
    "paper": dict(heads=3, feature_dim=16, value_dim=64),
    "largest": dict(feature_dim=32, value_dim=128, scale=0.1),
    "odd": dict(feature_dim=5, value_dim=17, mask=True),
    "smallest": dict(feature_dim=1, value_dim=1),
    "no batch": dict(batch=0),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("problem", STEPS)
def test_a_step_is_the_recurrence(plain, problem, dtype):
    step_case(Prefix(tokens=1, rows=0, state=True, **STEPS[problem], dtype=dtype)).check(plain, ANY)


def test_an_idle_sequence_keeps_its_state(plain):
    p = Prefix(tokens=1, rows=0, state=True, mask=True, batch=4, dtype=F32)
    p.arguments["mask"][1:3] = False
    for row in ("query", "key", "value"):
        p.arguments[row][1:3] = float("nan")
    got = step_case(p).check(plain, ANY)
    for name in ("state", "normalizer"):
        assert np.array_equal(got[name][1:3], p.arguments[f"initial_{name}"][1:3].numpy())
    assert (got["out"][1:3] == 0).all()


def covering(sim) -> list[Case]:
    """Each dtype; one launch and three; parts, slices, packed sequences; loads of both widths; steps."""
    small = dict(tokens=70, rows=66, heads=1)
    packed = dict(lengths=[70, 0, 5], prefix_lengths=True, heads=1)
    return [
        forward_case(sim, Prefix(**packed, feature_dim=8, value_dim=8, dtype=F32)),
        forward_case(sim, planned("pieces", F32, **small), segment=64),
        forward_case(sim, planned("slices", F16, **small), **PLANS["slices"]),
        forward_case(sim, planned("everything", BF16, **small), **PLANS["everything"]),
        step_case(Prefix(tokens=1, rows=0, state=True, mask=True, heads=3, dtype=BF16)),
        step_case(Prefix(tokens=1, rows=0, state=True, value_dim=70, dtype=F32)),
    ]


def test_same_bits_under_every_schedule_without_races(plain, race):
    for case in covering(plain):
        case = exactly(case, plain)
        for schedule in SCHEDULES[::4]:
            case.check(race, schedule)
        for schedule in SCHEDULES[1::4]:
            case.check(plain, schedule)


def test_sanitizers(plain):
    cases = [*covering(plain), *wrong_values(plain, forward_case)]
    sanitized.check([(case, SCHEDULES[::9]) for case in cases])


FORWARD, STEP = "prefix_forward.cuh", "prefix_step.cuh"
PLACE = "const PrefixPlace at = prefix_place(p, own);\n  "
LINES = {
    **{
        name: (FORWARD, f"__syncthreads();  // {name}")
        for name in (
            "keys and values are there",
            "they may be replaced",
            "the tile is there",
            "weights are written",
            "denominators are written",
            "the tile may be replaced",
            "pairs are written",
        )
    },
    "the scan waits": (FORWARD, f"{WAIT}const int64_t blocks"),
    "the sweep waits": (FORWARD, f"{WAIT}{PLACE}const PrefixRange"),
    "query and key are there": (STEP, "__syncthreads();  // query and key are there"),
    "features are written": (STEP, "__syncthreads();  // features are written"),
    "both of a pair are written": (STEP, "__syncthreads();  // both of a pair are written"),
    "the sums are complete": (STEP, "__syncthreads();  // the sums are complete"),
}


@pytest.fixture(scope="module")
def without():
    return mutant_without("stage_prefix.cpp", LINES)


@pytest.mark.parametrize("line", LINES)
def test_race_build_notices_a_dropped_line(plain, without, line, monkeypatch):
    monkeypatch.setenv(DROPPED, str(list(LINES).index(line)))
    with planted.reported(without):
        for case in covering(plain):
            for schedule in SCHEDULES[::7]:
                case.check(without, schedule)


def test_nothing_dropped_nothing_noticed(plain, without, monkeypatch):
    monkeypatch.setenv(DROPPED, "-1")
    for case in covering(plain):
        case.check(without, ANY)


WRONG = {
    "a piece of the prefix": (FORWARD, "p.prefix_pieces && !backward", "1 && !backward"),
    "the antisymmetric part": ("prefix_state.cuh", "(old[ab] - old[ba]) / 2", "0"),
    "single TF32": ("prefix_product.cuh", "if constexpr (kLeft == 2) ptx", "if (false) ptx"),
    "later keys": ("prefix_tile.cuh", "j <= i ? taylor", "true ? taylor"),
}


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG)
def test_wrong_numbers_are_noticed(plain, change):
    sim = harness.mutant("plain", "stage_prefix.cpp", *change)
    p = Prefix(batch=1, heads=1, tokens=150, rows=130, state=True, dtype=F32)
    p.arguments["initial_state"][:, :, 6] += 1  # no longer symmetric
    with pytest.raises(AssertionError, match="elements of"):
        forward_case(plain, p, segment=64).check(sim, ANY)
