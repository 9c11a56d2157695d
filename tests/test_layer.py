"""The layer against plain PyTorch: dense masks, loops over chunks, scaled_dot_product_attention."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from layer_support import (
    CASES,
    CHUNK,
    LAYOUT_CASES,
    TOP_K,
    dense_layer,
    inputs,
    make,
    one_thread_and_seed,  # noqa: F401
)


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_equal_dense_attention(name):
    settings = copy.deepcopy(CASES[name])
    layer = make(**settings)
    x, e, y = (tensor.requires_grad_() for tensor in inputs())
    actual = layer(x, e, y)
    expected = dense_layer(layer, x, e, y, settings)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)

    wanted = [x, e, y, *(p for p in layer.parameters() if p.requires_grad)]
    cotangent = torch.randn_like(actual)
    for got, truth in zip(
        torch.autograd.grad(actual, wanted, cotangent, allow_unused=True),
        torch.autograd.grad(expected, wanted, cotangent, allow_unused=True),
        strict=True,
    ):
        assert got is not None
        torch.testing.assert_close(got, truth, rtol=0, atol=1e-9)


def test_without_mixer_output_the_branch_alone_comes_back():
    layer = make(mix="additive", alpha=0.5)
    x, e, y = inputs()
    torch.testing.assert_close(y + 0.5 * layer(x, e), layer(x, e, y))


@pytest.mark.parametrize("mix", ["gate", "fixed", "additive"])
@pytest.mark.parametrize("trainable", [False, True])
def test_rows_with_nothing_eligible(mix, trainable):
    x, e, y = inputs()
    layer = make(mix=mix, trainable_retrieval=trainable, mlp_dim=5)
    out, c = layer(x, e, y), layer(x, e)
    assert torch.equal(out[:, :CHUNK], y[:, :CHUNK])
    assert not c[:, :CHUNK].any()
    assert (out[:, CHUNK:] != y[:, CHUNK:]).any(-1).all()
    assert c[:, CHUNK:].any(-1).all()

    layer.keep_empty_rows = False
    share = {"gate": torch.sigmoid(layer.gate(x)) if mix == "gate" else 0, "fixed": 0.5}.get(mix, 0)
    torch.testing.assert_close(layer(x, e, y)[:, :CHUNK], ((1 - share) * y)[:, :CHUNK])


@pytest.mark.parametrize("length", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1])
@pytest.mark.parametrize("name", ["default", "inclusive", "module", "key convolution"])
def test_short_inputs(name, length):
    settings = copy.deepcopy(CASES[name])
    layer = make(**settings)
    x, e, y = inputs(length=length)
    out = layer(x, e, y)
    expected = dense_layer(layer, x, e, y, settings) if length else y
    torch.testing.assert_close(out, expected)
    mask = torch.ones(2, length, dtype=torch.long)
    torch.testing.assert_close(layer(x, e, y, attention_mask=mask), out)


@pytest.mark.parametrize("name", LAYOUT_CASES)
def test_padded_batch_equals_single_runs(name):
    layer = make(**copy.deepcopy(CASES[name]))
    length = 11
    spans = [(0, 11), (4, 11), (0, 7), (10, 11), (0, 2), (2, 2)]  # left, right, none, all padding
    x, e, y = inputs(batch=len(spans), length=length)
    mask = torch.zeros(len(spans), length, dtype=torch.long)
    for b, (begin, end) in enumerate(spans):
        mask[b, begin:end] = 1
        for tensor in (x, e, y):
            tensor[b, :begin] *= 1e3
            tensor[b, end:] *= 1e3
    out, c = layer(x, e, y, attention_mask=mask), layer(x, e, attention_mask=mask.bool())
    assert out.isfinite().all()
    assert c.isfinite().all()
    for b, (begin, end) in enumerate(spans):
        own = [tensor[b : b + 1, begin:end] for tensor in (x, e, y)]
        torch.testing.assert_close(out[b : b + 1, begin:end], layer(*own), rtol=0, atol=1e-10)
        torch.testing.assert_close(c[b : b + 1, begin:end], layer(*own[:2]), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", LAYOUT_CASES)
@pytest.mark.parametrize("lengths", [(5, 0, 9, 1, 0, 8, 3), (7,), (0, 2, 0)])
def test_packed_sequences_equal_single_runs(name, lengths):
    layer = make(**copy.deepcopy(CASES[name]))
    borders = [0, *itertools.accumulate(lengths)]
    x, e, y = (t.requires_grad_() for t in inputs(batch=1, length=borders[-1]))
    out = layer(x, e, y, cu_seqlens=torch.tensor(borders, dtype=torch.int32))
    single = [layer(x[:, a:b], e[:, a:b], y[:, a:b]) for a, b in itertools.pairwise(borders)]
    single = torch.cat(single, dim=1)
    torch.testing.assert_close(out, single, rtol=0, atol=1e-10)
    cotangent = torch.randn_like(out)
    packed_grad = torch.autograd.grad(out, (x, e), cotangent)
    single_grad = torch.autograd.grad(single, (x, e), cotangent)
    torch.testing.assert_close(packed_grad, single_grad, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["default", "inclusive", "module", "rotary", "trainable module"])
@pytest.mark.parametrize("packed", [False, True])
def test_embeddings_act_once_their_chunk_is_closed(name, packed):
    """e[t] shows from the first row whose position passes its chunk, and in no row before."""
    settings = copy.deepcopy(CASES[name]) | {"top_k": 8}
    layer = make(**settings)
    x, e, y = inputs(batch=1, length=12)
    cu_seqlens = torch.tensor([0, 12], dtype=torch.int32) if packed else None
    before = layer(x, e, y, cu_seqlens)
    inclusive = settings.get("eligibility") == "inclusive"
    for t in range(9):
        changed = e.clone()
        changed[:, t] += 1
        after = layer(x, changed, y, cu_seqlens)
        first = (t // CHUNK + 1) * CHUNK - int(inclusive)
        assert torch.equal(after[:, :first], before[:, :first])
        assert (after[:, first:] != before[:, first:]).any(-1).all()


def test_hidden_states_act_on_their_own_row_alone():
    layer = make()
    x, e, y = inputs()
    before = layer(x, e, y)
    changed = x.clone()
    changed[:, 5] *= -1
    differs = (layer(changed, e, y) != before).any(-1)
    assert differs[:, 5].all()
    assert differs.sum() == len(x)


def test_key_convolution_stops_at_borders():
    """A key may know its left neighbour in the chunk before, never one in another sequence."""
    layer = make(key_conv=2)
    x, e, y = inputs(batch=1, length=16)
    cu_seqlens = torch.tensor([0, 8, 16], dtype=torch.int32)
    before = layer(x, e, y, cu_seqlens)
    e[:, 7] += 1
    after = layer(x, e, y, cu_seqlens)
    assert torch.equal(after, before)  # token 7 is in the ragged tail of its sequence


def test_knobs_act_between_calls():
    layer = make(mix="fixed", top_k=1)
    x, e, y = inputs()
    layer.top_k, layer.alpha, layer.chunk_size = TOP_K, 0.9, CHUNK
    expected = dense_layer(layer, x, e, y, {"mix": "fixed", "alpha": 0.9})
    torch.testing.assert_close(layer(x, e, y), expected)
    layer.alpha = 0.0
    assert torch.equal(layer(x, e, y), y)
