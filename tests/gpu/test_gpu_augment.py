"""Augmented models with their own kernels on a CUDA device: transformers, fla and mamba_ssm as installed."""

from __future__ import annotations

import json

import pytest
import torch

from resona_ext import augment

HAS_KERNELS = torch.cuda.is_available() and (
    json.loads(torch.ops.resona._build_info())["cuda"] != "none"
)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HAS_KERNELS, reason="no CUDA device, or a library without CUDA"),
]
SETTINGS = {"vocab_size": 256, "hidden_size": 256, "num_hidden_layers": 3}
STEPS = 24


def transformers_mamba2():
    transformers = pytest.importorskip("transformers")
    config = transformers.Mamba2Config(
        num_heads=8, head_dim=64, state_size=64, n_groups=1, pad_token_id=0, **SETTINGS
    )
    return transformers.Mamba2ForCausalLM(config)


def fla_gla():
    models = pytest.importorskip("fla.models", exc_type=ImportError)
    return models.GLAForCausalLM(models.GLAConfig(num_heads=4, **SETTINGS))


def fla_gated_deltanet():
    models = pytest.importorskip("fla.models", exc_type=ImportError)
    return models.GatedDeltaNetForCausalLM(
        models.GatedDeltaNetConfig(num_heads=2, head_dim=64, **SETTINGS)
    )


@pytest.fixture(params=[transformers_mamba2, fla_gla, fla_gated_deltanet])
def model(request):
    return request.param().to("cuda", torch.bfloat16).eval()


def wake(augmentation) -> None:
    with torch.no_grad():
        for layer in augmentation.layers.values():
            layer.o_proj.weight.normal_(std=0.05)


def prompt() -> torch.Tensor:
    return torch.randint(1, 256, (2, 300), device="cuda")


@torch.no_grad()
def test_there_and_back(model):
    ids = prompt()
    before = model(ids, use_cache=False).logits
    augmentation = augment(model, chunk_size=16, top_k=4)
    assert torch.equal(model(ids, use_cache=False).logits, before)
    wake(augmentation)
    assert not torch.equal(model(ids, use_cache=False).logits, before)
    augmentation.remove()
    assert torch.equal(model(ids, use_cache=False).logits, before)


def test_a_training_step(model):
    augmentation = augment(model.train(), chunk_size=16, top_k=4)
    wake(augmentation)
    ids = prompt()
    model(ids, labels=ids).loss.backward()
    for layer in augmentation.layers.values():
        assert layer.q_proj.weight.grad.isfinite().all() and layer.q_proj.weight.grad.any()


@pytest.mark.parametrize("num_beams", [1, 3])
def test_generate_with_a_cache(model, num_beams):
    """Token for token only against itself: chunked and recurrent kernels of a mixer round differently."""
    wake(augment(model, chunk_size=16, top_k=4))
    settings = {"max_new_tokens": STEPS, "do_sample": False, "num_beams": num_beams}
    ids = prompt()
    first = model.generate(ids, eos_token_id=None, pad_token_id=0, **settings)
    again = model.generate(ids, eos_token_id=None, pad_token_id=0, **settings)
    assert first.shape == (2, 300 + STEPS) and torch.equal(first, again)


@torch.no_grad()
def test_mamba_ssm_steps():
    module = pytest.importorskip("mamba_ssm.models.mixer_seq_simple", exc_type=ImportError)
    from mamba_ssm.models.config_mamba import MambaConfig
    from mamba_ssm.utils.generation import InferenceParams

    config = MambaConfig(d_model=256, n_layer=3, vocab_size=256, ssm_cfg={"layer": "Mamba2"})
    model = module.MambaLMHeadModel(config, device="cuda", dtype=torch.float32).eval()
    wake(augment(model, chunk_size=16, top_k=4))
    ids = prompt()
    full = model(ids).logits
    cache = InferenceParams(max_seqlen=300, max_batch_size=2)
    parts = [model(ids[:, :280], inference_params=cache).logits]
    for t in range(280, 300):
        cache.seqlen_offset = t
        parts.append(model(ids[:, t : t + 1], inference_params=cache).logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), full, rtol=0.01, atol=0.01)
