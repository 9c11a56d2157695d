"""Prefix linear attention against its two references: values, gradients, states, bad input."""

import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from prefix_support import Prefix
from support import accumulation_dtype, assert_no_worse, name_of

from resona_ext.jrt import (
    PrefixState,
    prefix_linear_attention,
    prefix_linear_attention_step,
    reference,
)

ops = torch.ops.resona
F16, F32, F64, BF16 = torch.float16, torch.float32, torch.float64, torch.bfloat16


PROBLEMS = {
    "plain": {},
    "no prefix": dict(rows=0),
    "all prefix": dict(tokens=65, rows=65),
    "one token": dict(tokens=1, rows=1),
    "no tokens": dict(tokens=0, rows=0, state=True),
    "no batch": dict(batch=0),
    "exact tiles": dict(tokens=128, rows=64),
    "prefix lengths": dict(prefix_lengths=True),
    "padding": dict(mask=True, prefix_lengths=True),
    "continued": dict(state=True, rows=0),
    "everything": dict(state=True, mask=True, prefix_lengths=True, scale=0.3),
    "packed": dict(lengths=[7, 0, 80, 1], prefix_lengths=True, mask=True, state=True),
    "packed, no prefix": dict(lengths=[66, 3], rows=0),
    "odd sizes": dict(feature_dim=5, value_dim=17, heads=3, tokens=67, rows=66),
    "largest": dict(batch=1, heads=1, feature_dim=32, value_dim=128),
    "segments": dict(batch=1, heads=1, tokens=1100, rows=600, mask=True, state=True),
}


@pytest.mark.parametrize("case", PROBLEMS)
def test_agrees_with_both_references(case):
    p = Prefix(**PROBLEMS[case])
    expected = p.results(reference.quadratic)
    functions = [ops.prefix_linear_attention]
    if p.tokens * p.feature_dim <= 1000:  # the recurrence in Python is slow
        functions.append(reference.recurrent)
    for function in functions:
        for name, got in p.results(function).items():
            torch.testing.assert_close(got, expected[name], rtol=1e-10, atol=1e-10, msg=name)


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=name_of)
@pytest.mark.parametrize("case", ["plain", "everything", "packed", "segments", "paper"])
def test_error_is_no_worse_than_plain_pytorch(dtype, case):
    paper = dict(batch=1, tokens=300, rows=150, feature_dim=16, value_dim=64)
    p = Prefix(**{**PROBLEMS, "paper": paper}[case], dtype=dtype)
    got = p.results(ops.prefix_linear_attention)
    plain, truth = p.results(reference.quadratic), p.results(reference.quadratic, F64)
    for name, t in got.items():
        # Gradients of rows are rounded to their dtype, and d den stems from the rounded out.
        eps = torch.finfo(dtype).eps * (truth[name].abs().max().item() if t.numel() else 0)
        assert_no_worse(name, t, plain[name], truth[name], rounding=eps)


@settings(max_examples=15, deadline=None)
@given(
    data=st.fixed_dictionaries(
        dict(
            batch=st.integers(1, 3),
            tokens=st.integers(0, 140),
            heads=st.integers(1, 3),
            feature_dim=st.integers(1, 9),
            value_dim=st.integers(1, 20),
            prefix_lengths=st.booleans(),
            mask=st.booleans(),
            state=st.booleans(),
        )
    ),
    share=st.floats(0, 1),
)
def test_any_shape(data, share):
    torch.manual_seed(0)
    p = Prefix(**data, rows=int(share * data["tokens"]))
    expected = p.results(reference.quadratic)
    for name, got in p.results(ops.prefix_linear_attention).items():
        torch.testing.assert_close(got, expected[name], rtol=1e-9, atol=1e-9, msg=name)


def test_features_are_the_polynomial():
    q, k = torch.randn(2, 7, 16, dtype=F64)
    for scale in (None, 0.1):
        s = (q * k).sum(-1) * (16**-0.5 if scale is None else scale)
        features = (reference.taylor_features(x, scale) for x in (q, k))
        product = torch.mul(*features).sum(-1)
        torch.testing.assert_close(product, 1 + s + s * s / 2)


@pytest.mark.parametrize("split", [1, 40, 63, 64, 69])
def test_prefill_and_steps_equal_the_full_forward(split):
    p = Prefix(mask=True, prefix_lengths=True, rows=1, dtype=F32)
    a = p.arguments
    whole, final = prefix_linear_attention(
        **{k: a[k] for k in ("query", "key", "value", "prefix_key", "prefix_value", "mask")},
        prefix_lengths=a["prefix_lengths"],
        return_state=True,
    )
    tokens = ("query", "key", "value", "mask")
    head, state = prefix_linear_attention(
        **{k: a[k][:, :split] for k in tokens},
        prefix_key=a["prefix_key"],
        prefix_value=a["prefix_value"],
        prefix_lengths=a["prefix_lengths"],
        return_state=True,
    )
    outs = [head]
    for i in range(split, p.tokens):
        row = {k: a[k][:, i : i + 1] for k in tokens}
        outs.append(
            prefix_linear_attention_step(
                row["query"], row["key"], row["value"], state, mask=row["mask"]
            )
        )
    torch.testing.assert_close(torch.cat(outs, dim=1), whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state.state, final.state, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state.normalizer, final.normalizer, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64], ids=name_of)
def test_a_step_is_the_recurrence(dtype):
    p = Prefix(tokens=1, rows=0, state=True, mask=True, batch=5, dtype=dtype)
    a = p.arguments
    expected = p.call(reference.recurrent)
    state = PrefixState(a["initial_state"].clone(), a["initial_normalizer"].clone())
    out = prefix_linear_attention_step(a["query"], a["key"], a["value"], state, mask=a["mask"])
    eps = torch.finfo(accumulation_dtype(dtype)).eps * 100
    for got, want in zip((out, *state), expected, strict=True):
        tolerance = max(eps, torch.finfo(got.dtype).eps)
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
    idle = ~a["mask"][:, 0]
    assert idle.any() and torch.equal(state.state[idle], a["initial_state"][idle])
    assert (out[idle] == 0).all()


def test_prefill_in_pieces_trains_through_the_state():
    p = Prefix(tokens=150, rows=0, state=True)
    whole = p.results(ops.prefix_linear_attention)

    def pieces(query, key, value, initial_state, initial_normalizer, scale, **_):
        state, outs = (initial_state, initial_normalizer), []
        for begin, end in ((0, 30), (30, 94), (94, 150)):
            rows = [t[:, begin:end] for t in (query, key, value)]
            none = (rows[1][:, :0], rows[2][:, :0])
            out, *state = ops.prefix_linear_attention(*rows, *none, None, None, None, *state)
            outs.append(out)
        return torch.cat(outs, dim=1), *state

    for name, got in p.results(pieces).items():
        torch.testing.assert_close(got, whole[name], rtol=1e-10, atol=1e-10, msg=name)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_padding_may_hold_anything(poison):
    p = Prefix(mask=True, prefix_lengths=True, state=True, batch=3)
    p.arguments["mask"][1] = False  # all of a sequence
    expected = p.results(ops.prefix_linear_attention)
    pads = ~p.arguments["mask"]
    beyond = torch.arange(p.rows) >= p.arguments["prefix_lengths"][:, None]
    for name, bad in (
        *((n, pads) for n in ("query", "key", "value")),
        *((n, pads[:, : p.rows] | beyond) for n in ("prefix_key", "prefix_value")),
    ):
        p.arguments[name] = p.arguments[name].masked_fill(bad[..., None, None], poison)
    for name, got in p.results(ops.prefix_linear_attention).items():
        assert torch.equal(got, expected[name]), name
    assert (expected["out"][pads] == 0).all()
    assert (expected["d prefix_value"][pads[:, : p.rows] | beyond] == 0).all()


def test_a_sequence_of_padding_alone():
    p = Prefix()
    mask = torch.zeros(p.batch, p.tokens, dtype=torch.bool)
    for t in p.call(ops.prefix_linear_attention, mask=mask):
        assert (t == 0).all()


def test_the_same_bits_for_any_number_of_threads(threads):
    p = Prefix(batch=1, tokens=1400, rows=700, heads=2, dtype=F32)
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(p.results(ops.prefix_linear_attention))
    for other in results[1:]:
        for name, got in other.items():
            assert torch.equal(got, results[0][name]), name


def test_strides_do_not_matter():
    p = Prefix(dtype=F32)
    expected = p.call(ops.prefix_linear_attention)
    moved = {
        k: t.transpose(1, 2).contiguous().transpose(1, 2)
        for k, t in p.arguments.items()
        if t is not None
    }
    moved["value"] = p.arguments["value"].mT.contiguous().mT
    for got, want in zip(p.call(ops.prefix_linear_attention, **moved), expected, strict=True):
        assert torch.equal(got, want)


def test_time_is_linear(threads):
    """Processor time, least of several: 2 for linear, 4 for quadratic work."""
    threads(1)

    def seconds(tokens: int) -> float:
        p = Prefix(
            batch=1,
            tokens=tokens,
            rows=tokens // 2,
            heads=2,
            feature_dim=16,
            value_dim=64,
            dtype=F32,
        )
        best = float("inf")
        for _ in range(9):
            begin = time.process_time()
            p.call(ops.prefix_linear_attention)
            best = min(best, time.process_time() - begin)
        return best

    assert seconds(8192) / seconds(4096) < 2.8
