"""How a case runs: forward, with gradients, on a stream, in a graph, with wrong values; what is compared."""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from gpu_operators import LAYOUTS, OPERATORS, Arguments, Case, tiny_and_huge
from support import assert_no_worse
from torch import Tensor

from benchmarks.kernels.timer import capture


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
            bool(self.operator.differentiable) and finite and self.case.spoil is not tiny_and_huge
        )

    def check_outputs(self, outputs: tuple[Tensor, ...]) -> None:
        for name, got, expected in zip(self.operator.outputs, outputs, self.expected, strict=True):
            if name in self.operator.close:
                index = self.operator.outputs.index(name)
                truth = self._truth()[index]
                rounding = self.operator.rounding(self.case, truth)
                assert_no_worse(name, got.cpu(), expected, truth, rounding)
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
    graph, (outputs, gradients) = capture(lambda: _step(problems[0], arguments, seeds))
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
