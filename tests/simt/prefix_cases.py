"""Problems of prefix linear attention for the simulator, and how far results may be from the reference."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from cases import Case
from harness import SCHEDULES, Simulator, mutant
from prefix_support import Prefix

from resona_ext.jrt import reference

ANY = SCHEDULES[0]
F16, F32, F64, BF16 = torch.float16, torch.float32, torch.float64, torch.bfloat16
DTYPES = [F32, F16, BF16]
ROWS = ("query", "key", "value", "prefix_key", "prefix_value")
# Choices of a plan; 0: its own.
CHOICES = {"segment": 0, "batch_part": 0, "sms": 1}
# Of shared memory: all of an H100's, and little enough for slices.
SHARED_BYTES = {"stage_prefix": (232448, 60000), "stage_prefix_backward": (232448, 80000)}


def name_of(value) -> str:
    return str(value).removeprefix("torch.")


def storage(x: torch.Tensor) -> np.ndarray:
    """The same memory, strides included; numpy has no bfloat16."""
    if x.dtype == torch.bool:
        return x.view(torch.uint8).numpy()
    return (x.view(torch.int16) if x.element_size() == 2 else x).numpy()


def bound(plain: torch.Tensor, truth: torch.Tensor, features: int) -> np.ndarray:
    """The rule of support.assert_no_worse for sums over features, with the rounding of 16-bit results."""
    if truth.numel() == 0:
        return np.zeros(truth.shape)
    error, largest = (plain.double() - truth).abs().max().item(), truth.abs().max().item()
    rounding = features**0.5 * torch.finfo(F32).eps * max(1, largest)
    if plain.dtype != F32:
        rounding += torch.finfo(plain.dtype).eps * largest
    return np.full(truth.shape, 2 * error + rounding)


def strides_of(name: str, x: torch.Tensor) -> dict[str, int]:
    return {
        f"{name}_{key}_stride": n
        for key, n in zip(("batch", "token", "head"), x.stride(), strict=False)
    }


def scalars_of(p: Prefix) -> dict:
    sequences = p.batch if p.lengths is None else len(p.lengths)
    return {
        **{"batch": p.batch, "tokens": p.tokens, "prefix_rows": p.rows, "heads": p.heads},
        **{"feature_dim": p.feature_dim, "value_dim": p.value_dim, "sequences": sequences},
        **{"dtype": name_of(p.dtype), "scale": repr(p.scale or p.feature_dim**-0.5)},
    }


def case_of(kernel: str, p: Prefix, inputs: dict, results: dict, **choices) -> Case:
    """`results`: name -> (plain, truth)."""
    rows = {
        n: t
        for n, t in {**inputs, **{n: r[0] for n, r in results.items()}}.items()
        if t is not None
    }
    features = 1 + p.feature_dim + p.feature_dim**2
    scalars = scalars_of(p) | CHOICES | choices
    if kernel in SHARED_BYTES:
        scalars["shared_bytes"] = SHARED_BYTES[kernel][scalars.pop("sliced", False)]
    for name, t in rows.items():
        scalars |= strides_of(name, t)
    return Case(
        name=f"{kernel} {name_of(p.dtype)} {p.lengths} {tuple(inputs['query'].shape)} M={p.rows} "
        f"V={p.value_dim} {choices}",
        kernel=kernel,
        inputs={n: storage(t) for n, t in inputs.items() if t is not None},
        expected={n: storage(truth.to(plain.dtype)) for n, (plain, truth) in results.items()},
        near={n: bound(plain, truth, features) for n, (plain, truth) in results.items()},
        dtypes={n: name_of(plain.dtype) for n, (plain, _) in results.items()},
        scalars=scalars,
    )


def facts_of(case: Case, sim: Simulator) -> np.ndarray:
    """Of its plan: workspace, pieces, slices, and whether rows and values are loaded 16 bytes at a time."""
    facts, arrays = np.empty(5, np.int64), {**case.inputs, **case.expected}
    sim.run(f"{case.kernel}_plan", arrays, {"facts": facts}, **case.scalars)
    return facts


def with_workspace(case: Case, sim: Simulator) -> Case:
    """As much as the plan asks for, and no more."""
    return replace(case, workspace={"workspace": np.empty(facts_of(case, sim)[0], np.uint8)})


def forward_case(sim: Simulator, p: Prefix, **choices) -> Case:
    plain = p.call(reference.quadratic)
    truth = p.call(
        reference.quadratic,
        **{
            n: t.double() for n, t in p.arguments.items() if t is not None and t.is_floating_point()
        },
    )
    names = ("out", "state", "normalizer")
    results = dict(zip(names, zip(plain, truth, strict=True), strict=True))
    return with_workspace(case_of("stage_prefix", p, p.arguments, results, **choices), sim)


WAIT = "ptx::griddepcontrol_wait();\n  "
DROPPED = (
    "RESONA_DROPPED"  # the environment variable that numbers the line which a mutant leaves out
)


def mutant_without(runner: str, lines: dict[str, tuple[str, str]]) -> Simulator:
    """A race build without the statement that begins one of these lines: one compilation for all of them."""
    left_out = 'if (atoi(getenv("{}")) != {}) {}'
    changes = [
        (header, line, left_out.format(DROPPED, i, line))
        for i, (header, line) in enumerate(lines.values())
    ]
    return mutant("race", runner, *changes[0], *changes[1:])


GRADIENTS = (*ROWS, "initial_state", "initial_normalizer")


def backward_case(sim: Simulator, p: Prefix, state_gradients: bool = True, **choices) -> Case:
    """Gradients of a random combination of out, state and normalizer, or of out alone."""
    floats = [n for n, t in p.arguments.items() if t is not None and t.is_floating_point()]
    leaves = {n: p.arguments[n].detach().requires_grad_() for n in floats}
    doubled = {n: p.arguments[n].detach().double().requires_grad_() for n in floats}
    plain, truth = (p.call(reference.quadratic, **x) for x in (leaves, doubled))
    given = [torch.randn(o.shape).to(o.dtype) for o in plain]
    count = 3 if state_gradients else 1

    def gradients(outputs, of):
        grads = torch.autograd.grad(
            outputs[:count],
            list(of.values()),
            [g.to(o.dtype) for g, o in zip(given, outputs[:count], strict=False)],
            allow_unused=True,
        )
        filled = (
            torch.zeros_like(t) if g is None else g for g, t in zip(grads, of.values(), strict=True)
        )
        return dict(zip(of, filled, strict=True))

    expected, exact = gradients(plain, leaves), gradients(truth, doubled)
    results = {f"{n}_gradient": (expected[n], exact[n]) for n in GRADIENTS if n in floats}
    names = ("out_gradient", "state_gradient", "normalizer_gradient")
    # What the operator saves: its own out, rounded.
    inputs = {**p.arguments, "out": truth[0].detach().to(p.dtype)}
    inputs |= dict(zip(names[:count], given, strict=False))
    return with_workspace(case_of("stage_prefix_backward", p, inputs, results, **choices), sim)


def step_case(p: Prefix) -> Case:
    a = p.arguments
    doubled = {n: t.double() for n, t in a.items() if t is not None and t.is_floating_point()}
    plain, truth = p.call(reference.recurrent), p.call(reference.recurrent, **doubled)
    results = dict(zip(("out", "state", "normalizer"), zip(plain, truth, strict=True), strict=True))
    case = case_of("stage_prefix_step", p, {n: a[n] for n in (*ROWS[:3], "mask")}, results)
    starts = {n: a[f"initial_{n}"].numpy() for n in ("state", "normalizer")}
    return replace(case, outputs=starts)


def exactly(case: Case, sim: Simulator) -> Case:
    """The case that expects the very bits of a first run."""
    got = case.check(sim, ANY)
    return replace(case, expected={name: got[name] for name in case.expected}, near={})


PROBLEMS = {
    "plain": {},
    "no prefix": dict(rows=0),
    "all prefix": dict(tokens=65, rows=65),
    "one token": dict(tokens=1, rows=1),
    "no tokens": dict(tokens=0, rows=0, state=True),
    "no batch": dict(batch=0),
    "exact tiles": dict(tokens=128, rows=64),
    "padding": dict(mask=True, prefix_lengths=True),
    "continued": dict(state=True, rows=0),
    "everything": dict(state=True, mask=True, prefix_lengths=True, scale=0.3),
    "packed": dict(lengths=[7, 0, 80, 1], prefix_lengths=True, mask=True, state=True),
    "packed, no prefix": dict(lengths=[66, 3], rows=0),
    "odd sizes": dict(feature_dim=5, value_dim=17, heads=3, tokens=67, rows=66),
    "16-byte rows": dict(feature_dim=8, value_dim=24, heads=3, mask=True, state=True),
    "smallest": dict(feature_dim=1, value_dim=1),
    "largest": dict(batch=1, heads=1, feature_dim=32, value_dim=128),
    "paper": dict(batch=1, heads=1, tokens=130, rows=70, feature_dim=16, value_dim=64),
}
# Choices of a plan that results must not depend on but for rounding.
PLANS = {
    "pieces": dict(segment=64),
    "longer pieces": dict(segment=128),
    "parts": dict(batch_part=1),
    "slices": dict(sliced=True),
    "everything": dict(segment=64, batch_part=2, sliced=True),
}


def planned(plan: str, dtype, **changes) -> Prefix:
    """Long enough for pieces, wide enough for slices."""
    sizes = dict(batch=3, heads=1, tokens=150, rows=100, mask=True, prefix_lengths=True, state=True)
    wide = dict(feature_dim=8, value_dim=72) if "sliced" in PLANS[plan] else {}
    return Prefix(**{**sizes, **wide, **changes}, dtype=dtype)


def neighbour(p: Prefix) -> Prefix:
    """The same problem but for the last bit of each number: as hard, and rounded otherwise."""

    def off(t):
        if t is None or not t.is_floating_point():
            return t
        signs = torch.randint(2, t.shape) * 2 - 1
        return (t.double() * (1 + torch.finfo(t.dtype).eps * signs)).to(t.dtype)

    other = replace(p)
    other.arguments = {name: off(t) for name, t in p.arguments.items()}
    return other


def forgiving(make, sim: Simulator, p: Prefix, **choices) -> Case:
    """The case of p, whose results may be as far off as those of any of twelve neighbours, or of four other
    problems of its shape.

    Where results are few the error of plain PyTorch, of which twice is allowed, may vanish by chance; and in
    float16 plain PyTorch may overflow.
    """
    case = make(sim, p, **choices)
    others = [neighbour(p) for _ in range(12)] + [replace(p) for _ in range(4)]
    near = [make(sim, other, **choices).near for other in others]
    most = {name: np.fmax.reduce([x[name] for x in (case.near, *near)]) for name in case.near}
    return replace(case, near=most)


def wrong_values(sim: Simulator, make) -> list[Case]:
    """Any numbers in cu_seqlens and prefix_lengths: no foreign memory."""
    cases = []
    for cu_seqlens in ([0, 90, 10, 61], [-7, 20, 2**31 - 1, 61], [5, 5, 5, 5], [9, 1, 40, -1]):
        p = Prefix(lengths=[20, 30, 11], prefix_lengths=True, mask=True, state=True, dtype=F32)
        case = make(sim, p)
        case.name += str(cu_seqlens)
        case.inputs["cu_seqlens"] = np.array(cu_seqlens, np.int32)
        case.inputs["prefix_lengths"] = np.array([-1, 2**31 - 1, -(2**31)], np.int32)
        case.workspace |= case.expected
        case.expected = {}
        cases.append(case)
    return cases
