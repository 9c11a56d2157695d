"""What `augment` and an augmented model say when something is wrong, and that nothing has changed then."""

from __future__ import annotations

import copy

import pytest
import torch
from small_models import SETTINGS, logits, make_model, tokens, transformers, wake
from torch import nn

from resona_ext.integrations import augment


@pytest.fixture(autouse=True)
def _one_thread(threads):
    threads(1)
    with torch.no_grad():
        yield


def augmented(**settings):
    model = make_model()
    augmentation = augment(model, **(SETTINGS | settings))
    wake(augmentation)
    return model, augmentation


class TwoEmbeddings(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.places = nn.Embedding(9, 8), nn.Embedding(9, 8)
        self.mixer = nn.Linear(8, 8)


# --- Arguments of augment -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": [4]}, "layers: expected ids from -4 to 3, got 4"),
        ({"layers": [-5]}, "layers: expected ids from -4 to 3, got -5"),
        ({"layers": [True]}, "layers: expected ids from -4 to 3, got True"),
        ({"layers": [1.5]}, "layers: expected ids from -4 to 3, got 1.5"),
        ({"layers": []}, "layers: expected at least one layer, got none"),
        ({"layers": [0, -4]}, "layers: expected each layer once, got"),
        (
            {"layers": "middle"},
            "layers: expected names of layers, as backbone.layers.0, got 'middle'",
        ),
        ({"layers": ["backbone.layers.7"]}, "got 'backbone.layers.7'"),
        ({"embedding": "backbone.embeddings"}, "embedding: expected None for transformers Mamba"),
        ({"max_length": 0}, "max_length: expected None or positive, got 0"),
        ({"chunk_size": 0}, "chunk_size must be at least 1, got 0"),
        ({"num_heads": 3}, "num_heads must be a divisor of d_model 32"),
        ({"mix": "sum"}, "mix must be one of"),
    ],
    ids=str,
)
def test_arguments_that_do_not_fit(arguments, message):
    model, ids = make_model(), tokens()
    before, attributes = logits(model, ids), dir(model)
    with pytest.raises(ValueError) as error:
        augment(model, **arguments)
    assert message in str(error.value)
    assert dir(model) == attributes and torch.equal(logits(model, ids), before)
    assert not any("resona" in name for name, _ in model.named_modules())


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        (nn.Linear(3, 3), {}, "model: expected a model of transformers Mamba, fla, mamba_ssm, or"),
        (nn.Linear(3, 3), {"layers": [0]}, "or the mixers by name in `layers`, got torch.nn"),
        ("gpt2", {}, "model: expected an nn.Module, got str"),
        (nn.Sequential(nn.Linear(3, 3)), {"layers": ["0"]}, "embedding: expected its name, as the"),
        (TwoEmbeddings(), {"layers": ["mixer"]}, "got ['places', 'words']"),
        (TwoEmbeddings(), {"layers": ["mixr"]}, "names of modules of the model, got ['mixr']"),
        (
            TwoEmbeddings(),
            {"layers": ["mixer"], "embedding": "word"},
            "embedding: expected the name of a module of the model, got word",
        ),
    ],
    ids=lambda value: str(value)[:30],
)
def test_models_of_which_nothing_is_known(model, arguments, message):
    with pytest.raises(ValueError) as error:
        augment(model, **arguments)
    assert str(error.value).startswith("augment: ") and message in str(error.value)


def test_twice():
    model, augmentation = augmented()
    with pytest.raises(ValueError, match="expected one not yet augmented, got one that is"):
        augment(model, **SETTINGS)
    augmentation.remove()
    with pytest.raises(ValueError, match="remove: model: expected one that is augmented"):
        augmentation.remove()


# --- Dtypes and devices ---------------------------------------------------------------------------


def test_mismatched_dtype():
    model, _ = augmented(dtype=torch.float64)
    with pytest.raises(
        ValueError,
        match=r"layers.0: dtype of the Resona weights: expected torch.float32 like the embeddings, "
        r"or autocast, got torch.float64",
    ):
        model(tokens())
    model.to(torch.float32)
    assert logits(model, tokens()).isfinite().all()


def test_mismatched_device():
    model, augmentation = augmented()
    _, cache = run(model, tokens(length=9))
    augmentation.layers["backbone.layers.2"].to("meta")
    before = snapshot(cache)
    with pytest.raises(ValueError, match=r"layers.2: device of the Resona weights: expected cpu"):
        model(tokens(length=1), cache_params=cache, use_cache=True)
    assert_unchanged(cache, before)


# --- Caches ---------------------------------------------------------------------------------------


def run(model, ids, cache=None, **arguments):
    output = model(ids, cache_params=cache, use_cache=True, **arguments)
    return output.logits, output.cache_params


def snapshot(cache):
    return copy.deepcopy(cache)


def assert_unchanged(cache, before) -> None:
    assert len(cache.layers) == len(before.layers)
    for mine, old in zip(cache.layers, before.layers, strict=True):
        if hasattr(mine, "caches"):
            assert mine.caches.keys() == old.caches.keys()
            for name, chunks in mine.caches.items():
                now, then = chunks.state_dict(), old.caches[name].state_dict()
                assert all(torch.equal(*map(torch.as_tensor, (now[k], then[k]))) for k in then)
        else:
            assert torch.equal(mine.conv_states[0], old.conv_states[0])
            assert torch.equal(mine.recurrent_states[0], old.recurrent_states[0])


def test_over_capacity():
    model, _ = augmented(max_length=12)
    ids = tokens(length=16)
    with pytest.raises(ValueError, match="cache: expected at most max_length = 12 tokens per seq"):
        run(model, ids)
    expected = logits(model, ids)
    _, cache = run(model, ids[:, :11])
    before = snapshot(cache)
    with pytest.raises(ValueError, match="at most max_length = 12 tokens per sequence, got 13"):
        run(model, ids[:, 11:13], cache)
    assert_unchanged(cache, before)
    got, _ = run(model, ids[:, 11:12], cache)
    torch.testing.assert_close(got, expected[:, 11:12], rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="at most max_length = 12"):
        model.generate(ids[:, :9], max_new_tokens=8)


def test_padding_takes_no_room():
    model, _ = augmented(max_length=12)
    ids = tokens(length=16)
    ids[:, :5] = 0
    got = model.generate(ids, attention_mask=(ids != 0).long(), max_new_tokens=2, do_sample=False)
    assert got.shape == (2, 18)


def other_chunk_size(model, augmentation):
    for layer in augmentation.layers.values():
        layer.chunk_size = 5
    return {}


def needs_gradients(model, augmentation):
    torch.set_grad_enabled(True)
    return {}


CHANGES = {
    "batch": (lambda m, a: {"input_ids": tokens(3, 2)}, "cache must be of batch 3, got 2"),
    "chunk size": (other_chunk_size, "cache must be one of `make_cache` with"),
    "autocast": (
        lambda m, a: {"autocast": True},
        "cache: expected of dtype torch.bfloat16 in backbone.layers.0, got torch.float32",
    ),
    "gradients": (
        needs_gradients,
        "and gradients, which a cache has none of: call the model under",
    ),
    "mask of another batch": (
        lambda m, a: {"attention_mask": torch.zeros(3, 20).long()},
        "attention_mask: expected [2, at least 2], 1 at tokens, got [3, 2]",
    ),
    "float mask": (
        lambda m, a: {"attention_mask": torch.zeros(2, 2)},
        "attention_mask: expected bool or integer, 1 at tokens, got torch.float32",
    ),
    "indices": (
        lambda m, a: {"resona_indices": torch.zeros(2, 2, 1, 2, dtype=torch.int32)},
        "and resona_indices, which are made for whole sequences: pass use_cache=False",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_cache_that_does_not_fit_the_call(change):
    model, augmentation = augmented()
    _, cache = run(model, tokens(length=9))
    before = snapshot(cache)
    make, message = CHANGES[change]
    arguments = {"input_ids": tokens(length=2), **make(model, augmentation)}
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=arguments.pop("autocast", False)),
        pytest.raises(ValueError) as error,
    ):
        model(cache_params=cache, use_cache=True, **arguments)
    assert message in str(error.value)
    torch.set_grad_enabled(False)
    assert_unchanged(cache, before)


def test_a_cache_of_another_model():
    (model, _), (other, _) = augmented(), augmented()
    _, cache = run(other, tokens(length=9))
    before = snapshot(cache)
    with pytest.raises(ValueError, match="cache: expected one of this model, got one of another"):
        run(model, tokens(length=1), cache)
    assert_unchanged(cache, before)


def test_a_cache_from_before_augment():
    model = make_model()
    _, cache = run(model, tokens(length=9))
    before = snapshot(cache)
    augment(model, **SETTINGS)
    with pytest.raises(ValueError, match="got one that the backbone filled without this augment"):
        run(model, tokens(length=1), cache)
    assert_unchanged(cache, before)


def test_a_forward_with_gradients_works_and_its_cache_does_not():
    """transformers makes a cache in every forward in eval mode, wanted or not."""
    model, _ = augmented()
    ids = tokens(length=9)
    expected = logits(model, ids)
    with torch.enable_grad():
        got, cache = run(model, ids)
        got.sum().backward()
    torch.testing.assert_close(got, expected)
    assert model.backbone.layers[0].resona.o_proj.weight.grad.any()
    with pytest.raises(ValueError, match=r"got gradients, .* call the model under torch.no_grad"):
        run(model, tokens(length=1), cache)
    cache.reset()
    got, _ = run(model, ids, cache)
    torch.testing.assert_close(got, expected)


def test_a_context_encoder_of_ones_own_generates_without_cache():
    model, _ = augmented(encoder=lambda chunks: chunks.mean(2), retrieval_dim=32)
    ids = tokens(length=9)
    settings = {"max_new_tokens": 3, "do_sample": False}
    assert model.generate(ids, use_cache=False, **settings).shape == (2, 12)
    with pytest.raises(ValueError, match="which sees whole chunks: pass use_cache=False"):
        model.generate(ids, **settings)


def test_a_mixer_that_raises_leaves_nothing_behind():
    model, _ = augmented()
    ids = tokens(length=9)
    expected = logits(model, ids)
    with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
        model()
    hook = model.backbone.layers[1].mixer.register_forward_pre_hook(lambda *_: 1 / 0)
    cache = transformers.DynamicCache(config=model.config)
    with pytest.raises(ZeroDivisionError):
        run(model, ids, cache)
    hook.remove()
    with pytest.raises(ValueError, match="the backbone filled without this augmentation"):
        run(model, ids, cache)  # its first layers have seen tokens
    assert torch.equal(logits(model, ids), expected)
    copy.deepcopy(model)


def test_packed_sequences_need_their_borders():
    model, _ = augmented()
    ids = tokens(batch=1, length=12)
    with pytest.raises(ValueError, match="packed sequences: expected cu_seqlens as well"):
        model.backbone(ids, use_cache=False, seq_idx=torch.zeros(1, 12, dtype=torch.int32))
