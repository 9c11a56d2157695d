"""The benchmark harness: its checks pass what is right and catch what is wrong, and so do its contenders.

Nothing here looks at a time: these machines are shared and slow, and times belong in records.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.kernels import layer, operators, truth
from benchmarks.kernels.baselines import Checkouts, all_baselines, flex, plain
from benchmarks.kernels.data import Case
from benchmarks.kernels.shapes import TINY
from resona_ext import reference


@pytest.fixture(params=["float32", "bfloat16"])
def case(request) -> Case:
    return Case("attend", replace(TINY, length=203), dtype_name=request.param)


def test_check_forward_catches_one_wrong_row(case):
    out = case.selected_attention()
    for computes in ("selected", "whole"):
        assert truth.check_forward(case, out, computes).passed
    assert not truth.check_forward(case, out, "dense").passed
    out[1, -1, 2] += 0.5
    for computes in ("selected", "whole"):
        assert not truth.check_forward(case, out, computes).passed
    out[0, -1] = torch.nan
    assert not truth.check_forward(case, out, "selected").passed


def test_check_search_wants_exact_indices_of_ours_and_scores_of_others(case):
    s = case.shape
    arguments = (s.chunk_size, s.top_k, s.length)
    found = reference.retrieve(case.query_embedding, case.chunk_embedding, *arguments)
    assert truth.check_search(case, found, exact=True).passed
    full = (found[0] >= 0).all(dim=-1, keepdim=True)
    swapped = (torch.where(full, found[0].flip(-1), found[0]), found[1])
    assert not truth.check_search(case, swapped, exact=True).passed
    assert truth.check_search(case, swapped, exact=False).passed
    invented = (torch.where(found[0] > 0, found[0] - 1, found[0]), found[1])
    assert not truth.check_search(case, invented, exact=False).passed
    future = (torch.where(found[0] >= 0, 24, -1), found[1])
    assert not truth.check_search(case, future, exact=False).passed
    worse = (found[0], found[1] - 1e-3)
    assert not truth.check_search(case, worse, exact=False).passed
    fewer = (found[0].clone().index_fill_(3, torch.tensor(1), -1), found[1])
    assert not truth.check_search(case, fewer, exact=False).passed


def test_check_pool_catches_an_unnormalised_chunk(case):
    assert truth.check_pool(case, case.chunk_embedding, exact=True).passed
    assert not truth.check_pool(case, 2 * case.chunk_embedding, exact=False).passed


@pytest.mark.parametrize("computes", ["selected", "dense"])
@pytest.mark.parametrize("wrong", [0, 1, 2])
def test_check_backward_catches_each_gradient(computes, wrong):
    case = Case("backward", replace(TINY, length=203))
    leaves = [x.detach().requires_grad_() for x in (case.query, case.key, case.value)]
    if computes == "dense":
        out = truth.dense_rows(*leaves, torch.arange(203))
    else:
        out = reference.attend(*leaves, case.indices, case.shape.chunk_size)[0]
    gradients = list(torch.autograd.grad(out, leaves, case.grad_out))
    assert truth.check_backward(case, tuple(gradients), computes).passed
    gradients[wrong] = gradients[wrong] * 1.01
    assert not truth.check_backward(case, tuple(gradients), computes).passed


def test_dense_rows_is_causal_attention():
    query, key, value = (torch.randn(2, 40, heads, 8) for heads in (4, 2, 2))
    heads_first = (x.transpose(1, 2) for x in (query, key, value))
    expected = torch.nn.functional.scaled_dot_product_attention(
        *heads_first, is_causal=True, enable_gqa=True
    )
    got = truth.dense_rows(query, key, value, torch.arange(40))
    torch.testing.assert_close(got, expected.transpose(1, 2))


def test_gather_attends_to_the_selected_chunks_and_gives_zero_elsewhere(monkeypatch):
    monkeypatch.setattr(plain, "BLOCK_BYTES", {"cpu": 1 << 14})  # several blocks
    case = Case("attend", replace(TINY, length=203))
    got = plain.gather_attention(case.query, case.key, case.value, case.indices, 8)
    expected = reference.attend(case.query, case.key, case.value, case.indices, 8)[0]
    torch.testing.assert_close(got, expected)
    assert not got[:, :8].any()


def test_plain_search_fills_unused_slots(monkeypatch):
    monkeypatch.setattr(plain, "BLOCK_BYTES", {"cpu": 1 << 10})
    case = Case("search", replace(TINY, length=50, top_k=9))
    found = plain.search(case.query_embedding, case.chunk_embedding, 8, 9, 50)
    expected = reference.retrieve(case.query_embedding, case.chunk_embedding, 8, 9, 50)
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1])


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_uses_the_same_mask(monkeypatch):
    from torch.nn.attention.flex_attention import flex_attention

    monkeypatch.setattr(flex, "_compiled", lambda: flex_attention)  # slow and exact
    case = Case("attend", replace(TINY, length=203))
    forward = flex.build(case, Checkouts())
    out = forward.standard(forward.function(*forward.inputs(case)))
    torch.testing.assert_close(out, case.selected_attention())


def test_block_check_catches_a_look_ahead():
    case = Case("layer-forward", replace(TINY, length=64))
    block = layer.make_block(case, is_augmented=True)
    call, check = layer.forward(block, case)
    assert check(call()).passed
    block.mixer.register_forward_hook(lambda module, inputs, y: y + y.mean(dim=1, keepdim=True))
    assert not check(call()).passed


def test_decoding_check_catches_a_forgotten_token():
    case = Case("layer-decode", replace(TINY, length=64))
    block = layer.make_block(case, is_augmented=True)
    with torch.no_grad():
        call, check = layer.decode(block, case)
        call()
        assert check(call()).passed
        call.cache.key.zero_()
        assert not check(call()).passed


def test_decoding_goes_on_beyond_the_room(monkeypatch):
    monkeypatch.setattr(layer, "ROOM", 3)
    case = Case("layer-decode", replace(TINY, length=60))
    with torch.no_grad():
        call, _ = layer.decode(layer.make_block(case, is_augmented=True), case)
        for _ in range(20):
            assert call().isfinite().all()
    assert call.cache.get_seq_length() <= 63


def test_decode_step_finds_the_cache_as_it_was():
    case = Case("decode", replace(TINY, length=203, queries=1))
    step = operators.DecodeStep(case)
    assert torch.equal(step(), step())
    assert truth.check_forward(case, step(), "whole").passed


def test_gpu_only_baselines_say_why_they_are_missing():
    for name, baseline in all_baselines().items():
        reason = baseline.missing("cpu", Checkouts())
        if name in ("nsa", "flashmoba"):
            assert f"--{name} PATH" in reason
        elif name in ("sdpa-cudnn", "fa2", "fa3", "fa4"):
            assert reason
        elif name != "sdpa-flash":
            assert reason is None
