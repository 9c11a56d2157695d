"""The benchmark harness: calls in turns.

Nothing here looks at a time: these machines are shared and slow, and times belong in records.
"""

from __future__ import annotations

import weakref

import pytest
import torch

from benchmarks.kernels import timer


class FakeClock:
    """Each call returns how long it takes."""

    def __init__(self):
        self.log = []

    def prepare(self, call, check=None):
        if check is not None:
            check(call())
        return call, "fake"

    def seconds(self, call):
        self.log.append(call.__name__)
        return call()


def _taking(name: str, seconds: float):
    def call():
        return seconds

    call.__name__ = name
    return call


def test_interleaved_takes_turns_and_respects_the_budget():
    clock = FakeClock()
    calls = {"a": _taking("a", 0.1), "b": _taking("b", 0.4), "slow": _taking("slow", 99.0)}
    budget = timer.Budget(seconds=1.0, max_calls=5, min_calls=3, long_call=10.0)
    timings, failed = timer.interleaved(calls, clock, budget)
    assert not failed
    assert [len(timings[name].samples) for name in calls] == [5, 3, 1]
    assert clock.log == ["a", "b", "slow", "b", "a", "a", "b", "a", "a"]
    assert timings["b"].median == 0.4


def test_interleaved_goes_on_without_a_call_that_fails():
    def broken():
        raise RuntimeError("out of luck")

    calls = {"broken": broken, "fine": _taking("fine", 1.0)}
    timings, failed = timer.interleaved(calls, FakeClock(), timer.Budget(min_calls=2))
    assert list(timings) == ["fine"] and len(timings["fine"].samples) == 2
    assert str(failed["broken"]) == "out of luck"


def test_interleaved_keeps_nothing_of_what_failed():
    """The frames of an error hold the tensors of their case."""

    class Held:
        pass

    held = Held()
    gone = weakref.ref(held)

    def broken(held=held):
        raise RuntimeError("out of luck")

    calls = {"broken": broken}
    del held, broken
    _, failed = timer.interleaved(calls, FakeClock(), timer.Budget(min_calls=1))
    calls.clear()
    assert failed["broken"].__traceback__ is None and gone() is None


def test_interleaved_leaves_out_what_is_wrong_once_prepared():
    def refuse(result):
        raise ValueError(f"got {result}")

    calls = {name: _taking(name, 1.0) for name in ("wrong", "right")}
    checks = {"wrong": refuse, "right": lambda result: None}
    budget = timer.Budget(min_calls=1, max_calls=1)
    timings, failed = timer.interleaved(calls, FakeClock(), budget, checks=checks)
    assert list(timings) == ["right"] and str(failed["wrong"]) == "got 1.0"


def test_peak_bytes_sees_an_allocation():
    result, peak = timer.CpuClock().peak_bytes(lambda: torch.ones(4 << 20))
    assert result.numel() == 4 << 20
    assert peak is None or 15 << 20 <= peak <= 64 << 20


def test_out_of_memory_is_recognised_on_a_cpu():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60)
    assert timer.is_out_of_memory(caught.value)
    assert not timer.is_out_of_memory(RuntimeError("shape mismatch"))
