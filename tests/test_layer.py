"""The layer against plain PyTorch: dense masks, loops over chunks, scaled_dot_product_attention."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import resona_ext._layer_search as search_module
from resona_ext.layer import Resona

D_MODEL, HEADS, CHUNK, TOP_K = 12, 4, 3, 2
BASE = {"chunk_size": CHUNK, "top_k": TOP_K}


@pytest.fixture(autouse=True)
def _one_thread_and_seed():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def last_token(chunks: torch.Tensor) -> torch.Tensor:
    return chunks[:, :, -1]


class TinyEncoder(nn.Module):
    """A context encoder that is neither linear nor blind to order."""

    def __init__(self, heads: int, dim: int, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.heads = heads
        self.map = nn.Linear(CHUNK * D_MODEL, heads * dim, dtype=dtype)

    def forward(self, chunks: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.map(chunks.flatten(2))).unflatten(-1, (self.heads, -1))


def make(dtype: torch.dtype = torch.float64, **settings) -> Resona:
    """A layer in which no parameter that starts at a special value still has it."""
    layer = Resona(D_MODEL, HEADS, dtype=dtype, **(BASE | settings))
    with torch.no_grad():
        parameters = [layer.key_conv_weight, layer.score_scale, layer.sink]
        if layer.gate is not None:
            parameters += layer.gate.parameters()
        for parameter in parameters:
            if parameter is not None:
                parameter.normal_()
    return layer


def inputs(batch: int = 2, length: int = 14, dtype: torch.dtype = torch.float64):
    """Hidden states, embeddings and mixer output."""
    return [torch.randn(batch, length, D_MODEL, dtype=dtype) for _ in range(3)]


# --- The independent computation -----------------------------------------------------------------


def dense_norm(x):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def dense_rotate(x, base):
    """x [T, heads, D] as complex numbers turned by position * base^(-i / (D / 2))."""
    half = x.shape[-1] // 2
    turn = torch.arange(len(x))[:, None] * base ** (-torch.arange(half) / half).double()
    pairs = torch.complex(x[..., :half], x[..., half:])
    pairs = pairs * torch.polar(torch.ones_like(turn), turn)[:, None]
    return torch.cat([pairs.real, pairs.imag], dim=-1)


def dense_selection(layer, p, x, e, settings):
    """Which chunks each token retrieves, bool [R, T, C], and all similarities [R, T, C]."""
    heads = settings.get("retrieval_heads", 1)
    encoder = settings.get("encoder", "tied")
    from_query = settings.get("query_encoder") == "query"
    context = dense_norm(e) if settings.get("normalize_embeddings", True) else e
    query_map = p["q_proj.weight" if from_query else "encoders.query_map.weight"]
    has_own_map = encoder == "separate" or (encoder == "identity" and from_query)
    context_map = p["encoders.context_map.weight"] if has_own_map else query_map
    query = (x @ query_map.T).unflatten(-1, (heads, -1))
    chunks = [context[j * CHUNK : (j + 1) * CHUNK] for j in range(len(e) // CHUNK)]
    if isinstance(encoder, str):
        chunk = [(tokens.mean(0) @ context_map.T).unflatten(-1, (heads, -1)) for tokens in chunks]
    else:
        chunk = [encoder(tokens[None, None])[0, 0].reshape(heads, -1) for tokens in chunks]
    chunk = torch.stack(chunk) if chunk else query[:0]
    similarity = F.cosine_similarity(query[:, None], chunk[None], dim=-1).permute(2, 0, 1)

    slack = 1 if settings.get("eligibility") == "inclusive" else 0
    selected = torch.zeros_like(similarity, dtype=torch.bool)
    for r, t in itertools.product(range(heads), range(len(x))):
        count = min((t + slack) // CHUNK, len(chunks))
        best = similarity[r, t, :count].topk(min(settings["top_k"], count)).indices
        selected[r, t, best] = True
    return selected, similarity


def dense_branch(layer, x, e, settings):
    """c and the rows with something eligible, for one sequence: x and e are [T, d]."""
    p = dict(layer.named_parameters())
    heads, kv_heads = HEADS, settings.get("num_kv_heads", HEADS)
    group = kv_heads // settings.get("retrieval_heads", 1)
    source = dense_norm(e) if settings.get("normalize_key_value") else e
    query = (x @ p["q_proj.weight"].T).unflatten(-1, (heads, -1))
    value = (source @ p["v_proj.weight"].T).unflatten(-1, (kv_heads, -1))
    if width := settings.get("key_conv", 0):
        taps = p["key_conv_weight"]
        rows = [
            sum(taps[s] * source[t - s] for s in range(min(width, t + 1))) for t in range(len(e))
        ]
        source = torch.stack(rows)
    key = (source @ p["k_proj.weight"].T).unflatten(-1, (kv_heads, -1))
    if base := settings.get("rope_base"):
        query, key = dense_rotate(query, base), dense_rotate(key, base)

    selected, similarity = dense_selection(layer, p, x, e, settings)
    tail = (0, len(e) % CHUNK)
    mask = F.pad(selected.repeat_interleave(CHUNK, dim=2), tail)
    logit_bias = torch.zeros(mask.shape, dtype=x.dtype)
    sink = torch.full((heads,), -torch.inf, dtype=x.dtype)
    if settings.get("trainable_retrieval"):
        weighed = p["score_scale"][:, None, None] * similarity
        logit_bias, sink = F.pad(weighed.repeat_interleave(CHUNK, dim=2), tail), p["sink"]

    out = []
    for h in range(heads):
        kv = h // (heads // kv_heads)
        r = kv // group
        row_has = mask[r].any(-1, keepdim=True)
        # The sink is one more key, of zeros, whose logit is the bias. Empty rows see all: no NaN.
        bias = logit_bias[r].masked_fill(~mask[r] & row_has, -torch.inf)
        bias = torch.cat([bias, sink[h].expand(len(x), 1)], dim=1)
        k, v = (F.pad(tensor[:, kv], (0, 0, 0, 1))[None] for tensor in (key, value))
        attended = F.scaled_dot_product_attention(query[None, :, h], k, v, attn_mask=bias[None])[0]
        out.append(torch.where(row_has, attended, 0.0))
    c = torch.cat(out, dim=-1) @ p["o_proj.weight"].T
    if settings.get("mlp_dim"):
        normed = dense_norm(c)
        hidden = F.silu(normed @ p["mlp.gate.weight"].T) * (normed @ p["mlp.up.weight"].T)
        c = c + hidden @ p["mlp.down.weight"].T
    return c, selected[0].any(-1)


def dense_layer(layer, x, e, y, settings):
    settings = BASE | settings
    branches = [dense_branch(layer, x[b], e[b], settings) for b in range(len(x))]
    c = torch.stack([branch[0] for branch in branches])
    has = torch.stack([branch[1] for branch in branches]).unsqueeze(-1)
    mix = settings.get("mix", "gate")
    if mix == "additive":
        mixed = y + settings.get("alpha", 1.0) * c
    elif mix == "fixed":
        alpha = settings.get("alpha", 0.5)
        mixed = (1 - alpha) * y + alpha * c
    else:
        a = 1 / (1 + torch.exp(-(x @ layer.gate.weight.T + layer.gate.bias)))
        mixed = (1 - a) * y + a * c
    return torch.where(has, mixed, y) if settings.get("keep_empty_rows", True) else mixed


CASES = {
    "default": {},
    "grouped heads": {"num_kv_heads": 2},
    "head dim": {"head_dim": 5, "num_kv_heads": 1},
    "projected": {"retrieval_dim": 5},
    "wider than the model": {"retrieval_dim": 20},
    "retrieval heads": {"retrieval_heads": 2, "retrieval_dim": 6, "num_kv_heads": 2},
    "identity": {"encoder": "identity", "retrieval_dim": 4},
    "separate": {"encoder": "separate"},
    "last token": {"encoder": last_token, "retrieval_dim": D_MODEL},
    "module": {"encoder": TinyEncoder(2, 5), "retrieval_heads": 2, "retrieval_dim": 5},
    "attention query": {"query_encoder": "query"},
    "attention query per head": {"query_encoder": "query", "retrieval_heads": 4},
    "attention query, identity": {"query_encoder": "query", "encoder": "identity"},
    "inclusive": {"eligibility": "inclusive"},
    "inclusive module": {"eligibility": "inclusive", "encoder": TinyEncoder(1, D_MODEL)},
    "inclusive rotary": {"eligibility": "inclusive", "rope_base": 100.0, "head_dim": 4},
    "rotary": {"rope_base": 100.0, "head_dim": 4},
    "raw retriever": {"normalize_embeddings": False},
    "normed values": {"normalize_key_value": True, "key_conv": 2},
    "key convolution": {"key_conv": 3},
    "trainable": {"trainable_retrieval": True, "retrieval_dim": 7},
    "trainable heads": {"trainable_retrieval": True, "retrieval_heads": 4, "retrieval_dim": 5},
    "trainable identity": {"trainable_retrieval": True, "encoder": "identity"},
    "trainable separate": {"trainable_retrieval": True, "encoder": "separate", "top_k": 4},
    "trainable query": {"trainable_retrieval": True, "query_encoder": "query"},
    "trainable module": {
        "trainable_retrieval": True,
        "encoder": TinyEncoder(2, 5),
        "retrieval_heads": 2,
        "retrieval_dim": 5,
        "eligibility": "inclusive",
    },
    "mlp": {"mlp_dim": 9},
    "fixed": {"mix": "fixed"},
    "fixed alpha": {"mix": "fixed", "alpha": 0.2},
    "additive": {"mix": "additive", "alpha": 0.7},
    "empty rows mixed": {"keep_empty_rows": False},
}
# Per-sequence layouts must agree with single runs whatever reads neighbours or positions.
LAYOUT_CASES = [
    "default",
    "inclusive",
    "inclusive module",
    "inclusive rotary",
    "key convolution",
    "rotary",
    "module",
    "trainable heads",
    "trainable module",
    "empty rows mixed",
]


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


# --- Rows, borders, causality --------------------------------------------------------------------


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
