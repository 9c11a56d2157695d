"""Times of several calls, made in turns in one process, so that all see the same clocks and noise.

CPU   wall clock around each call, caches as the call before left them (warm).
GPU   CUDA events around each call, the L2 cache overwritten before it. Calls that can be captured
      are replayed as a CUDA graph, so that launches from Python do not count, after what the graph
      computes has been checked; the method stands in each row. Not yet run on a GPU.
"""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch

Call = Callable[[], object]
Check = Callable[[object], object]  # raises where the result of a call is wrong


@dataclass(frozen=True)
class Budget:
    """How long to time one contender of one case, in seconds."""

    seconds: float = 1.0  # go on until so much time is spent ...
    max_calls: int = 25  # ... or so many calls are made,
    min_calls: int = 3  # but make so many at least,
    long_call: float = 20.0  # unless a call takes longer than this: then it is made once


@dataclass
class Timing:
    method: str  # "wall", "events" or "graph"; why not a graph stands behind a colon
    samples: list[float] = field(default_factory=list)  # seconds

    @property
    def median(self) -> float:
        return median(self.samples)


def interleaved(
    calls: dict[str, Call],
    clock,
    budget: Budget,
    note: Callable[[str], None] = lambda text: None,
    checks: dict[str, Check] | None = None,
) -> tuple[dict[str, Timing], dict[str, Exception]]:
    """Time all calls in turns; the order is reversed in every other round. Every call has been made
    once before (the check does that). A call that raises leaves the contest, the others go on.

    checks: of what a call computes once it has been prepared.
    """
    timings: dict[str, Timing] = {}
    failed: dict[str, Exception] = {}
    prepared: dict[str, Call] = {}
    for name, call in calls.items():
        try:
            prepared[name], method = clock.prepare(call, (checks or {}).get(name))
            timings[name] = Timing(method)
        except Exception as error:
            failed[name] = _bare(error)
    active = list(prepared)
    while active:
        for name in active:
            note(f"timing {name}, call {len(timings[name].samples) + 1}")
            try:
                timings[name].samples.append(clock.seconds(prepared[name]))
            except Exception as error:
                failed[name] = _bare(error)
        active = [
            n for n in reversed(active) if n not in failed and _wants_more(timings[n], budget)
        ]
    return {name: t for name, t in timings.items() if name not in failed}, failed


def _bare(error: Exception) -> Exception:
    """Without the frames that it came through: they hold on to all memory of the case."""
    return error.with_traceback(None)


def _wants_more(timing: Timing, budget: Budget) -> bool:
    calls = len(timing.samples)
    if calls < budget.min_calls:
        return max(timing.samples) <= budget.long_call
    return calls < budget.max_calls and sum(timing.samples) < budget.seconds


class CpuClock:
    device = "cpu"
    REPEATED = 3.0  # seconds

    def prepare(self, call: Call, check: Check | None = None) -> tuple[Call, str]:
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
    LONG = 0.2  # seconds; beside such a call neither launches nor one cold call count
    AHEAD = 2_000_000  # cycles that the GPU is kept busy while a call is launched, a millisecond

    def __init__(self) -> None:
        properties = torch.cuda.get_device_properties(0)
        cache = getattr(properties, "L2_cache_size", 64 << 20)
        self.scratch = torch.empty(3 * cache, dtype=torch.uint8, device="cuda")
        self.use_graphs = True

    def prepare(self, call: Call, check: Check | None = None) -> tuple[Call, str]:
        if self._warm_up(call) > self.LONG:
            return call, "events: a long call"
        if not self.use_graphs or not getattr(call, "capturable", True):
            return call, "events"
        try:
            graph, result = capture(call)
        except RuntimeError as error:  # it synchronises, allocates, or there is no room for a copy
            return call, f"events: {str(error).splitlines()[0][:100]}"
        if check is not None:
            graph.replay()
            torch.cuda.synchronize()
            check(result)
        return graph.replay, "graph"

    def _warm_up(self, call: Call) -> float:
        """Seconds of the last call. A capture wants them on another stream."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        took = 0.0
        with torch.cuda.stream(side):
            for _ in range(self.WARM_UP):
                begin = time.perf_counter()
                call()
                side.synchronize()
                took = time.perf_counter() - begin
                if took > self.LONG:
                    break
        torch.cuda.current_stream().wait_stream(side)
        return took

    def seconds(self, call: Call) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(self.AHEAD)
        self.scratch.fill_(1)
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


def capture(call: Call) -> tuple[torch.cuda.CUDAGraph, object]:
    """The graph of a call, and the tensors that its replays write.

    A capture that fails leaves torch on the stream of the capture, and its allocator waiting for the end:
    from then on it would give nothing back when memory runs out.
    """
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    before = torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph, pool=pool):
            result = call()
    except RuntimeError:
        torch.cuda.set_stream(before)
        with suppress(AttributeError, RuntimeError):
            torch._C._cuda_endAllocateToPool(before.device_index, pool)
            torch._C._cuda_releasePool(before.device_index, pool)
        torch.cuda.synchronize()
        raise
    return graph, result


def device_works(device: str) -> bool:
    """After a fault of a kernel nothing works on a GPU until the process ends."""
    try:
        if device == "cuda":
            torch.ones(1, device=device).sum().item()
    except Exception:
        return False
    return True


def clean_up(device: str) -> None:
    """Gives back what the tensors and graphs of a case held."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


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
