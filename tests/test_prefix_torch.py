"""Prefix linear attention as a citizen of torch: opcheck, gradcheck, compile, autocast, vmap, FLOPs."""

import pytest
import torch
from prefix_support import Prefix
from torch.utils.flop_counter import FlopCounterMode

ops = torch.ops.resona
op = ops.prefix_linear_attention
F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16

inductor = pytest.mark.skipif(
    " " in torch.__file__,
    reason="torch is installed in a path with spaces: Inductor cannot link there (2.13)",
)

VARIANTS = {
    "plain": {},
    "no prefix": dict(rows=0),
    "all extras": dict(mask=True, prefix_lengths=True, state=True, scale=0.4),
    "packed": dict(lengths=[4, 0, 7], mask=True, prefix_lengths=True, state=True),
}


def small(**options) -> Prefix:
    defaults = dict(batch=2, tokens=9, rows=5, feature_dim=3, value_dim=4, dtype=F32)
    return Prefix(**{**defaults, **options})


def requiring_grad(p: Prefix) -> dict:
    return {
        k: t.requires_grad_() if t is not None and t.is_floating_point() else t
        for k, t in p.arguments.items()
    }


@pytest.mark.parametrize("variant", VARIANTS)
def test_opcheck(variant):
    p = small(**VARIANTS[variant])
    torch.library.opcheck(op.default, (), {**requiring_grad(p), "scale": p.scale})


@pytest.mark.parametrize("variant", VARIANTS)
def test_opcheck_of_the_backward_operator_and_the_step(variant):
    p = small(**VARIANTS[variant])
    out, state, normalizer = p.call(op)
    tests = ("test_schema", "test_faketensor")
    backward = ops._prefix_linear_attention_backward.default
    for gradients in ((None, None), (torch.randn_like(state), torch.randn_like(normalizer))):
        given = (torch.randn_like(out), *gradients, out, *p.arguments.values())
        torch.library.opcheck(backward, given, {"scale": p.scale}, test_utils=tests)
    if p.lengths is None:
        rows = [p.arguments[n][:, :1] for n in ("query", "key", "value")]
        torch.library.opcheck(
            ops.prefix_linear_attention_step.default, (*rows, state, normalizer), test_utils=tests
        )


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradcheck(variant):
    sizes = dict(tokens=5, rows=3, feature_dim=2, value_dim=2, heads=1)
    p = small(**{**sizes, **VARIANTS[variant]}, dtype=F64)
    arguments = requiring_grad(p)
    leaves = {k: t for k, t in arguments.items() if t is not None and t.requires_grad}

    def function(*values):
        return p.call(op, **dict(zip(leaves, values, strict=True)))

    assert torch.autograd.gradcheck(function, tuple(leaves.values()))


def test_double_backward_is_refused():
    p = small()
    out = p.call(op, **requiring_grad(p))[0]
    (gradient,) = torch.autograd.grad(out.sum(), p.arguments["query"], create_graph=True)
    with pytest.raises(RuntimeError, match="_prefix_linear_attention_backward: double backward"):
        gradient.sum().backward()


def test_forward_mode_is_refused():
    p = small()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(
            p.arguments["value"], torch.ones_like(p.arguments["value"])
        )
        with pytest.raises(RuntimeError, match="prefix_linear_attention: forward-mode"):
            p.call(op, value=dual)


@inductor
@pytest.mark.parametrize("variant", ["all extras", "packed"])
def test_compile_with_gradients_and_other_lengths(variant):
    compiled = torch.compile(lambda **a: op(**a), fullgraph=True, dynamic=True)
    for tokens in (9, 13):
        lengths = [4, 0, tokens - 4] if variant == "packed" else None
        p = small(**{**VARIANTS[variant], "lengths": lengths, "tokens": tokens})
        expected = p.results(op)
        for name, got in p.results(compiled).items():
            torch.testing.assert_close(got, expected[name], msg=name)


def test_autocast_casts_rows_but_not_states():
    p = small(state=True)
    with torch.autocast("cpu", BF16):
        out, state, normalizer = p.call(op)
    assert (out.dtype, state.dtype, normalizer.dtype) == (BF16, F32, F32)
    rows = ("query", "key", "value", "prefix_key", "prefix_value")
    expected = p.call(op, **{n: p.arguments[n].to(BF16) for n in rows})
    for got, want in zip((out, state, normalizer), expected, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("variant", ["plain", "all extras", "packed"])
def test_vmap(variant):
    problems = [small(**VARIANTS[variant]) for _ in range(3)]
    shared = ("cu_seqlens",) if variant == "packed" else ()
    names = [k for k, t in problems[0].arguments.items() if t is not None and k not in shared]
    if variant == "packed":  # borders are shared, so prefixes must fit them
        names.remove("prefix_lengths")
    stacked = [torch.stack([p.arguments[n] for p in problems]) for n in names]
    rest = {k: t for k, t in problems[0].arguments.items() if k not in names}

    def function(*values):
        return problems[0].call(op, **rest, **dict(zip(names, values, strict=True)))

    results = torch.func.vmap(function)(*stacked)
    for i in range(3):
        expected = function(*(t[i] for t in stacked))
        for got, want in zip(results, expected, strict=True):
            torch.testing.assert_close(got[i], want)


def test_flops():
    """Twice the products of tile pairs, of reads and of updates of the half state."""
    p = small(batch=2, tokens=10, rows=4, heads=2, feature_dim=3, value_dim=4)
    state = 2 * (1 + 3 + 6) * 4
    with FlopCounterMode(display=False) as counter:
        p.call(op)
    assert counter.get_total_flops() == 2 * 2 * (10 * (2 * 64 * 7 + 2 * state) + 4 * state)
