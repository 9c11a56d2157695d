"""Planted mistakes are caught, and the same kernels without them run clean under every schedule."""

import re
from dataclasses import dataclass

import harness
import numpy as np
import pytest
from harness import SCHEDULES, Schedule

THREADS = 64


def _same(x):
    return x[:THREADS]


def _pairs_swapped(x):
    return _same(x).reshape(-1, 2)[:, ::-1].ravel()


def _total(blocks):
    return lambda x: x[:blocks].sum(keepdims=True)


@dataclass(frozen=True)
class Planted:
    kernel: str
    expected: object  # of the kernel without the mistake
    caught: dict  # by build: what the report says, or "wrong" where only the numbers tell
    blocks: int = 1
    inputs: int = THREADS
    outputs: int = THREADS
    work: int = 0


RACE = r"race: \w+ byte \d+ of '\w+' at planted.cpp:\d+, which thread \d+ .* nothing orders the two"

CASES = [
    Planted(
        "missing_barrier", lambda x: x[::-1], {"plain": "wrong", "race": "uninitialised|race: "}
    ),
    Planted("missing_warp_barrier", _pairs_swapped, {"race": RACE}),
    Planted("missing_wait", _same, {"plain": "wrong", "race": "cp.async .* is in flight: no wait"}),
    Planted(
        "missing_trailing_barrier",
        lambda x: x.reshape(4, -1)[:, ::-1].ravel(),
        {"plain": "wrong", "race": r"race: \w+ byte \d+ of 'tile'|is in flight"},
        inputs=4 * THREADS,
        outputs=4 * THREADS,
    ),
    Planted(
        "row_out_of_bounds", _same, {"race": r"reads at planted.cpp:\d+: out of bounds: 4 bytes"}
    ),
    Planted(
        "vector_out_of_bounds",
        _same,
        dict.fromkeys(
            ("plain", "race"), r"out of bounds: 16 bytes, 256 bytes into 'in', which has 256"
        ),
    ),
    Planted(
        "shared_out_of_bounds",
        _same,
        {"plain": "wrote out of bounds of shared memory", "race": "256 bytes into 'tile'"},
    ),
    Planted(
        "divergent_shuffle",
        _pairs_swapped,
        dict.fromkeys(
            ("plain", "race"), r"divergent __shfl_xor_sync at planted.cpp:\d+: other lanes"
        ),
    ),
    Planted(
        "shuffle_after_exit",
        _pairs_swapped,
        dict.fromkeys(("plain", "race"), "a lane of its mask has exited|reads lane 7|deadlock"),
    ),
    *(
        Planted(kernel, _total(5), {"race": r"race: .* of another block"}, 5, 5, 1, 6)
        for kernel in ("missing_release_fence", "missing_acquire_fence", "relaxed_ticket")
    ),
    Planted("uninitialised_shared", _same, {"plain": "wrong", "race": "nobody has written"}),
    Planted(
        "misaligned_load",
        lambda x: x[:4],
        dict.fromkeys(("plain", "race"), "misaligned: expected a multiple of 16 bytes"),
        outputs=4,
    ),
    Planted(
        "deadlock",
        _same,
        dict.fromkeys(("plain", "race"), r"warp 0: all lanes at barrier_sync at planted.cpp:\d+"),
    ),
    Planted("barrier_in_branch", _same, dict.fromkeys(("plain", "race"), "divergent barrier")),
    Planted("blocks_collide", lambda x: x[[0, 0]], {"race": "of another block"}, 2, outputs=2),
    Planted(
        "too_much_shared",
        _same,
        dict.fromkeys(("plain", "race"), "bytes of static and dynamic shared memory, the limit is"),
    ),
    Planted("writes_input", _same, {"race": "writes to the input 'in'"}),
    Planted("stack_overflow", _same, {"plain": "faults at address"}),
]


def launch(sim, case: Planted, bug: int, schedule: Schedule):
    source = np.random.default_rng(7).integers(1, 1 << 20, case.inputs, dtype=np.uint32)
    out = np.zeros(case.outputs, np.uint32)
    outputs = {"out": out, **({"work": np.zeros(case.work, np.uint32)} if case.work else {})}
    expected = case.expected(source).copy()
    sim.run(case.kernel, {"in": source}, outputs, schedule=schedule, blocks=case.blocks, bug=bug)
    return np.array_equal(out, expected)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.kernel)
@pytest.mark.parametrize("build", ["plain", "race"])
def test_without_the_mistake_every_schedule_is_clean(build, case):
    sim = harness.build(build)
    for schedule in SCHEDULES:
        assert launch(sim, case, 0, schedule), schedule


@pytest.mark.parametrize(
    "build, case",
    [(build, case) for case in CASES for build in case.caught],
    ids=lambda value: value if isinstance(value, str) else value.kernel,
)
def test_mistake_is_caught(build, case):
    """A race or a bad access is reported under every schedule; wrong numbers need the right one."""
    sim = harness.build(build)
    outcomes = []
    for schedule in SCHEDULES:
        try:
            outcomes.append("right" if launch(sim, case, 1, schedule) else "wrong")
        except sim.Error as error:
            outcomes.append(str(error))
    pattern = case.caught[build]
    if pattern == "wrong":
        assert "wrong" in outcomes
    else:
        assert all(re.search(pattern, outcome) for outcome in outcomes), outcomes


def test_wrong_numbers_need_the_right_schedule(plain):
    """Why there are so many: a missing wait hides from copies that land at once."""
    case = next(case for case in CASES if case.kernel == "missing_wait")
    assert launch(plain, case, 1, Schedule("lockstep", copies_land_early=True))
    assert not launch(plain, case, 1, Schedule("lockstep"))


def test_memory_from_an_allocator_is_not_zero(plain, race):
    def count(sim, bug):
        out, work = np.zeros(1, np.uint32), np.zeros(1, np.uint32)
        source = np.zeros(1, np.uint32)
        sim.run(
            "uninitialised_counter", {"in": source}, {"out": out}, {"work": work}, blocks=1, bug=bug
        )
        return out[0]

    assert count(plain, 0) == count(race, 0) == THREADS
    assert count(plain, 1) != THREADS
    with pytest.raises(race.Error, match=r"'work' .* nobody has written"):
        count(race, 1)


@pytest.mark.parametrize("build", ["plain", "race"])
def test_waiting_for_a_block_that_need_not_run(build):
    """Passing values between blocks is fine; waiting for them fails once they do not fit side by side."""
    sim = harness.build(build)

    def run(bug, schedule):
        out, work = np.zeros(1, np.uint32), np.zeros(2, np.uint32)
        source = np.array([42], np.uint32)
        sim.run(
            "spin_on_block",
            {"in": source},
            {"out": out, "work": work},
            schedule=schedule,
            blocks=2,
            bug=bug,
        )
        return out[0]

    for schedule in SCHEDULES:
        assert run(0, schedule) == 0
        if schedule.resident != 1:
            assert run(1, schedule) == 42
    with pytest.raises(sim.Error, match="spins, and so does everyone else"):
        run(1, Schedule("lockstep", resident=1))


@pytest.mark.parametrize("bug", [0, 1])
def test_dependent_kernel_must_wait(plain, race, bug):
    source = np.arange(1, 4 * THREADS + 1, dtype=np.uint32)
    outcomes = []
    for sim in (plain, race):
        for schedule in SCHEDULES:
            work, out = np.zeros_like(source), np.zeros_like(source)
            try:
                sim.run(
                    "dependent_reads_early",
                    {"in": source},
                    {"work": work, "out": out},
                    schedule=schedule,
                    blocks=4,
                    bug=bug,
                )
                outcomes.append("right" if np.array_equal(out, source) else "wrong")
            except sim.Error as error:
                outcomes.append("race" if "race: " in str(error) else str(error))
    if bug:
        assert set(outcomes[: len(SCHEDULES)]) == {"right", "wrong"}
        assert set(outcomes[len(SCHEDULES) :]) == {"race"}
    else:
        assert set(outcomes) == {"right"}


def test_reports_name_the_line_and_the_schedule(race):
    case = next(case for case in CASES if case.kernel == "missing_warp_barrier")
    with pytest.raises(race.Error) as caught:
        launch(race, case, 1, Schedule("reversed", seed=5))
    report = str(caught.value)
    source = (harness.HERE / "kernels" / "planted.cpp").read_text().splitlines()
    lines = [int(n) for n in re.findall(r"planted.cpp:(\d+)", report)]
    assert any("tile.at[threadIdx.x] = " in source[line - 1] for line in lines), report
    assert any("tile.at[threadIdx.x ^ 1]" in source[line - 1] for line in lines), report
    assert "kernel 'planted', block (0,0,0), thread" in report
    assert report.endswith("[reversed-late-resident1-seed5]")
