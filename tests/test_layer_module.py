"""The layer as a module: how it starts, what of it learns, saving and copying, and what it refuses."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from layer_support import (
    BASE,
    CASES,
    CHUNK,
    D_MODEL,
    HEADS,
    TinyEncoder,
    dense_layer,
    inputs,
    last_token,
    make,
    one_thread_and_seed,  # noqa: F401
)
from torch import nn
from torch.utils.checkpoint import checkpoint

import resona_ext._layer_search as search_module
from resona_ext.layer import Resona

# --- Initial state -------------------------------------------------------------------------------


def test_tied_map_starts_as_the_identity():
    for heads, dim in ((1, D_MODEL), (2, D_MODEL // 2)):
        layer = Resona(D_MODEL, HEADS, retrieval_heads=heads, retrieval_dim=dim)
        assert torch.equal(layer.encoders.query_map.weight, torch.eye(D_MODEL))
        assert layer.encoders.context_map is None
    per_head = Resona(D_MODEL, HEADS, retrieval_heads=2, retrieval_dim=D_MODEL + 1)
    padded = torch.eye(D_MODEL + 1, D_MODEL).repeat(2, 1)
    assert torch.equal(per_head.encoders.query_map.weight, padded)


def test_narrow_tied_map_starts_with_orthonormal_rows():
    joint = Resona(D_MODEL, HEADS, retrieval_heads=2, retrieval_dim=4).encoders.query_map.weight
    torch.testing.assert_close(joint @ joint.T, torch.eye(8), rtol=0, atol=1e-6)
    wide = Resona(D_MODEL, HEADS, retrieval_heads=4, retrieval_dim=5).encoders.query_map.weight
    heads = wide.view(4, 5, D_MODEL)
    torch.testing.assert_close(heads @ heads.mT, torch.eye(5).repeat(4, 1, 1), rtol=0, atol=1e-6)
    assert not torch.allclose(heads[0], heads[1])


def test_default_retrieval_dim():
    assert Resona(D_MODEL, HEADS).retrieval_dim == D_MODEL
    assert Resona(192, HEADS).retrieval_dim == 128
    assert Resona(192, HEADS, query_encoder="query", retrieval_heads=2).retrieval_dim == 96


def test_separate_maps_start_apart():
    encoders = Resona(D_MODEL, HEADS, encoder="separate").encoders
    query, context = encoders.query_map.weight, encoders.context_map.weight
    for weight in (query, context):
        torch.testing.assert_close(weight @ weight.T, torch.eye(D_MODEL), rtol=0, atol=1e-6)
    assert (query - context).abs().max() > 0.1


def test_other_initial_values():
    layer = Resona(
        D_MODEL, HEADS, gate_bias=-2.0, trainable_retrieval=True, retrieval_heads=2, key_conv=3
    )
    assert not layer.gate.weight.any()
    assert layer.gate.bias.eq(-2).all()
    assert layer.score_scale.tolist() == [10.0, 10.0]
    assert layer.sink.tolist() == [0.0] * HEADS
    assert layer.key_conv_weight[0].eq(1).all()
    assert not layer.key_conv_weight[1:].any()
    x, e, _ = inputs(dtype=torch.float32)
    plain = Resona(D_MODEL, HEADS, **BASE)
    impulse = Resona(D_MODEL, HEADS, key_conv=2, **BASE)
    impulse.load_state_dict(plain.state_dict(), strict=False)
    assert torch.equal(impulse(x, e), plain(x, e))


@pytest.mark.parametrize("mlp_dim", [None, 16])
def test_zero_init_output_is_an_exact_no_op_that_can_learn(mlp_dim):
    layer = Resona(D_MODEL, HEADS, mix="additive", zero_init_output=True, mlp_dim=mlp_dim, **BASE)
    x, e, y = inputs(dtype=torch.float32)
    out = layer(x, e, y)
    assert torch.equal(out, y)
    out.square().sum().backward()
    assert layer.o_proj.weight.grad.abs().max() > 0
    # One small step is one small change: the norm before the MLP must not lift a tiny c to size 1.
    torch.optim.SGD([layer.o_proj.weight], lr=1e-4).step()
    assert 0 < (layer(x, e, y) - y).abs().max() < 0.05


def test_parameter_count_is_that_of_the_paper():
    def count(**settings):
        layer = Resona(600, 4, device="meta", **settings)
        return sum(p.numel() for p in layer.parameters() if p.requires_grad)

    assert count(mix="fixed") == 4 * 600**2
    assert count(mix="fixed", mlp_dim=1792) == 4 * 600**2 + 3_225_600
    assert count(mix="gate") == 5 * 600**2 + 600
    query_tied = Resona(600, 4, mix="additive", query_encoder="query", device="meta")
    assert sum(p.numel() for p in query_tied.parameters()) == 4 * 600**2


# --- What learns ---------------------------------------------------------------------------------


def encoder_gradients(**settings) -> dict[str, torch.Tensor | None]:
    layer = make(**settings)
    layer(*inputs()).square().sum().backward()
    names = ("encoders.", "score_scale", "sink")
    return {n: p.grad for n, p in layer.named_parameters() if n.startswith(names)}


@pytest.mark.parametrize("encoder", ["tied", "identity", "separate", "module"])
def test_hard_mask_freezes_the_encoders(encoder):
    is_module = encoder == "module"
    layer = make(encoder=TinyEncoder(1, D_MODEL) if is_module else encoder)
    assert list(layer.encoders.parameters())
    assert not any(p.requires_grad for p in layer.encoders.parameters())
    layer(*inputs()).square().sum().backward()
    assert all(p.grad is None for p in layer.encoders.parameters())
    assert all(p.grad is not None for p in layer.parameters() if p.requires_grad)
    assert layer.score_scale is None
    assert layer.sink is None


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("query_encoder", ["hidden", "query"])
@pytest.mark.parametrize("encoder", ["tied", last_token], ids=["tied", "callable"])
def test_the_search_enters_the_graph_only_to_train(monkeypatch, encoder, query_encoder, trainable):
    name = "retrieve_attend" if encoder == "tied" else "retrieve"
    original, seen = getattr(search_module, name), []

    def spy(*args, **kwargs):
        seen.extend(tensor.requires_grad for tensor in (args if name == "retrieve" else args[3:]))
        return original(*args, **kwargs)

    monkeypatch.setattr(search_module, name, spy)
    layer = make(encoder=encoder, query_encoder=query_encoder, trainable_retrieval=trainable)
    x, e, y = (tensor.requires_grad_() for tensor in inputs())
    layer(x, e, y)
    assert seen == [trainable, trainable]


@pytest.mark.parametrize("encoder", ["tied", "separate", "module"])
def test_trainable_retrieval_reaches_every_encoder(encoder):
    encoder = TinyEncoder(1, D_MODEL) if encoder == "module" else encoder
    gradients = encoder_gradients(trainable_retrieval=True, encoder=encoder)
    assert len(gradients) >= 3
    assert all(g.isfinite().all() and g.abs().max() > 0 for g in gradients.values())


def test_identity_stays_frozen_while_scores_train():
    gradients = encoder_gradients(trainable_retrieval=True, encoder="identity")
    assert gradients.pop("encoders.query_map.weight") is None
    assert all(g.abs().max() > 0 for g in gradients.values())


def test_a_zero_chunk_from_a_module_gives_finite_gradients():
    layer = make(trainable_retrieval=True, encoder=TinyEncoder(1, D_MODEL))
    nn.init.zeros_(layer.encoders.encoder.map.bias)
    x, e, y = inputs()
    e[:, :CHUNK] = 0
    layer(x, e, y).sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


# --- Being a module ------------------------------------------------------------------------------

FULL = {
    "trainable_retrieval": True,
    "key_conv": 2,
    "mlp_dim": 8,
    "encoder": "separate",
    "rope_base": 100.0,
    "head_dim": 4,
}


def test_state_dict_round_trip():
    source, target = make(**FULL), make(**FULL)
    x, e, y = inputs()
    assert not torch.equal(source(x, e, y), target(x, e, y))
    target.load_state_dict(source.state_dict())
    assert torch.equal(source(x, e, y), target(x, e, y))


@pytest.mark.parametrize("settings", [FULL, {"encoder": last_token}], ids=["full", "callable"])
def test_deepcopy_and_pickle_after_a_forward(settings):
    layer = make(**settings)
    x, e, y = inputs()
    names = set(vars(layer))
    out = layer(x, e, y)
    assert set(vars(layer)) == names
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x, e, y), out)
        twin.o_proj.weight.data.zero_()
        assert torch.equal(layer(x, e, y), out)


def test_checkpointing_gives_the_same_gradients():
    layer = make(**FULL)
    batches = [inputs(), inputs(length=9)]

    def gradients(run):
        layer.zero_grad()
        sum(run(*batch).square().sum() for batch in batches).backward()
        return [p.grad for p in layer.parameters()]

    plain = gradients(layer)
    recomputed = gradients(lambda *args: checkpoint(layer, *args, use_reentrant=False))
    assert all(torch.equal(a, b) for a, b in zip(plain, recomputed, strict=True))


def test_meta_device_then_to_empty():
    settings = FULL | {"retrieval_dim": 5}
    layer = Resona(D_MODEL, HEADS, device="meta", dtype=torch.float64, **(BASE | settings))
    assert all(p.is_meta for p in layer.parameters())
    layer = layer.to_empty(device="cpu")
    for parameter in layer.parameters():
        nn.init.constant_(parameter, torch.nan)
    layer.reset_parameters()
    x, e, y = inputs()
    torch.testing.assert_close(layer(x, e, y), dense_layer(layer, x, e, y, settings))


@pytest.mark.parametrize("name", ["default", "trainable", "inclusive module", "key convolution"])
@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16(name, autocast):
    """All chunks are selected, so that no rounding can change the selection."""
    dtype = torch.float32 if autocast else torch.bfloat16
    settings = CASES[name] | {"top_k": 8}
    if isinstance(settings.get("encoder"), TinyEncoder):
        settings["encoder"] = TinyEncoder(1, D_MODEL, dtype)
    layer = make(dtype, **settings)
    x, e, y = (tensor.requires_grad_() for tensor in inputs(dtype=dtype))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = layer(x, e, y)
        low = layer(x, e, y.bfloat16())
    assert out.dtype == dtype
    assert low.dtype == torch.bfloat16
    exact = copy.deepcopy(layer).double()
    expected = exact(*(tensor.detach().double() for tensor in (x, e, y)))
    torch.testing.assert_close(out.double(), expected, rtol=0.05, atol=0.1)
    out.float().square().sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters() if p.requires_grad)


@pytest.mark.parametrize("mix", ["gate", "fixed", "additive"])
def test_output_has_the_dtype_of_the_mixer_output(mix):
    layer = make(torch.float32, mix=mix)
    x, e, y = inputs(dtype=torch.float32)
    out = layer(x, e, y.bfloat16())
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), layer(x, e, y), rtol=0.02, atol=0.02)


def test_extra_repr_names_the_settings():
    text = repr(make(mix="fixed", encoder="separate"))
    for part in ("d_model=12", "top_k=2", "mix='fixed'", "alpha=0.5", "encoder='separate'"):
        assert part in text


# --- Bad arguments -------------------------------------------------------------------------------

BAD_SETTINGS = [
    ({"d_model": 0}, "d_model must be at least 1, got 0"),
    ({"num_heads": 0}, "num_heads must be at least 1, got 0"),
    ({"num_heads": 5}, "num_heads must be a divisor of d_model 12 unless head_dim is given, got 5"),
    ({"num_kv_heads": 3}, "num_kv_heads must be a divisor of num_heads 4, got 3"),
    ({"head_dim": 257}, "head_dim must be from 1 to 256, got 257"),
    ({"head_dim": 3, "rope_base": 10.0}, "head_dim must be even with rope_base, got 3"),
    ({"rope_base": 0.0}, "rope_base must be None or positive, got 0.0"),
    ({"chunk_size": 0}, "chunk_size must be at least 1, got 0"),
    ({"top_k": 0}, "top_k must be at least 1, got 0"),
    ({"retrieval_heads": 3}, "retrieval_heads must be 1 or a divisor of the 4 key/value heads"),
    ({"retrieval_dim": 0}, "retrieval_dim must be None or at least 1, got 0"),
    ({"query_encoder": "query", "retrieval_dim": 8}, "retrieval_dim must be num_heads * head_dim"),
    ({"encoder": "mean"}, "encoder must be one of ('tied', 'identity', 'separate') or a callable"),
    ({"query_encoder": "tied"}, "query_encoder must be one of ('hidden', 'query'), got 'tied'"),
    ({"eligibility": "any"}, "eligibility must be one of ('strict', 'inclusive'), got 'any'"),
    ({"key_conv": -1}, "key_conv must be at least 0, got -1"),
    ({"mlp_dim": 0}, "mlp_dim must be None or at least 1, got 0"),
    ({"mix": "sum"}, "mix must be one of ('gate', 'fixed', 'additive'), got 'sum'"),
    ({"alpha": 0.5}, 'alpha must be None with mix="gate", which computes its own, got 0.5'),
    ({"mix": "fixed", "alpha": 1.5}, 'alpha must be in [0, 1] with mix="fixed", got 1.5'),
    ({"mix": "fixed", "gate_bias": -2.0}, 'gate_bias must be 0 with mix="fixed", got -2.0'),
]


@pytest.mark.parametrize(("settings", "message"), BAD_SETTINGS)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError) as error:
        Resona(**({"d_model": D_MODEL, "num_heads": HEADS} | settings))
    assert str(error.value).startswith(f"Resona: {message}")


X = torch.zeros(1, 4, D_MODEL)
CU = torch.tensor([0, 4], dtype=torch.int32)
BAD_INPUTS = [
    ({"hidden_states": X[0]}, "hidden_states must be [B, T, 12], got [4, 12]"),
    ({"hidden_states": X[..., 1:]}, "hidden_states must be [B, T, 12], got [1, 4, 11]"),
    ({"embeddings": X[:, 1:]}, "embeddings must be [1, 4, 12] like hidden_states, got [1, 3, 12]"),
    ({"mixer_output": X[0]}, "mixer_output must be [1, 4, 12] like hidden_states, got [4, 12]"),
    ({"attention_mask": X[0]}, "attention_mask must be [1, 4], got [4, 12]"),
    (
        {"attention_mask": torch.zeros(1, 4)},
        "attention_mask must be bool or integer, 1 at tokens, got torch.float32",
    ),
    (
        {"attention_mask": torch.ones(1, 4, dtype=torch.bool), "cu_seqlens": CU},
        "attention_mask must be None with cu_seqlens (packed sequences have no padding), got both",
    ),
    ({"cu_seqlens": CU.long()}, "cu_seqlens must be torch.int32 [n + 1], got torch.int64 [2]"),
    ({"cu_seqlens": CU[None]}, "cu_seqlens must be torch.int32 [n + 1], got torch.int32 [1, 2]"),
    (
        {"hidden_states": X.expand(2, -1, -1), "embeddings": X.expand(2, -1, -1), "cu_seqlens": CU},
        "hidden_states must be of batch 1 with cu_seqlens, got [2, 4, 12]",
    ),
]


@pytest.mark.parametrize(("changed", "message"), BAD_INPUTS)
def test_bad_inputs(changed, message):
    layer = Resona(D_MODEL, HEADS, **BASE)
    with pytest.raises(ValueError) as error:
        layer(**({"hidden_states": X, "embeddings": X} | changed))
    assert str(error.value) == f"Resona: {message}"


def test_an_encoder_with_a_wrong_result_is_named():
    layer = Resona(D_MODEL, HEADS, encoder=last_token, retrieval_dim=5, **BASE)
    with pytest.raises(ValueError, match=r"the result of encoder must be .*\[1, 1, 1, 5\], got"):
        layer(X, X)
