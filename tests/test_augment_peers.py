"""`augment` on models of fla and mamba_ssm: see peer_models.py for what of them runs here."""

from __future__ import annotations

import copy
import itertools

import peer_models
import pytest
import torch
from peer_models import LAYERS, VOCABULARY

from resona_ext.integrations import augment

pytest.importorskip("transformers", reason="transformers 5.23 wants Python >= 3.11")


@pytest.fixture(autouse=True)
def _one_thread(threads):
    threads(1)


def insert(model, **settings):
    augmentation = augment(model, **({"chunk_size": 4, "top_k": 2} | settings))
    with torch.no_grad():
        for layer in augmentation.layers.values():
            layer.o_proj.weight.normal_(std=0.3)
    return augmentation


def tokens(batch: int = 2, length: int = 20) -> torch.Tensor:
    return torch.randint(1, VOCABULARY, (batch, length))


# --- fla ------------------------------------------------------------------------------------------


@pytest.fixture(params=["fla_standin", "fla_package"])
def fla(request):
    return getattr(peer_models, request.param)().eval()


def test_fla_there_and_back(fla):
    ids = tokens()
    with torch.no_grad():
        before = fla(ids)[0]
        augmentation = augment(fla, chunk_size=4, top_k=2)
        assert list(augmentation.layers) == [f"model.layers.{i}" for i in (0, 2, 3)]
        assert torch.equal(fla(ids)[0], before)
        augmentation.remove()
        augmentation = insert(fla)
        assert not torch.equal(fla(ids)[0], before)
        augmentation.remove()
        assert torch.equal(fla(ids)[0], before)
    assert not any("resona" in name for name in fla.state_dict())


def test_fla_steps_with_reorder_and_reset(fla):
    insert(fla, key_conv=2)
    ids, order = tokens(batch=3), torch.tensor([2, 0, 0])
    with torch.no_grad():
        full = fla(ids)[0]
        cache = None
        for _ in range(2):
            parts = []
            for begin, end in itertools.pairwise([0, 9, 10, 13, *range(14, 21)]):
                part, cache = fla(ids[:, begin:end], past_key_values=cache, use_cache=True)
                parts.append(part)
            torch.testing.assert_close(torch.cat(parts, dim=1), full, rtol=0, atol=1e-5)
            assert len(cache.layers) == LAYERS + 1
            cache.reorder_cache(order)
            more = tokens(batch=3, length=2)
            expected = fla(torch.cat([ids[order], more], dim=1))[0][:, 20:]
            got, _ = fla(more, past_key_values=cache, use_cache=True)
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
            cache.reset()


def test_fla_left_padding(fla):
    insert(fla)
    ids = tokens(1, 15)
    padded = torch.nn.functional.pad(ids, (5, 0))
    with torch.no_grad():
        got, _ = fla(padded, attention_mask=(padded != 0).long())
        torch.testing.assert_close(got[:, 5:], fla(ids)[0], rtol=0, atol=1e-5)


def test_fla_packed_sequences(fla):
    insert(fla, key_conv=2)
    ids = tokens(1, 30)
    with torch.no_grad():
        got, _ = fla(ids, cu_seqlens=torch.tensor([0, 13, 30]), use_cache=False)
        for begin, end in ((0, 13), (13, 30)):
            alone, _ = fla(ids[:, begin:end], use_cache=False)
            torch.testing.assert_close(got[:, begin:end], alone, rtol=0, atol=1e-5)


def test_fla_checkpointing_with_two_forwards(fla):
    insert(fla)
    fla.train()
    batches, gradients = (tokens(), tokens()), []
    for _ in range(2):
        fla.zero_grad()
        sum(fla(ids)[0].logsumexp(-1).sum() for ids in batches).backward()
        gradients.append(
            {n: p.grad.clone() for n, p in fla.named_parameters() if p.grad is not None}
        )
        fla.checkpoint()
    assert any("resona" in name for name in gradients[0])
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, msg=name)


def test_fla_generate():
    model = peer_models.fla_package().eval()
    insert(model)
    ids = tokens(length=9)
    # The test's subclass returns a tuple; generate wants the package's own output.
    model.__class__ = type(model).__mro__[1]
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    for num_beams in (1, 3):
        both = [
            model.generate(ids, use_cache=use_cache, num_beams=num_beams, **settings)
            for use_cache in (True, False)
        ]
        assert torch.equal(*both)


# --- mamba_ssm ------------------------------------------------------------------------------------


@pytest.fixture(params=["mamba_ssm_standin", "mamba_ssm_package"])
def mamba_ssm(request):
    model, params = getattr(peer_models, request.param)()
    return model.eval(), params


def test_mamba_ssm_there_and_back(mamba_ssm):
    model, _ = mamba_ssm
    ids = tokens()
    with torch.no_grad():
        before = model(ids)
        augmentation = insert(model)
        assert list(augmentation.layers) == [f"backbone.layers.{i}" for i in (0, 2, 3)]
        assert not torch.equal(model(ids), before)
        twin = copy.deepcopy(model)
        augmentation.remove()
        assert torch.equal(model(ids), before) and not torch.equal(twin(ids), before)


def test_mamba_ssm_steps(mamba_ssm):
    model, params = mamba_ssm
    insert(model, key_conv=2)
    cache = params(max_seqlen=20, max_batch_size=2)
    with torch.no_grad():
        for _ in range(2):
            ids = tokens()
            full, parts = model(ids), []
            for begin, end in itertools.pairwise([0, 9, *range(10, 21)]):
                cache.seqlen_offset = begin
                parts.append(model(ids[:, begin:end], inference_params=cache))
            torch.testing.assert_close(torch.cat(parts, dim=1), full, rtol=0, atol=1e-5)
            cache.reset(max_seqlen=20, max_batch_size=2)


def test_mamba_ssm_cache_from_before_augment(mamba_ssm):
    model, params = mamba_ssm
    cache = params(max_seqlen=20, max_batch_size=2)
    with torch.no_grad():
        model(tokens(length=5), inference_params=cache)
        cache.seqlen_offset = 5
        insert(model)
        with pytest.raises(ValueError, match="the backbone filled without this augmentation"):
            model(tokens(length=1), inference_params=cache)
