"""What this machine can do at most, measured in the same run: copy, random rows, matrix product.

All of it through torch, on all its threads: the least that a kernel may be compared with. A ceiling can
be beaten: the matrix product here is the library's, and a cache may serve what counts as memory.

torch writes the rows that it gathers, to memory: on a GPU that is slower than reading them out of its cache.
So the cache's rate there is that of benchmarks/gpu/ceilings.cu, where it has been run.
"""

from __future__ import annotations

from functools import partial

import torch

from . import model
from .timer import Budget, interleaved

ROW_BYTES = 256  # one head's row of 128 numbers of 16 bit
MEMORY_BYTES = {"cpu": 256 << 20, "cuda": 4 << 30, "smoke": 1 << 20}
CACHE_BYTES = {"cpu": 1 << 20, "cuda": 16 << 20, "smoke": 1 << 16}
MATRIX = {"cpu": 2048, "cuda": 8192, "smoke": 64}
# A GPU fetches more than this many bytes at once, or launching would be what is measured.
GATHERED_BYTES = {"cpu": 64 << 20, "cuda": 2 << 30, "smoke": 1 << 20}


CACHE_ROWS = "gather/loads/row256/set16MiB"  # of ceilings.cu


def measure(clock, dtypes: list[str], scale: str, known: dict | None = None) -> dict:
    """Bytes/s and FLOP/s. scale: "cpu", "cuda" or "smoke"; known: what ceilings.cu found."""
    device, rates = clock.device, {}
    words = MEMORY_BYTES[scale] // 4
    source = torch.randn(words, device=device)
    target = torch.empty_like(source)
    calls = {"copy": partial(target.copy_, source)}
    amount = {"copy": 2 * MEMORY_BYTES[scale]}
    gathered = GATHERED_BYTES[scale] // ROW_BYTES
    received = torch.empty(gathered, ROW_BYTES // 4, device=device)
    sets = {"gather_memory": MEMORY_BYTES, "gather_cache": CACHE_BYTES}
    if device == "cuda":
        del sets["gather_cache"]
        rates["gather_cache"] = (known or {}).get(CACHE_ROWS)
    for name, size in sets.items():
        rows = source[: size[scale] // 4].view(-1, ROW_BYTES // 4)
        index = torch.randint(rows.shape[0], (gathered,), device=device)
        calls[name] = partial(torch.index_select, rows, 0, index, out=received)
        amount[name] = gathered * ROW_BYTES  # read; the rows written are not counted
    size = MATRIX[scale]
    for dtype in dtypes:
        a, b = (torch.randn(size, size, device=device).to(getattr(torch, dtype)) for _ in "ab")
        calls[f"matmul_{dtype}"] = partial(torch.matmul, a, b)
        amount[f"matmul_{dtype}"] = 2 * size**3
    for call in calls.values():
        call()
    timings, failed = interleaved(calls, clock, Budget(seconds=0.5))
    for name, timing in timings.items():
        rates[name] = amount[name] / min(timing.samples)  # a ceiling: the best, not the median
    return rates | {name: None for name in failed}


def speeds(rates: dict, dtype: str, device: str) -> model.Speeds | None:
    """The ceilings that the byte model wants; None if one could not be measured.

    The cache's rate bounds a GPU only: model.Speeds says why. Without it the floor is that of products and
    memory.
    """
    copy, matmul = rates.get("copy"), rates.get(f"matmul_{dtype}")
    cache = rates.get("gather_cache") if device == "cuda" else None
    if not copy or not matmul:
        return None
    return model.Speeds(copy=copy, matmul=matmul, cache=cache)
