"""Gradients of prefix linear attention in the simulator, prefix_backward.cu as it is, against autograd."""

import harness
import numpy as np
import planted
import pytest
import sanitized
import torch
from cases import Case
from harness import SCHEDULES
from hypothesis import example, given, settings
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
    backward_case,
    exactly,
    forgiving,
    mutant_without,
    name_of,
    planned,
    wrong_values,
)
from prefix_support import Prefix


@pytest.fixture(autouse=True)
def one_thread(threads):
    threads(1)  # problems are small: more threads only wait for each other


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_agrees_with_autograd(plain, problem, dtype):
    backward_case(plain, Prefix(**PROBLEMS[problem], dtype=dtype)).check(plain, ANY)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("plan", PLANS)
def test_any_plan(plain, plan, dtype):
    case = backward_case(plain, planned(plan, dtype), **PLANS[plan])
    case.check(plain, ANY)
    case.check(plain, ANY, truncated_products=True)


@pytest.mark.parametrize("plan", [{}, PLANS["everything"]])
def test_of_out_alone(plain, plan):
    """No gradient of the state: that of the normalizer is missing too."""
    backward_case(plain, planned("everything", F32), state_gradients=False, **plan).check(
        plain, ANY
    )


def test_strides_do_not_matter(plain):
    p = Prefix(feature_dim=8, value_dim=16, mask=True, dtype=BF16)
    for row in ROWS:
        x = p.arguments[row]
        p.arguments[row] = torch.cat([x, x[..., :3]], -1)[..., : x.shape[-1]]
    backward_case(plain, p).check(plain, ANY)


@pytest.mark.parametrize("plan", [{}, PLANS["everything"]])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_padding_may_hold_anything(plain, poison, plan):
    p = planned("everything", F16)
    p.arguments["mask"][1] = False  # all of a sequence
    case = exactly(backward_case(plain, p, **plan), plain)
    pads = ~p.arguments["mask"]
    beyond = torch.arange(p.rows) >= p.arguments["prefix_lengths"][:, None]
    for row in ROWS:
        p.arguments[row][pads[:, : p.rows] | beyond if row.startswith("prefix") else pads] = poison
    for name in ("out", "out_gradient"):
        case.inputs[name].view(np.float16)[pads.numpy()] = poison
    case.check(plain, ANY)
    for row in ROWS[:3]:
        assert not case.expected[f"{row}_gradient"][pads.numpy()].any()
    for row in ROWS[3:]:
        assert not case.expected[f"{row}_gradient"][(pads[:, : p.rows] | beyond).numpy()].any()


def test_wrong_values_reach_no_foreign_memory(plain):
    for case in wrong_values(plain, backward_case):
        case.check(plain, ANY)


SMALLEST = dict(batch=1, tokens=1, heads=1, feature_dim=1, value_dim=1)
SMALLEST |= dict(prefix_lengths=False, mask=False, state=True)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    dtype=st.sampled_from(DTYPES),
    sizes=st.fixed_dictionaries(
        dict(
            batch=st.integers(1, 3),
            tokens=st.integers(0, 140),
            heads=st.integers(1, 2),
            feature_dim=st.integers(1, 12),
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
@example(dtype=F32, sizes=SMALLEST, share=0.0, plan={}, schedule=ANY)
def test_any_problem(plain, dtype, sizes, share, plan, schedule):
    torch.manual_seed(0)
    p = Prefix(**sizes, rows=int(share * sizes["tokens"]), dtype=dtype)
    forgiving(backward_case, plain, p, **plan).check(plain, schedule)


def covering(sim) -> list[Case]:
    """Each dtype; two launches and all ten; parts, slices and packed sequences; loads of both widths."""
    small = dict(tokens=70, rows=66, heads=1, feature_dim=4)
    packed = dict(lengths=[70, 0, 5], prefix_lengths=True, heads=1)
    return [
        backward_case(sim, Prefix(**packed, feature_dim=8, value_dim=8, dtype=F16)),
        backward_case(sim, planned("pieces", F32, **small, batch=1), segment=64),
        backward_case(sim, planned("everything", BF16, **small, value_dim=90), **PLANS["everything"]),
    ]  # fmt: skip


def test_same_bits_under_every_schedule_without_races(plain, race):
    for case in covering(plain):
        case = exactly(case, plain)
        for schedule in SCHEDULES[::9]:
            case.check(race, schedule)
        for schedule in SCHEDULES[1::6]:
            case.check(plain, schedule)


def test_sanitizers(plain):
    cases = [*covering(plain), *wrong_values(plain, backward_case)]
    sanitized.check([(case, SCHEDULES[::9]) for case in cases])


HEADER, TILE = "prefix_backward.cuh", "prefix_backward_tile.cuh"
PLACE = "const PrefixPlace at = prefix_place(f, own);\n  "
LINES = {
    **{
        name: (HEADER, f"__syncthreads();  // {name}")
        for name in (
            "the tile is there",
            "weights are written",
            "denominators are written",
            "g~ is written",
            "D is written",
            "gradients of rows are begun",
            "gradients of rows are written",
            "the tile may be replaced",
            "queries and keys are there",
            "g~ is scaled",
            "W and D are written",
            "gradients of keys are begun",
            "gradients of keys are written",
            "queries and keys may be replaced",
            "rows of the prefix are there",
            "their gradients are begun",
            "their gradients are written",
            "queries are there",
            "their g~ is scaled",
            "queries may be replaced",
        )
    },
    "the sums wait": (HEADER, f"{WAIT}{PLACE}const PrefixRange range = prefix_range(own.piece + 1"),
    "the prefix waits": (HEADER, f"{WAIT}{PLACE}load_state"),
    "the slices wait": (HEADER, f"{WAIT}const int64_t size"),
}


@pytest.fixture(scope="module")
def without():
    return mutant_without("stage_prefix_backward.cpp", LINES)


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
    "the normalizer in every slice": ("prefix_state.cuh", "slice == 0 ?", "true ?"),
    "later keys": (TILE, "j <= i ? c[n][e]", "true ? c[n][e]"),
    "d den in every slice": (TILE, "at.slice == 0 ?", "true ?"),
}


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG)
def test_wrong_numbers_are_noticed(plain, change):
    """In slices that are not cut: what forward has too, prefix_scan_kernel, the linker takes from there."""
    sim = harness.mutant("plain", "stage_prefix_backward.cpp", *change)
    case = backward_case(plain, planned("slices", F32), **PLANS["slices"])
    with pytest.raises(AssertionError, match="elements of"):
        case.check(sim, ANY)
