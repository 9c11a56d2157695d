"""Where the time inside one call goes: pool, search, index, attention, merge, ...

One more call is made for it, apart from the timed ones, because watching costs time. What counts is how
the parts compare, and the record keeps them as seconds of that one call.

CPU   clocks inside the library, summed over its threads (csrc/cpu/stage_clock.h). "pack" is the layout of
      a chunk's keys and values that matrix tiles want; "rescore" the canonical scores of the search.
GPU   the kernels that torch's profiler saw, by name. Not yet run on a GPU.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable

import torch

from .timer import Call

# The longest beginning of a kernel's name decides.
KERNELS = {
    "pool_": "pool",
    "chunk_offsets_": "pool",
    "search_": "search",
    "search_attend_": "search and attention",
    "refine_": "search",  # of the two-level search
    "index_": "index",
    "scan_": "index",
    "attend_": "attention",
    "attend_merge_": "merge",
    "decode_append_": "pool",
    "decode_search_": "search",
    "decode_refine_": "search",  # of a step in two levels
    "decode_": "attention",
    "prefix_": "prefix attention",
    # gradients
    "pool_backward_": "gradients",
    "retrieve_": "gradients",
    "attend_backward_": "gradients",
    "attend_clear_": "gradients",
    "attend_delta_": "gradients",
    "attend_factor_": "gradients",
    "attend_key_gradient_": "gradients",
    "attend_query_gradient_": "gradients",
    "attend_bias_gradient_": "gradients",
    "attend_sink_": "gradients",
}


def part_of(kernel: str) -> str:
    """The part of a kernel, by its name with or without namespace and template arguments."""
    name = re.split(r"[<(]", kernel.removeprefix("void "))[0].rsplit("::", 1)[-1]
    known = [beginning for beginning in KERNELS if name.startswith(beginning)]
    return KERNELS[max(known, key=len)] if known else "other"


def sum_by_part(kernels: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Seconds by part, in the order of the first kernel of each."""
    parts: dict[str, float] = defaultdict(float)
    for name, seconds in kernels:
        parts[part_of(name)] += seconds
    return dict(parts)


def measure(call: Call, device: str) -> dict[str, float]:
    """Seconds by part of one call; empty if it spends none in our kernels."""
    return _on_cuda(call) if device == "cuda" else _on_cpu(call)


def _on_cpu(call: Call) -> dict[str, float]:
    clock = getattr(torch.ops.resona, "_cpu_stage_times", None)
    if clock is None:  # a package of another commit, under --compare
        return {}
    clock(True)
    try:
        call()
    finally:
        parts = json.loads(clock(False))
    return {name: seconds for name, seconds in parts.items() if seconds > 0}


def _on_cuda(call: Call) -> dict[str, float]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return sum_by_part(
        (event.name, event.device_time_total / 1e6)
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    )
