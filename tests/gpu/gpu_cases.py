"""What must hold on a GPU, as data: operators, problems, and the ways to run them.

pytest runs every job (test_gpu_cases.py), and so does benchmarks/gpu_smoke.sh, which needs no pytest. A new
operator is one entry in OPERATORS and its rows in CASES. What needs no stream and no graph also runs on the
CPU, which tests the cases themselves.
"""

from __future__ import annotations

import math
import os
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
import decode_cases
from support import assert_no_worse, embeddings

from resona_ext import reference

ops = torch.ops.resona
Arguments = dict[str, Tensor | int | None]
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


@dataclass(frozen=True)
class Case:
    """One problem of one operator. The sizes are named as in the operator's contract."""

    op: str
    name: str
    dtype: torch.dtype = F32
    B: int = 2
    L: int = 61
    T: int | None = None  # as many as L
    R: int = 2
    E: int = 24
    S: int = 4
    k: int = 3
    H: int = 4
    Hkv: int = 2
    D: int = 24
    contents: str = "random"  # a key of support.CONTENTS
    spoil: Callable[[Tensor], None] | None = None  # plants special values in the embeddings
    lengths: tuple[int, ...] = ()  # packed sequences; B and L follow
    layout: str = "contiguous"  # a key of LAYOUTS
    small: bool = False  # also under compute-sanitizer, a thousand times slower
    large: bool = False  # compared with the CPU operator, not with the reference

    def __str__(self) -> str:
        return f"{self.op}/{self.name}/{str(self.dtype).removeprefix('torch.')}"


@dataclass(frozen=True)
class Operator:
    make: Callable[
        [Case, int], Arguments
    ]  # case, seed -> arguments on the CPU, in the schema's order
    run: Callable[..., Tensor | tuple[Tensor, ...]]
    reference: Callable[..., Tensor | tuple[Tensor, ...]] | None = (
        None  # None: only wrong values are tried
    )
    outputs: tuple[str, ...] = ()
    # Outputs that may differ from the reference by rounding; the others are the same bits.
    close: frozenset[str] = frozenset()
    # The close ones in float64, from arguments in float64 and the expected outputs; default: the reference.
    truth: Callable[[Arguments, tuple[Tensor, ...]], tuple[Tensor, ...]] | None = None
    # Names of the arguments with a gradient, and the differentiable outputs as a function of the arguments
    # and of the expected outputs, whose indices are constants.
    differentiable: tuple[str, ...] = ()
    smooth: Callable[[Arguments, tuple[Tensor, ...]], tuple[Tensor, ...]] | None = None


def _cu_seqlens(case: Case, seed: int) -> Tensor | None:
    if not case.lengths:
        return None
    lengths = case.lengths if seed % 2 == 0 else case.lengths[::-1]  # same shape, other values
    return torch.tensor([0, *lengths]).cumsum(0).int()


def _embedding(case: Case, batch: int, length: int) -> Tensor:
    made = embeddings(case.contents, batch, length, case.R, case.E, case.dtype)
    if case.spoil:
        case.spoil(made)
    return made


def _sizes(case: Case) -> tuple[int, int, int]:
    if case.lengths:
        return 1, sum(case.lengths), sum(case.lengths)
    return case.B, case.L if case.T is None else case.T, case.L


def make_pool_chunks(case: Case, seed: int) -> Arguments:
    batch, _, length = _sizes(case)
    return {
        "context_embedding": _embedding(case, batch, length),
        "chunk_size": case.S,
        "cu_seqlens": _cu_seqlens(case, seed),
    }


def make_retrieve(case: Case, seed: int) -> Arguments:
    batch, queries, length = _sizes(case)
    cu_seqlens = _cu_seqlens(case, seed)
    context = embeddings(case.contents, batch, length, case.R, case.E, case.dtype)
    # Queries that occur in the context, so that repeated contents tie.
    query = context.roll(5, dims=1)[:, length - queries :].clone()
    if case.spoil:
        case.spoil(query)
    return {
        "query_embedding": query,
        "chunk_embedding": ops.pool_chunks(context, case.S, cu_seqlens),
        "chunk_size": case.S,
        "top_k": case.k,
        "context_length": length,
        "cu_seqlens": cu_seqlens,
    }


def _rows(case: Case) -> Arguments:
    batch, queries, length = _sizes(case)
    return {
        "query": torch.randn(batch, queries, case.H, case.D).to(case.dtype),
        "key": torch.randn(batch, length, case.Hkv, case.D).to(case.dtype),
        "value": torch.randn(batch, length, case.Hkv, case.D).to(case.dtype),
    }


def make_attend(case: Case, seed: int) -> Arguments:
    found = make_retrieve(case, seed)
    indices, scores = ops.retrieve(*found.values())
    return {
        **_rows(case),
        "indices": indices,
        "chunk_size": case.S,
        "bias": scores.masked_fill(indices < 0, 0),
        "sink": torch.randn(case.H),
        "cu_seqlens": found["cu_seqlens"],
    }


def make_fused(case: Case, seed: int) -> Arguments:
    batch, queries, length = _sizes(case)
    context = _embedding(case, batch, length)
    return {
        **_rows(case),
        "query_embedding": context.roll(5, dims=1)[:, length - queries :].clone(),
        "context_embedding": context,
        "chunk_size": case.S,
        "top_k": case.k,
        "score_scale": torch.rand(case.R) if case.name == "scored" else None,
        "sink": None,
        "cu_seqlens": _cu_seqlens(case, seed),
    }


def attend_as_selected(arguments: Arguments, expected: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The attention over what was expected to be retrieved."""
    query, key, value, _, _, chunk_size, _, score_scale, sink, cu_seqlens = arguments.values()
    indices, scores = expected[2:]
    bias = None
    if score_scale is not None:
        bias = scores.double().masked_fill(indices < 0, 0) * score_scale[:, None]
    return reference.attend(query, key, value, indices, chunk_size, bias, sink, cu_seqlens)


def make_retrieve_backward(case: Case, seed: int) -> Arguments:
    forward = make_retrieve(case, seed)
    indices, scores = ops.retrieve(*forward.values())
    del forward["top_k"]
    return {"score_gradient": torch.randn_like(scores), "indices": indices, **forward}


def make_pool_chunks_backward(case: Case, seed: int) -> Arguments:
    forward = make_pool_chunks(case, seed)
    chunks = ops.pool_chunks(*forward.values())
    return {"chunk_gradient": torch.randn(chunks.shape).to(chunks.dtype), **forward}


def smooth_retrieve(arguments: Arguments, expected: tuple[Tensor, ...]) -> tuple[Tensor]:
    """The scores of the chunks that were retrieved."""
    query, chunks, size, _, length, cu_seqlens = arguments.values()
    indices = expected[0]
    borders = [0, length] if cu_seqlens is None else cu_seqlens.tolist()
    parts, first_chunk, queries = [query[:, :0, :, :1].expand_as(indices[:, :0])], 0, query.shape[1]
    for begin, end in pairwise(borders):
        own = slice(begin, end) if cu_seqlens is not None else slice(0, queries)
        count = (end - begin) // size
        score = reference.similarity(query[:, own], chunks[:, first_chunk : first_chunk + count])
        first_chunk += count
        chosen = indices[:, own].transpose(1, 2).long()
        if count:
            score = score.gather(-1, chosen.clamp(min=0)).masked_fill(chosen < 0, 0)
        else:  # nothing to gather from, and every slot is unused
            score = score.sum(dim=-1, keepdim=True).expand(chosen.shape)
        parts.append(score.transpose(1, 2))
    return (torch.cat(parts, dim=1),)


OPERATORS = {
    "pool_chunks": Operator(
        make_pool_chunks,
        ops.pool_chunks,
        reference.pool_chunks,
        outputs=("chunks",),
        differentiable=("context_embedding",),
        smooth=lambda arguments, _: (reference.pool_chunks(*arguments.values()),),
    ),
    "retrieve": Operator(
        make_retrieve,
        ops.retrieve,
        reference.retrieve,
        outputs=("indices", "scores"),
        differentiable=("query_embedding", "chunk_embedding"),
        smooth=smooth_retrieve,
    ),
    "attend": Operator(
        make_attend,
        ops.attend,
        reference.attend,
        outputs=("out", "lse"),
        close=frozenset({"out", "lse"}),
        differentiable=("query", "key", "value"),
        smooth=lambda arguments, _: reference.attend(*arguments.values()),
    ),
    "fused_retrieve_attend": Operator(
        make_fused,
        ops.fused_retrieve_attend,
        reference.fused_retrieve_attend,
        outputs=("out", "lse", "indices", "scores"),
        close=frozenset({"out", "lse"}),
        truth=attend_as_selected,
    ),
    "decode_step": Operator(
        decode_cases.make,
        decode_cases.run,
        decode_cases.expect,
        outputs=decode_cases.OUTPUTS,
        close=frozenset({"out", "lse"}),
        truth=decode_cases.truth,
    ),
    "_pool_chunks_backward": Operator(make_pool_chunks_backward, ops._pool_chunks_backward),
    "_retrieve_backward": Operator(make_retrieve_backward, ops._retrieve_backward),
}


# How a tensor lies in memory. Gradients are asked for in every layout.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t.clone(),
    "rows apart": lambda t: torch.cat([t, t[..., :3]], dim=-1)[..., : t.shape[-1]],
    "heads first": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "last apart": lambda t: torch.stack([t, t], dim=-1)[..., 0],
    # Aligned to an element and to nothing more.
    "offset": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape),
}


def _zero_rows(t: Tensor) -> None:
    t[:, ::3] = 0


def _not_finite(t: Tensor) -> None:
    for i, bad in enumerate((math.nan, math.inf, -math.inf)):
        t[:, 7 + 11 * i, :, i] = bad


def _tiny_and_huge(t: Tensor) -> None:
    t[:, ::3] *= torch.finfo(t.dtype).tiny  # some subnormal
    t[:, 1::3] *= torch.finfo(t.dtype).max / 1e3


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
        yield Case("retrieve", "many slots", dtype, B=1, L=220, S=2, k=100, contents="zipf")
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
        yield Case(op, "not finite", spoil=_not_finite)
        yield Case(op, "zero rows", BF16, S=1, spoil=_zero_rows)
        yield Case(op, "tiny and huge", F32, spoil=_tiny_and_huge)
        yield Case(op, "packed, empty at both ends", F16, lengths=(0, 0, 33, 9, 0), contents="zipf")
        yield Case(op, "one sequence each token", lengths=(1,) * 40, S=1)
    yield Case("retrieve", "one query", BF16, L=300, T=1, small=True)
    yield Case("retrieve", "no queries", T=0)
    yield Case("retrieve", "fewer queries", L=200, T=77)
    yield Case("retrieve", "four heads", B=1, L=333, R=4, E=48, contents="four_letters")

    for dtype in (BF16, F16, F32):
        for op in ("attend", "fused_retrieve_attend"):
            yield Case(op, "small", dtype, small=True)
            yield Case(op, "packed", dtype, lengths=PACKED, small=True)
            yield Case(op, "chunk by chunk", dtype, L=340, S=16, k=4, D=64, small=dtype == BF16)
            yield Case(op, "one chunk each", dtype, L=340, S=16, k=1, D=64, Hkv=4)
            yield Case(op, "grouped", dtype, L=200, R=1, S=4, k=8, H=16, D=128, small=dtype == BF16)
            yield Case(op, "wide heads", dtype, L=120, S=5, D=200)
            yield Case(op, "longer chunks", dtype, B=1, L=900, T=300, S=100, k=3, R=1, D=72)
        yield Case("fused_retrieve_attend", "scored", dtype, L=150, S=8)
        yield Case("fused_retrieve_attend", "not finite", dtype, L=90, S=2, spoil=_not_finite)
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


CASES = (*_cases(), *decode_cases.cases(Case))


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
class Wrong:
    argument: str
    name: str
    change: Callable[[Tensor], Tensor]


def _tuple(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def _doubled(arguments: Arguments) -> Arguments:
    return {
        name: a.double() if isinstance(a, Tensor) and a.is_floating_point() else a
        for name, a in arguments.items()
    }


def assert_same_bits(name: str, got: Tensor, expected: Tensor) -> None:
    """Any NaN equals any other; +0 and -0 differ."""
    assert got.shape == expected.shape and got.dtype == expected.dtype, (
        f"{name}: {got.dtype} {list(got.shape)}, expected {expected.dtype} {list(expected.shape)}"
    )
    differ = got != expected
    if got.is_floating_point():
        differ = (differ | (got.signbit() != expected.signbit())) & ~(
            got.isnan() & expected.isnan()
        )
    if differ.any():
        first = tuple(differ.nonzero()[0].tolist())
        raise AssertionError(
            f"{name}: {int(differ.sum())} of {differ.numel()} elements differ, the first at {list(first)}: "
            f"{got[first].item()!r}, expected {expected[first].item()!r}"
        )


def _gradients(
    outputs: tuple[Tensor, ...],
    arguments: Arguments,
    names: tuple[str, ...],
    seeds: tuple[Tensor, ...],
) -> tuple[Tensor, ...]:
    smooth = [o for o in outputs if o.requires_grad]
    return torch.autograd.grad(smooth, [arguments[name] for name in names], seeds)


def _watched(arguments: Arguments, names: tuple[str, ...]) -> Arguments:
    """The same tensors, as leaves that want gradients."""
    return {n: a.detach().requires_grad_() if n in names else a for n, a in arguments.items()}


class Problem:
    """A case with its contents, what must come out, and the comparison."""

    def __init__(self, case: Case, seed: int = 0):
        torch.manual_seed(zlib.crc32(f"{case}/{seed}".encode()))
        self.case, self.operator = case, OPERATORS[case.op]
        self.arguments = self.operator.make(case, seed)
        truth = self.operator.run if case.large else self.operator.reference
        self.expected = _tuple(truth(*self.arguments.values()))
        self.seeds = tuple(
            torch.randn(o.shape).to(o.dtype) for o in self.expected if o.is_floating_point()
        )

    def on(self, device: str) -> Arguments:
        place = LAYOUTS[self.case.layout]
        return {
            name: a
            if not isinstance(a, Tensor)
            else place(a.to(device))
            if a.is_floating_point()
            else a.to(device)
            for name, a in self.arguments.items()
        }

    def has_gradients(self) -> bool:
        """Around values that are not finite there is nothing to compare."""
        finite = all(a.isfinite().all() for a in self.arguments.values() if isinstance(a, Tensor))
        return (
            bool(self.operator.differentiable) and finite and self.case.spoil is not _tiny_and_huge
        )

    def check_outputs(self, outputs: tuple[Tensor, ...]) -> None:
        for name, got, expected in zip(self.operator.outputs, outputs, self.expected, strict=True):
            if name in self.operator.close:
                index = self.operator.outputs.index(name)
                truth = self._truth()
                assert_no_worse(name, got.cpu(), expected, truth[index])
            else:
                assert_same_bits(name, got.cpu(), expected)

    def _truth(self) -> tuple[Tensor, ...]:
        arguments = _doubled(self.arguments)
        if self.operator.truth:
            return self.operator.truth(arguments, self.expected)
        return _tuple(self.operator.reference(*arguments.values()))

    def check_gradients(self, gradients: tuple[Tensor, ...]) -> None:
        names, seeds = self.operator.differentiable, self.seeds
        if self.case.large:
            arguments = _watched(self.arguments, names)
            plain = _gradients(
                _tuple(self.operator.run(*arguments.values())), arguments, names, seeds
            )
            truth = tuple(g.double() for g in plain)
        else:
            plain, truth = (
                self._reference_gradients(kind)
                for kind in (self.arguments, _doubled(self.arguments))
            )
        for name, got, near, exact in zip(names, gradients, plain, truth, strict=True):
            # An element is a sum of many terms that may cancel, each divided by the norm of its row.
            size = exact.abs().max().item() if exact.numel() else 0.0
            size = max(size, self._largest_term(name))
            terms = max(1, sum(seed.numel() for seed in seeds) // max(1, near.shape[1]))
            rounding = torch.finfo(torch.float32).eps * math.sqrt(terms) * size
            if self.case.large:
                rounding += torch.finfo(near.dtype).eps * size
            assert got.dtype == near.dtype, (
                f"gradient of {name}: {got.dtype}, expected {near.dtype}"
            )
            assert_no_worse(f"gradient of {name}", got.cpu(), near, exact, rounding)

    def _largest_term(self, name: str) -> float:
        norms = self.arguments[name].double().norm(dim=-1)
        seeds = [seed.abs().max().item() for seed in self.seeds if seed.numel()]
        return max(seeds, default=0.0) / norms[norms > 0].min().item() if norms.any() else 0.0

    def _reference_gradients(self, arguments: Arguments) -> tuple[Tensor, ...]:
        names = self.operator.differentiable
        watched = _watched(arguments, names)
        outputs = self.operator.smooth(watched, self.expected)
        seeds = tuple(s.to(o.dtype) for s, o in zip(self.seeds, outputs, strict=True))
        return _gradients(outputs, watched, names, seeds)


def run_forward(case: Case, device: str) -> None:
    """The expected results, and the same bits a second time."""
    problem = Problem(case)
    arguments = problem.on(device)
    first, second = (_tuple(problem.operator.run(*arguments.values())) for _ in range(2))
    problem.check_outputs(first)
    for name, one, other in zip(problem.operator.outputs, first, second, strict=True):
        assert_same_bits(f"{name}, second run", other.cpu(), one.cpu())


def _step(problem: Problem, arguments: Arguments, seeds: tuple[Tensor, ...]):
    """Forward, and backward where there is one."""
    operator = problem.operator
    if not problem.has_gradients():
        return _tuple(operator.run(*arguments.values())), ()
    watched = _watched(arguments, operator.differentiable)
    outputs = _tuple(operator.run(*watched.values()))
    return outputs, _gradients(outputs, watched, operator.differentiable, seeds)


def _check(problem: Problem, outputs: tuple[Tensor, ...], gradients: tuple[Tensor, ...]) -> None:
    problem.check_outputs(tuple(o.detach() for o in outputs))
    if gradients:
        problem.check_gradients(gradients)


def run_gradient(case: Case, device: str) -> None:
    problem = Problem(case)
    seeds = tuple(s.to(device) for s in problem.seeds)
    _check(problem, *_step(problem, problem.on(device), seeds))


def _write(to: Arguments, new: Arguments) -> None:
    for name, tensor in to.items():
        if isinstance(tensor, Tensor):
            tensor.copy_(new[name], non_blocking=True)


def run_stream(case: Case, device: str) -> None:
    """Inputs arrive late on another stream: work that strays to the default one would read zeros."""
    problem = Problem(case)
    arguments = problem.on(device)
    source = {n: a.clone() if isinstance(a, Tensor) else a for n, a in arguments.items()}
    for a in arguments.values():
        if isinstance(a, Tensor):
            a.zero_()
    seeds = tuple(s.to(device) for s in problem.seeds)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # cycles, some 30 ms
        _write(arguments, source)
        results = _step(problem, arguments, seeds)
    stream.synchronize()
    _check(problem, *results)


def run_graph(case: Case, device: str) -> None:
    """Captured once, replayed with other inputs of the same shapes, and with the first ones again."""
    problems = [Problem(case, seed) for seed in (0, 1)]
    arguments = problems[0].on(device)
    seeds = tuple(s.to(device) for s in problems[0].seeds)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        _step(problems[0], arguments, seeds)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs, gradients = _step(problems[0], arguments, seeds)
    for problem in (problems[1], problems[0]):
        _write(arguments, problem.on(device))
        for to, new in zip(seeds, problem.seeds, strict=True):
            to.copy_(new)
        graph.replay()
        torch.cuda.synchronize()
        _check(problem, outputs, gradients)


def run_wrong(case: Case, wrong: Wrong, device: str) -> None:
    operator = OPERATORS[case.op]
    torch.manual_seed(0)
    arguments = operator.make(case, 0)
    right = arguments[wrong.argument]
    arguments[wrong.argument] = wrong.change(right)
    assert not torch.equal(arguments[wrong.argument], right)
    on_device = {n: a.to(device) if isinstance(a, Tensor) else a for n, a in arguments.items()}
    refused = device == "cpu" or os.environ.get("RESONA_DEBUG") == "1"
    try:
        operator.run(*on_device.values())
        if device != "cpu":
            torch.cuda.synchronize()
    except RuntimeError as error:
        if refused and f"{case.op}: {wrong.argument}" in str(error):
            return
        raise
    assert not refused, f"expected an error that names {wrong.argument}, got none"
    if operator.reference:
        run_forward(case, device)  # and nothing is left behind


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
    for dtype in (BF16, F32):
        found.append(Job("replays", Case("decode_step", "a cache", dtype, **sizes)))
    plain = Case("decode_step", "plain")
    found += [Job("wrong", plain, Wrong("lengths", *w)) for w in decode_cases.WRONG_LENGTHS.items()]
    for op in OPERATORS:
        if op == "decode_step":
            continue
        packed = Case(op, "packed", lengths=PACKED)
        found += [Job("wrong", packed, Wrong("cu_seqlens", *w)) for w in WRONG_BORDERS.items()]
        if op == "_retrieve_backward":
            plain = Case(op, "plain")
            found += [Job("wrong", plain, Wrong("indices", *w)) for w in WRONG_INDICES.items()]
    return found
