"""JRT-RNN: the layer, its companions, the model with its cache, and the two-term loss."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from resona_ext._layer_parts import rotate
from resona_ext.jrt import (
    JRTConfig,
    JRTModel,
    LayerStates,
    PrefixLinearAttention,
    jrt_loss,
    mask_prefix,
    reference,
)
from resona_ext.jrt.companions import GatedConvolution, SlidingAttention

D, HEADS, PREFIX, WINDOW = 16, 2, 12, 5
TINY = dict(vocabulary=31, d_model=D, num_heads=HEADS, feature_dim=4, window=WINDOW)


@pytest.fixture(autouse=True)
def _one_thread_in_float64(threads):
    threads(1)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def make_model(**changes) -> JRTModel:
    settings = {**TINY, "num_layers": 4, "prefix_length": PREFIX, **changes}
    return JRTModel(JRTConfig(**settings)).eval()


def mixers() -> dict:
    return {
        "prefix": PrefixLinearAttention(D, HEADS, feature_dim=4, prefix_length=6, layer_idx=0),
        "conv": GatedConvolution(D, layer_idx=0),
        "sliding": SlidingAttention(D, HEADS, window=WINDOW, layer_idx=0),
    }


MIXERS = ("prefix", "conv", "sliding")


def test_the_layer_is_its_projections_around_the_operator():
    layer, x = mixers()["prefix"], torch.randn(2, 17, D)

    def heads(projection, rows):
        return projection(rows).unflatten(-1, (HEADS, -1))

    rows = [heads(p, x) for p in (layer.q_proj, layer.k_proj, layer.v_proj)]
    own = [heads(p, x[:, :6]) for p in (layer.prefix_k_proj, layer.prefix_v_proj)]
    expected = layer.o_proj(reference.quadratic(*rows, *own)[0].flatten(2))
    out, attentions, cache = layer(x)
    torch.testing.assert_close(out, expected)
    assert attentions is None and cache is None


def test_a_window_is_attention_with_a_band():
    layer, x = mixers()["sliding"], torch.randn(2, 23, D)
    position = torch.arange(23)
    q, k, v = layer.qkv_proj(x).unflatten(-1, (3, HEADS, -1)).unbind(2)
    q, k = (rotate(t, position, layer.rope_base) for t in (q, k))
    back = position[:, None] - position
    attended = F.scaled_dot_product_attention(
        *(t.transpose(1, 2) for t in (q, k, v)), attn_mask=(back >= 0) & (back <= WINDOW)
    )
    expected = layer.o_proj(attended.transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x)[0], expected)


@pytest.mark.parametrize("name", MIXERS)
def test_packed_sequences_are_those_sequences(name):
    layer, lengths = mixers()[name], [9, 0, 1, 14]
    x = torch.randn(1, sum(lengths), D)
    borders = torch.tensor([0, *lengths]).cumsum(0).int()
    own = torch.tensor([4, 0, 1, 6]).int()
    out = layer(x, cu_seqlens=borders, prefix_lengths=own)[0]
    for i, part in enumerate(x.split(lengths, dim=1)):
        alone = layer(part, prefix_lengths=own[i : i + 1].clamp(max=part.shape[1]))[0]
        got = out[:, borders[i] : borders[i + 1]]
        torch.testing.assert_close(got, alone, msg=f"sequence {i}")


@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(name, side):
    layer, real = mixers()[name], torch.randn(1, 11, D)
    pad = torch.full((1, 4, D), 1e3)
    parts, mask = (
        ([pad, real], [0] * 4 + [1] * 11) if side == "left" else ([real, pad], [1] * 11 + [0] * 4)
    )
    lengths = None
    if name == "prefix":  # the prefix counts rows, padding on the left included
        layer.prefix_length = 10 if side == "left" else 6
    out = layer(torch.cat(parts, dim=1), torch.tensor([mask]), prefix_lengths=lengths)[0]
    if name == "prefix":
        layer.prefix_length = 6
    alone = layer(real)[0]
    begin = 4 if side == "left" else 0
    torch.testing.assert_close(out[:, begin : begin + 11], alone)


@pytest.mark.parametrize("layers", [None, *((kind,) for kind in MIXERS)], ids=str)
@pytest.mark.parametrize("split", [1, 7, 12, 16])
def test_prefill_and_steps_equal_the_full_forward(layers, split):
    model = make_model(layers=layers, prefix_length=min(split, PREFIX))
    tokens = torch.randint(31, (3, 18))
    with torch.no_grad():
        full = model(tokens)
        states = LayerStates()
        parts = [model(tokens[:, :split], None, states)]
        parts += [model(tokens[:, i : i + 1], None, states) for i in range(split, 18)]
    torch.testing.assert_close(torch.cat(parts, dim=1), full)
    assert states.get_seq_length() == 18


def test_prefill_in_pieces_equals_the_full_forward():
    model, tokens, states = make_model(), torch.randint(31, (2, 30)), LayerStates()
    parts = [model(piece, None, states) for piece in tokens.split([PREFIX, 11, 1, 6], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(tokens))


def test_generation_from_left_padding_equals_single_runs():
    model, lengths = make_model(prefix_length=10), [10, 3, 7]
    prompts = [torch.randint(31, (1, n)) for n in lengths]
    padded = torch.cat([F.pad(p, (10 - p.shape[1], 0)) for p in prompts])
    mask = torch.arange(10) >= 10 - torch.tensor(lengths)[:, None]
    together = model.generate(padded, 6, mask.long())
    for i, prompt in enumerate(prompts):
        assert torch.equal(together[i : i + 1], model.generate(prompt, 6)), i
    stop = int(together[0, 2])
    stopped = model.generate(padded, 6, mask.long(), stop_token=stop)
    first = (together[0] == stop).nonzero()[0, 0]
    assert (stopped[0, first:] == stop).all()
    assert torch.equal(stopped[0, : first + 1], together[0, : first + 1])


def test_the_prefix_is_seen_from_everywhere_and_the_rest_is_causal():
    model = make_model(layers=("prefix",), num_layers=1)
    tokens = torch.randint(31, (1, 20))
    before = model(tokens)
    for changed, seen_from in ((PREFIX - 1, 0), (PREFIX, PREFIX), (17, 17)):
        other = tokens.clone()
        other[0, changed] = (other[0, changed] + 1) % 31
        differs = (model(other) != before).any(dim=-1)[0]
        assert not differs[:seen_from].any() and differs[seen_from:].all(), changed


def test_the_pattern_of_the_paper():
    kinds = JRTConfig(num_layers=26).kinds()
    assert [i for i, kind in enumerate(kinds) if kind == "prefix"] == [1, 6, 11, 16, 21]
    assert [i for i, kind in enumerate(kinds) if kind == "sliding"] == [2, 7, 12, 17, 22]
    assert kinds.count("conv") == 16


def test_the_model_is_as_large_as_the_paper_says():
    with torch.device("meta"):
        model = JRTModel(JRTConfig())
    assert 350e6 < sum(p.numel() for p in model.parameters()) < 370e6


def test_the_examples_of_the_documentation_run(capsys):
    torch.set_default_dtype(torch.float32)
    text = (Path(__file__).parents[1] / "docs" / "jrt.md").read_text()
    prompt, layer = re.findall(r"```python\n(.*?)```", text, re.S)
    call = prompt.replace("jrt_prompt(\n", "result = jrt_prompt(\n")
    names: dict = {}
    exec(compile(call, "jrt.md", "exec"), names)
    said = [line.removeprefix("# ") for line in prompt.splitlines() if line.startswith("# ")]
    assert names["result"] == "\n".join(said)
    exec(compile(layer, "jrt.md", "exec"), names)
    assert names["out"].shape == (2, 100, 256) and names["loss"].isfinite()


# The loss


def test_masking():
    tokens = torch.randint(30, (400, 20))
    lengths, real = torch.randint(0, 21, (400,)), torch.rand(400, 20) > 0.3
    draw = torch.Generator().manual_seed(0)
    read, masked = mask_prefix(
        tokens, lengths, 30, probability=0.25, attention_mask=real, generator=draw
    )
    allowed = (torch.arange(20) < lengths[:, None]) & real
    assert not (masked & ~allowed).any()
    assert abs(masked.sum() / allowed.sum() - 0.25) < 0.02  # 3 deviations are 0.024 at 2800 tokens
    assert (read[masked] == 30).all() and torch.equal(read[~masked], tokens[~masked])
    assert not mask_prefix(tokens, 20, 30, probability=0.0).masked.any()
    assert mask_prefix(tokens, 20, 30, probability=1.0).masked.all()


@pytest.mark.parametrize("extra", [0, 1])
def test_the_loss_is_the_mean_over_what_it_names(extra):
    logits, tokens = torch.randn(2, 6, 9), torch.randint(9, (2, 6 + extra))
    tokens[0, 1] = 0  # a masked token of id 0 counts as any other
    lengths = torch.tensor([3, 2])
    masked = torch.zeros(2, 6, dtype=torch.bool)
    masked[0, 1] = masked[1, 0] = True
    real = torch.ones_like(tokens)
    real[1, 4:] = 0
    log = logits.log_softmax(-1)
    next_token = [-log[0, t, tokens[0, t + 1]] for t in range(3, 5 + extra)]
    next_token += [-log[1, t, tokens[1, t + 1]] for t in (2,)]
    hidden = [-log[b, t, tokens[b, t]] for b, t in ((0, 1), (1, 0))]
    got = jrt_loss(logits, tokens, masked, lengths, attention_mask=real)
    torch.testing.assert_close(got.next_token, torch.stack(next_token).mean())
    torch.testing.assert_close(got.masked_token, torch.stack(hidden).mean())
    torch.testing.assert_close(got.total, got.next_token + 0.25 * got.masked_token)


def test_nothing_to_predict_is_zero_and_finite():
    logits = torch.randn(2, 5, 7, requires_grad=True)
    loss = jrt_loss(logits, torch.zeros(2, 5).long(), torch.zeros(2, 5).bool(), 5)
    assert loss.total == 0
    loss.total.backward()
    assert (logits.grad == 0).all()


def test_the_loss_trains():
    """Counting modulo 8: the next token and the hidden one both follow from the token before."""
    model = make_model(layers=("conv", "prefix"), num_layers=2, vocabulary=9, mlp_dim=0).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    draw = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(60):
        tokens = (torch.randint(8, (16, 1), generator=draw) + torch.arange(16)) % 8
        read, masked = mask_prefix(tokens, PREFIX, 8, generator=draw)
        loss = jrt_loss(model(read), tokens, masked, PREFIX)
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
        losses.append(loss.total.item())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


BAD = [
    (
        lambda: PrefixLinearAttention(16, 2, feature_dim=33),
        "feature_dim: expected from 1 to 32, got 33",
    ),
    (lambda: PrefixLinearAttention(16, 3), "num_heads: expected a divisor of d_model 16"),
    (lambda: PrefixLinearAttention(256, 1), "value_dim: expected from 1 to 128, got 256"),
    (
        lambda: PrefixLinearAttention(16, 2, prefix_length=-1),
        "prefix_length: expected at least 0, got -1",
    ),
    (lambda: SlidingAttention(16, 16), "num_heads: expected an even width per head"),
    (lambda: GatedConvolution(16, 0), "kernel_size: expected at least 1, got 0"),
    (lambda: make_model(layers=("mamba",)), "layers: expected each one of"),
    (lambda: make_model()(torch.zeros(2, 5).long(), torch.ones(2, 4)), "attention_mask: expected"),
    (
        lambda: PrefixLinearAttention(16, 2)(
            torch.randn(1, 3, 16), past_key_values=LayerStates(), use_cache=True
        ),
        "layer_idx: expected a place in the cache, got None",
    ),
    (
        lambda: mask_prefix(torch.zeros(2, 5).long(), 5, 3, probability=2),
        "probability: expected 0 to 1",
    ),
    (lambda: mask_prefix(torch.zeros(2, 5).long(), torch.ones(3), 3), "prefix_lengths: expected"),
    (
        lambda: jrt_loss(
            torch.randn(2, 5, 7), torch.zeros(2, 4).long(), torch.zeros(2, 5).bool(), 2
        ),
        "tokens: expected",
    ),
    (
        lambda: jrt_loss(
            torch.randn(2, 5, 7), torch.zeros(2, 5).long(), torch.zeros(2, 4).bool(), 2
        ),
        "masked: expected",
    ),
]


@pytest.mark.parametrize("call, message", BAD, ids=lambda x: x if isinstance(x, str) else "")
def test_bad_arguments(call, message):
    with pytest.raises(ValueError) as error:
        call()
    assert message in str(error.value)
