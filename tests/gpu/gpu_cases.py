"""What must hold on a GPU, as data: the problems, and every job that runs on a device.

pytest runs every job (test_gpu_cases.py), and so does benchmarks/gpu_smoke.sh, which needs no pytest. What
needs no stream and no graph also runs on the CPU, which tests the cases themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from gpu_operators import (
    BF16,
    F16,
    F32,
    LAYOUTS,
    OPERATORS,
    Case,
    decode_cases,
    jrt_cases,
    not_finite,
    tiny_and_huge,
    zero_rows,
)
from gpu_runs import Wrong, run_forward, run_gradient, run_graph, run_stream, run_wrong
from torch import Tensor

PACKED = (0, 17, 3, 0, 64, 1, 40)


def _cases() -> Iterator[Case]:
    for dtype in (BF16, F16, F32):
        for op in ("pool_chunks", "retrieve"):
            yield Case(op, "small", dtype, small=True)
            yield Case(op, "packed", dtype, lengths=PACKED, small=True)
            yield Case(op, "long rows", dtype, L=37, E=520, S=3, k=4, small=dtype == BF16)
            yield Case(op, "aligned", dtype, L=340, R=1, E=128, S=16, k=8)
        for contents in ("repeated", "permuted", "zipf", "four_letters", "two_letters"):
            yield Case("retrieve", contents, dtype, B=1, L=300, E=32, S=5, k=8, contents=contents)
        many = dict(B=1, L=220, S=2, k=100, contents="zipf")
        yield Case("retrieve", "many slots", dtype, **many, small=dtype == BF16)
        # More slots than candidates: every chunk is scored canonically. Few queries: blocks share the chunks.
        exact = dict(B=1, L=300, S=1, k=250, R=1, E=16, contents="zipf", small=dtype != F16)
        yield Case("retrieve", "more slots than candidates", dtype, **exact)
        split = dict(B=1, L=1100, T=8, S=1, k=8, R=1, E=32, small=dtype != F16)
        yield Case("retrieve", "few queries, many chunks", dtype, **split)
    for op in ("pool_chunks", "retrieve"):
        for layout in LAYOUTS:
            small = layout in ("rows apart", "offset")
            yield Case(op, layout, BF16, E=40, layout=layout, small=small)
        for S, L in ((1, 50), (3, 95), (64, 640), (200, 1000)):
            yield Case(op, f"chunks of {S}", F16, B=1, L=L, S=S, k=5)
        for E in (1, 7, 33, 256, 257):
            yield Case(op, f"rows of {E}", F32, E=E)
        yield Case(op, "no batch", B=0)
        yield Case(op, "nothing", L=0, small=True)
        yield Case(op, "shorter than a chunk", L=5, S=8, small=True)
        yield Case(op, "not finite", spoil=not_finite)
        yield Case(op, "zero rows", BF16, S=1, spoil=zero_rows)
        yield Case(op, "tiny and huge", F32, spoil=tiny_and_huge)
        yield Case(op, "packed, empty at both ends", F16, lengths=(0, 0, 33, 9, 0), contents="zipf")
        yield Case(op, "one sequence each token", lengths=(1,) * 40, S=1)
    yield Case("retrieve", "one query", BF16, L=300, T=1, small=True)
    yield Case("retrieve", "no queries", T=0)
    yield Case("retrieve", "fewer queries", L=200, T=77)
    yield Case("retrieve", "four heads", B=1, L=333, R=4, E=48, contents="four_letters")

    for dtype in (BF16, F16, F32):
        op = "retrieve_two_level"
        yield Case(op, "small", dtype, small=True)
        yield Case(op, "packed", dtype, lengths=PACKED, S=2, small=True)
        yield Case(op, "many chunks", dtype, B=1, L=300, S=1, k=8, E=72)
    yield Case(op, "ties", BF16, B=1, L=300, E=32, S=1, k=8, contents="two_letters")
    yield Case(op, "many slots", F32, B=1, L=220, S=1, k=50, contents="zipf")
    yield Case(op, "rows of 33", F32, E=33)
    yield Case(op, "not finite", S=1, spoil=not_finite)
    yield Case(op, "no queries", T=0)
    yield Case(op, "nothing", L=0, small=True)

    for dtype in (BF16, F16, F32):
        for op in ("attend", "fused_retrieve_attend"):
            yield Case(op, "small", dtype, small=True)
            yield Case(op, "packed", dtype, lengths=PACKED, small=True)
            yield Case(op, "chunk by chunk", dtype, L=340, S=16, k=4, D=64, small=True)
            yield Case(op, "one chunk each", dtype, L=340, S=16, k=1, D=64, Hkv=4)
            yield Case(op, "grouped", dtype, L=200, R=1, S=4, k=8, H=16, D=128, small=dtype == BF16)
            yield Case(op, "wide heads", dtype, L=120, S=5, D=200)
            longer = dict(B=1, L=900, T=300, S=100, k=3, R=1, D=72, small=dtype != F16)
            yield Case(op, "longer chunks", dtype, **longer)
        yield Case("fused_retrieve_attend", "scored", dtype, L=150, S=8)
        yield Case("fused_retrieve_attend", "not finite", dtype, L=90, S=2, spoil=not_finite)
        # More tiles of queries than any GPU runs at once: the search attends to what it finds.
        yield Case("fused_retrieve_attend", "tiny chunks", dtype, B=220, L=30, S=2, k=2, Hkv=4)
    for op in ("attend", "fused_retrieve_attend"):
        yield Case(op, "no queries", T=0)
        yield Case(op, "shorter than a chunk", L=5, S=8, small=True)
        yield Case(op, "one query", BF16, L=300, T=1, S=16, k=8, D=64)

    def large(op: str, name: str, dtype: torch.dtype, **sizes) -> Case:
        return Case(op, name, dtype, B=1, R=1, large=True, **sizes)

    yield large("pool_chunks", "64k tokens", F32, L=65536, E=128, S=64)
    yield large("pool_chunks", "a million tokens", BF16, L=1_000_003, E=64, S=16)
    yield large("retrieve", "16k tokens", BF16, L=16384, E=128, S=64, k=8)
    yield large("retrieve", "32k repeated tokens", F32, L=32768, E=64, S=32, k=16, contents="zipf")
    yield large("retrieve", "one query in a million", BF16, L=1_000_003, T=1, E=64, S=16, k=8)


CASES = (*_cases(), *decode_cases.cases(Case), *jrt_cases.cases(Case))


# Values that the shape checks let pass. The CPU refuses them, and so does CUDA with RESONA_DEBUG=1; else CUDA
# may compute anything from them, but must stay within its tensors.
INT_MAX, INT_MIN = 2**31 - 1, -(2**31)
WRONG_BORDERS: dict[str, Callable[[Tensor], Tensor]] = {
    "decreasing": lambda cu: cu.flip(0),
    "negative": lambda cu: cu - 9,
    "past the end": lambda cu: cu + 1000,
    "extreme": lambda cu: torch.where(torch.arange(len(cu)) % 2 == 0, INT_MIN, INT_MAX).int(),
    "all zero": lambda cu: torch.zeros_like(cu),
    "late start": lambda cu: torch.where(cu == 0, 1, cu),
}
WRONG_INDICES: dict[str, Callable[[Tensor], Tensor]] = {
    "past the end": lambda i: i + 1000,
    "largest": lambda i: torch.full_like(i, INT_MAX),
    "smallest": lambda i: torch.full_like(i, INT_MIN),
    "of the future": lambda i: torch.full_like(i, 14),
}


@dataclass(frozen=True)
class Job:
    mode: str
    case: Case
    wrong: Wrong | None = field(default=None)

    def __str__(self) -> str:
        detail = f"/{self.wrong.argument} {self.wrong.name}" if self.wrong else ""
        return f"{self.mode}/{self.case}{detail}"

    def run(self, device: str) -> None:
        """Raises AssertionError, or whatever the operator raises."""
        if self.wrong:
            run_wrong(self.case, self.wrong, device)
        else:
            (MODES | REPLAYS)[self.mode](self.case, device)


MODES: dict[str, Callable[[Case, str], None]] = {
    "forward": run_forward,
    "gradient": run_gradient,
    "stream": run_stream,
    "graph": run_graph,
}
# Of decode steps only, which change what they are called with.
REPLAYS = {"replays": decode_cases.run_replays}


def jobs(device: str, small: bool = False) -> list[Job]:
    """Everything that runs on a device. small: what compute-sanitizer has time for."""
    modes = list(MODES)
    cases = [c for c in CASES if (c.small or not small) and not (c.large and device == "cpu")]
    if small or device == "cpu":
        modes = ["gradient"]  # which contains the forward pass
    found = [Job(mode, case) for mode in modes for case in cases]
    sizes = dict(L=21, S=4, D=16)
    for op in decode_cases.OPERATORS:
        for dtype in (BF16, F32):
            found.append(Job("replays", Case(op, "a cache", dtype, **sizes)))
        plain = Case(op, "plain")
        wrong = decode_cases.WRONG_LENGTHS.items()
        found += [Job("wrong", plain, Wrong("lengths", *w)) for w in wrong]
    for op in OPERATORS:
        if op.endswith("_step") or op in decode_cases.OPERATORS:
            continue
        packed = Case(op, "packed", lengths=PACKED)
        found += [Job("wrong", packed, Wrong("cu_seqlens", *w)) for w in WRONG_BORDERS.items()]
        if op == "_retrieve_backward":
            plain = Case(op, "plain")
            found += [Job("wrong", plain, Wrong("indices", *w)) for w in WRONG_INDICES.items()]
    return found
