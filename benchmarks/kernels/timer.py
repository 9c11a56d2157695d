"""Times of several calls, made in turns in one process, so that all see the same clocks and noise.

CPU   wall clock around each call, caches as the call before left them (warm).
GPU   CUDA events around each call, the L2 cache overwritten before it. Calls that can be captured
      are replayed as a CUDA graph, so that launches from Python do not count; the method stands in
      each row. Not yet run on a GPU.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch

Call = Callable[[], object]


@dataclass(frozen=True)
class Budget:
    """How long to time one contender of one case, in seconds."""

    seconds: float = 1.0  # go on until so much time is spent ...
    max_calls: int = 25  # ... or so many calls are made,
    min_calls: int = 3  # but make so many at least,
    long_call: float = 20.0  # unless a call takes longer than this: then it is made once


@dataclass
class Timing:
    method: str  # "wall", "events" or "graph"
    samples: list[float] = field(default_factory=list)  # seconds

    @property
    def median(self) -> float:
        return median(self.samples)


def interleaved(
    calls: dict[str, Call], clock, budget: Budget, note: Callable[[str], None] = lambda text: None
) -> tuple[dict[str, Timing], dict[str, Exception]]:
    """Time all calls in turns; the order is reversed in every other round. Every call has been made
    once before (the check does that). A call that raises leaves the contest, the others go on."""
    timings: dict[str, Timing] = {}
    failed: dict[str, Exception] = {}
    prepared: dict[str, Call] = {}
    for name, call in calls.items():
        try:
            prepared[name], method = clock.prepare(call)
            timings[name] = Timing(method)
        except Exception as error:
            failed[name] = error
    active = list(prepared)
    while active:
        for name in active:
            note(f"timing {name}, call {len(timings[name].samples) + 1}")
            try:
                timings[name].samples.append(clock.seconds(prepared[name]))
            except Exception as error:
                failed[name] = error
        active = [
            n for n in reversed(active) if n not in failed and _wants_more(timings[n], budget)
        ]
    return {name: t for name, t in timings.items() if name not in failed}, failed


def _wants_more(timing: Timing, budget: Budget) -> bool:
    calls = len(timing.samples)
    if calls < budget.min_calls:
        return max(timing.samples) <= budget.long_call
    return calls < budget.max_calls and sum(timing.samples) < budget.seconds


class CpuClock:
    device = "cpu"
    REPEATED = 3.0  # seconds

    def prepare(self, call: Call) -> tuple[Call, str]:
        return call, "wall"

    def seconds(self, call: Call) -> float:
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin

    def peak_bytes(self, call: Call) -> tuple[object, int | None]:
        """The result, and by how much the resident memory of the process rose meanwhile (Linux):
        what the kernel gave, whatever the allocator made of it."""
        begin = time.perf_counter()
        before = _reset_resident_peak()
        result = call()
        if time.perf_counter() - begin < self.REPEATED:  # the first call also sets things up
            del result
            before = _reset_resident_peak()
            result = call()
        return result, None if before is None else max(0, _status_bytes("VmHWM") - before)


class CudaClock:
    device = "cuda"
    WARM_UP = 3

    def __init__(self) -> None:
        properties = torch.cuda.get_device_properties(0)
        cache = getattr(properties, "L2_cache_size", 64 << 20)
        self.scratch = torch.empty(3 * cache, dtype=torch.uint8, device="cuda")
        self.use_graphs = True

    def prepare(self, call: Call) -> tuple[Call, str]:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # capture wants its warm-up on another stream
            for _ in range(self.WARM_UP):
                call()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        if self.use_graphs and getattr(call, "capturable", True):
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph):
                    call()
                return graph.replay, "graph"
            except RuntimeError as error:
                if is_out_of_memory(error):
                    raise
                torch.cuda.synchronize()  # the call synchronises or allocates: events, then
        return call, "events"

    def seconds(self, call: Call) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.scratch.fill_(1)  # also keeps the GPU busy until the call has been launched
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def peak_bytes(self, call: Call) -> tuple[object, int | None]:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        torch.cuda.synchronize()
        return result, torch.cuda.max_memory_allocated() - before


def clock_for(device: str) -> CpuClock | CudaClock:
    return CudaClock() if device == "cuda" else CpuClock()


def is_out_of_memory(error: Exception) -> bool:
    """torch raises its own class on a GPU and a plain RuntimeError on a CPU."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def _reset_resident_peak() -> int | None:
    """Resident bytes now, with the high-water mark set back to them; None where there is no /proc."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)  # glibc: give back what it only keeps
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _status_bytes("VmRSS")
    except OSError:
        return None


def _status_bytes(field_name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field_name + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field_name}")
