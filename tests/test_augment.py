"""`augment` on Hugging Face models: the plain forward, the cache, `generate`, and the way back."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
from small_models import KINDS, LAYERS, SETTINGS, logits, make_model, tokens, wake

from resona_ext import Resona
from resona_ext.integrations import augment


@pytest.fixture(autouse=True)
def _one_thread(threads):
    threads(1)


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def augmented(kind: str = "mamba2", layers="ends+middle", **settings):
    model = make_model(kind)
    augmentation = augment(model, layers, **(SETTINGS | settings))
    wake(augmentation)
    return model, augmentation


# --- The plain forward ----------------------------------------------------------------------------


def test_at_first_nothing_changes(kind):
    model, ids = make_model(kind), tokens()
    before = logits(model, ids)
    augmentation = augment(model, **SETTINGS)
    assert torch.equal(logits(model, ids), before)
    wake(augmentation)
    assert not torch.equal(logits(model, ids), before)


def test_removal_gives_the_model_back(kind):
    model, ids = make_model(kind), tokens()
    before, state, attributes = logits(model, ids), copy.deepcopy(model.state_dict()), dir(model)
    flags = [p.requires_grad for p in model.parameters()]
    augmentation = augment(model, **SETTINGS)
    wake(augmentation)
    logits(model, ids)
    augmentation.freeze_backbone()
    assert augmentation.remove() is model
    assert torch.equal(logits(model, ids), before)
    assert dir(model) == attributes and list(model.state_dict()) == list(state)
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == flags
    assert not any(
        getattr(module, name)
        for module in model.modules()
        for name in ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_always_called")
    )
    augment(model, **SETTINGS)  # and again


def test_the_layer_gets_the_mixer_input_the_embeddings_and_the_mixer_output():
    """Against a forward by hand, block by block."""
    model, augmentation = augmented(layers=[1], key_conv=2, mix="gate")
    ids = tokens()
    (layer,) = augmentation.layers.values()
    with torch.no_grad():
        torch.nn.init.normal_(layer.gate.weight)
        e = hidden = model.backbone.embeddings(ids)
        for i, block in enumerate(model.backbone.layers):
            x = block.norm(hidden)
            y = type(block.mixer).forward(block.mixer, x)
            hidden = hidden + (layer(x, e, y) if i == 1 else y)
        expected = model.lm_head(model.backbone.norm_f(hidden))
    torch.testing.assert_close(logits(model, ids), expected, rtol=0, atol=1e-5)
    by_embeddings = model.get_input_embeddings()(ids).detach()
    assert torch.equal(logits(model, None, inputs_embeds=by_embeddings), logits(model, ids))


@pytest.mark.parametrize(
    ("layers", "chosen"),
    [
        ("ends+middle", [0, 2, 3]),
        ([1, -1], [1, 3]),
        (["backbone.layers.2", "backbone.layers.0.mixer"], [2, 0]),
        ("backbone.layers.1", [1]),
    ],
)
def test_layers(layers, chosen):
    model = make_model()
    augmentation = augment(model, layers, **SETTINGS)
    assert list(augmentation.layers) == [f"backbone.layers.{i}" for i in chosen]
    has_one = [isinstance(getattr(b, "resona", None), Resona) for b in model.backbone.layers]
    assert has_one == [i in chosen for i in range(LAYERS)]


@pytest.mark.parametrize("count", [1, 2])
def test_ends_and_middle_of_a_shallow_model(count):
    augmentation = augment(make_model(num_hidden_layers=count), **SETTINGS)
    assert len(augmentation.layers) == count


def test_copies_stand_on_their_own():
    model, _ = augmented()
    ids = tokens()
    before = logits(model, ids)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin, ids), before)
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.zero_()
        assert torch.equal(logits(model, ids), before)
        assert not logits(twin, ids).any()
        twin.load_state_dict(model.state_dict())
        augmentation_of_twin = twin._resona_augmentation
        assert augmentation_of_twin.model is twin
        augmentation_of_twin.remove()
    assert torch.equal(logits(model, ids), before)


def test_knobs():
    model, augmentation = augmented()
    ids = tokens()
    before = logits(model, ids)
    augmentation.set(top_k=1)
    assert not torch.equal(logits(model, ids), before)
    augmentation.set(top_k=2, alpha=0.0)
    silent = logits(model, ids)
    augmentation.remove()
    assert torch.equal(silent, logits(model, ids))
    with pytest.raises(ValueError, match=r"Augmentation.set: top_k: expected at least 1, got 0"):
        augmentation.set(top_k=0)
    gated = augment(model, mix="gate", **SETTINGS)
    with pytest.raises(ValueError, match=r"Augmentation.set: alpha: .* got 0.5 with \"gate\""):
        gated.set(alpha=0.5)


# --- The cache ------------------------------------------------------------------------------------


def in_pieces(model, ids, cuts):
    cache, parts = None, []
    with torch.no_grad():
        for begin, end in itertools.pairwise(cuts):
            output = model(ids[:, begin:end], cache_params=cache, use_cache=True)
            cache = output.cache_params
            parts.append(output.logits)
    return torch.cat(parts, dim=1), cache


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"key_conv": 2, "rope_base": 1e4},
        {"eligibility": "inclusive"},
        {"mix": "gate"},
        {"search": "two_level", "superchunk_size": 2, "probes": 1, "chunk_size": 1},
    ],
    ids=str,
)
def test_prefill_and_steps_equal_a_full_forward(settings):
    model, _ = augmented(**settings)
    ids = tokens(length=14)
    full = logits(model, ids)
    for split in range(1, 14):
        got, _ = in_pieces(model, ids, [0, *range(split, 15)])
        torch.testing.assert_close(got, full, rtol=0, atol=1e-5)
    got, _ = in_pieces(model, ids, [0, 2, 9, 10, 14])
    torch.testing.assert_close(got, full, rtol=0, atol=1e-5)


def test_steps_of_the_other_families(kind):
    model, _ = augmented(kind)
    ids = tokens(length=12)
    got, _ = in_pieces(model, ids, [0, *range(7, 13)])
    torch.testing.assert_close(got, logits(model, ids), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [{"chunk_size": 4}, {"chunk_size": 200}, {"search": "two_level", "superchunk_size": 3}],
    ids=str,
)
def test_the_cache_grows(settings):
    model, _ = augmented(layers=[0], key_conv=2, **settings)
    ids = tokens(batch=1, length=300)
    got, cache = in_pieces(model, ids, [0, 250, 260, 300])
    torch.testing.assert_close(got, logits(model, ids), rtol=0, atol=1e-5)
    (chunks,) = cache.layers[-1].caches.values()
    assert chunks.get_seq_length() == 300 and chunks.max_length == 512


def test_superchunks_grow_with_the_cache():
    """Their size goes by the capacity where it is not given, and the larger cache forms them anew."""
    model, _ = augmented(layers=[0], chunk_size=1, search="two_level", probes=1)
    _, cache = in_pieces(model, tokens(batch=1, length=700), [0, 250, 260, 700])
    (chunks,) = cache.layers[-1].caches.values()
    size, _ = torch.ops.resona._plan_two_level(700, 1, 2, None, 1)
    assert chunks.superchunk_size == size > torch.ops.resona._plan_two_level(256, 1, 2, None, 1)[0]
    pooled = torch.ops.resona.pool_chunks(chunks.chunk_embedding[:, :700], size)
    assert torch.equal(chunks.superchunks.embedding[:, : 700 // size], pooled)


def test_a_reset_cache_starts_anew():
    model, _ = augmented()
    ids = tokens(batch=3)
    _, cache = in_pieces(model, tokens(batch=2), [0, 20])
    cache.reset()
    with torch.no_grad():
        with pytest.raises(RuntimeError):  # of the backbone: its own buffers keep the old batch
            model(ids, cache_params=cache, use_cache=True)
        _, cache = in_pieces(model, ids, [0, 20])
        cache.reset()
        parts = [
            model(ids[:, a:b], cache_params=cache, use_cache=True) for a, b in [(0, 9), (9, 30)]
        ]
    got = torch.cat([part.logits for part in parts], dim=1)
    torch.testing.assert_close(got, logits(model, ids), rtol=0, atol=1e-5)


# --- generate -------------------------------------------------------------------------------------

MODES = {
    "greedy": {"do_sample": False},
    "beam": {"num_beams": 3, "do_sample": False},
    "beam, several returned": {"num_beams": 4, "num_return_sequences": 2, "do_sample": False},
    "sampling": {"do_sample": True, "num_return_sequences": 2},
}


@pytest.mark.parametrize(
    ("kind", "mode"),
    [*(("mamba2", mode) for mode in MODES), ("mamba", "beam"), ("falcon_mamba", "beam")],
)
def test_generate_gives_the_same_tokens_with_and_without_cache(kind, mode):
    model, _ = augmented(kind)
    ids = tokens(length=9)
    results = []
    for use_cache in (True, False):
        torch.manual_seed(1)
        results.append(model.generate(ids, max_new_tokens=12, use_cache=use_cache, **MODES[mode]))
    assert results[0].shape[1] == 21 and torch.equal(*results)
    assert not torch.equal(results[0], plain_generate(model, ids, **MODES[mode]))


@pytest.mark.parametrize("length", [9, 250])
@pytest.mark.parametrize(("chunk_size", "superchunk_size"), [(64, 16), (4, 70)])
def test_generate_with_superchunks_that_a_first_cache_cannot_fill(
    chunk_size, superchunk_size, length
):
    """It holds 256 tokens."""
    settings = {"search": "two_level", "superchunk_size": superchunk_size, "probes": 1}
    model, _ = augmented("mamba", num_heads=2, chunk_size=chunk_size, **settings)
    ids, settings = tokens(length=length), {"max_new_tokens": 12, "do_sample": False}
    got = model.generate(ids, **settings)
    assert torch.equal(got, model.generate(ids, use_cache=False, **settings))


def plain_generate(model, ids, **mode):
    copied = copy.deepcopy(model)
    copied._resona_augmentation.remove()
    torch.manual_seed(1)
    return copied.generate(ids, max_new_tokens=12, **mode)


def test_generate_with_a_static_cache():
    model, _ = augmented()
    settings = {"max_new_tokens": 12, "do_sample": False}
    for ids in (tokens(length=9), tokens(length=7), tokens(batch=3, length=5)):
        got = model.generate(ids, cache_implementation="static", **settings)
        assert torch.equal(got, model.generate(ids, use_cache=False, **settings))


@pytest.mark.parametrize("num_beams", [1, 3])
def test_left_padded_generate_equals_unpadded(kind, num_beams):
    model, _ = augmented(kind)
    settings = {"max_new_tokens": 10, "do_sample": False, "num_beams": num_beams}
    prompts = [tokens(1, length) for length in (9, 4)]
    ids = torch.zeros(2, 9, dtype=torch.long)
    for row, prompt in zip(ids, prompts, strict=True):
        row[9 - prompt.shape[1] :] = prompt
    for use_cache in (True, False):
        got = model.generate(ids, attention_mask=(ids != 0).long(), use_cache=use_cache, **settings)
        for row, prompt in zip(got, prompts, strict=True):
            alone = model.generate(prompt, **settings)[0]
            assert torch.equal(row[9 - prompt.shape[1] :], alone)


@pytest.mark.parametrize("use_cache", [True, False])
def test_padding_within_a_prompt_keeps_its_place(use_cache):
    """transformers masks every padding token of a prompt, whatever it stands for."""
    model, _ = augmented()
    ids = tokens(length=12)
    ids[0, 5], ids[1, :3] = 0, 0
    settings = {"max_new_tokens": 6, "do_sample": False, "attention_mask": (ids != 0).long()}
    seen = []
    layer = model.backbone.layers[0].resona
    layer.register_forward_hook(
        lambda _, a, k, o: seen.append(k["attention_mask"]), with_kwargs=True
    )
    got = model.generate(ids, use_cache=use_cache, **settings)
    assert seen[0].tolist() == [[1] * 12, [0] * 3 + [1] * 9]
    assert torch.equal(got, model.generate(ids, use_cache=not use_cache, **settings))
