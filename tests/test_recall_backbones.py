"""The backbones: every recurrence against its definition step by step, every mixer for causality."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.recall.backbones import (
    BACKBONES,
    Spec,
    attention,
    convolution,
    linear,
    recurrences,
    state_space,
)

SPEC = Spec(width=16, heads=2, length=40, layer=1, layers=2)
STEPS = [1, 15, 16, 70]  # less than a chunk, one, several with a rest


@pytest.fixture(autouse=True)
def one_thread():
    """Models this small only lose by threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def heads(steps: int, dim: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, steps, dim, generator=generator, dtype=torch.float64)


def decays(shape: torch.Size) -> torch.Tensor:
    """Logarithms from almost nothing to far below what exp can represent inverted."""
    generator = torch.Generator().manual_seed(9)
    uniform = torch.rand(shape, generator=generator, dtype=torch.float64)
    return -(10 ** (4 * uniform - 3))


@pytest.fixture(params=STEPS)
def parts(request):
    """query, key [2, 3, T, 5], value [2, 3, T, 4]."""
    return heads(request.param, 5, 0), heads(request.param, 5, 1), heads(request.param, 4, 2)


def recur(query, key, value, update):
    state = torch.zeros(*key.shape[:2], key.shape[-1], value.shape[-1], dtype=key.dtype)
    out = []
    for t in range(query.shape[2]):
        state = update(state, t)
        out.append(torch.einsum("bhd,bhdv->bhv", query[:, :, t], state))
    return torch.stack(out, dim=2)


def outer(key, value, t):
    return key[:, :, t].unsqueeze(-1) * value[:, :, t].unsqueeze(-2)


def test_scalar_decay_is_its_recurrence(parts):
    query, key, value = parts
    g = decays(query.shape[:3])
    expected = recur(*parts, lambda s, t: g[:, :, t, None, None].exp() * s + outer(key, value, t))
    torch.testing.assert_close(recurrences.scalar_decay(*parts, g), expected)


@pytest.mark.parametrize("has_decay", [False, True])
def test_delta_rule_is_its_recurrence(parts, has_decay):
    query, key, value = parts
    key = F.normalize(key, dim=-1)
    beta = torch.rand(query.shape[:3], dtype=torch.float64)
    g = decays(query.shape[:3]) if has_decay else torch.zeros_like(beta)

    def update(state, t):
        k, b = key[:, :, t], beta[:, :, t, None, None]
        held = torch.einsum("bhd,bhdv->bhv", k, state)
        kept = g[:, :, t, None, None].exp() * (state - b * k.unsqueeze(-1) * held.unsqueeze(-2))
        return kept + b * outer(key, value, t)

    got = recurrences.delta_rule(query, key, value, beta, g if has_decay else None)
    torch.testing.assert_close(got, recur(query, key, value, update))


def test_key_decay_is_its_recurrence(parts):
    _, key, value = parts
    g = decays(key.shape)
    expected = recur(*parts, lambda s, t: g[:, :, t, :, None].exp() * s + outer(key, value, t))
    torch.testing.assert_close(recurrences.key_decay(*parts, g), expected)


def test_value_decay_is_its_recurrence(parts):
    _, key, value = parts
    g = decays(value.shape)
    expected = recur(*parts, lambda s, t: g[:, :, t, None, :].exp() * s + outer(key, value, t))
    torch.testing.assert_close(recurrences.value_decay(*parts, g), expected)


def test_selective_scan_is_the_sum_over_the_past():
    """The unrolled form: y_t = sum over s of c_t (prod of decays) dt_s x_s b_s."""
    generator = torch.Generator().manual_seed(3)

    def random(*shape):
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    x, dt, a, b, c = (
        random(2, 9, 3),
        random(2, 9, 3),
        -random(3, 4),
        random(2, 9, 4),
        random(2, 9, 4),
    )
    total = dt.cumsum(dim=1)
    expected = torch.zeros_like(x)
    for t in range(9):
        for s in range(t + 1):
            decay = ((total[:, t] - total[:, s]).unsqueeze(-1) * a).exp()
            drive = (dt[:, s] * x[:, s]).unsqueeze(-1) * b[:, s].unsqueeze(1)
            expected[:, t] += (decay * drive * c[:, t].unsqueeze(1)).sum(dim=-1)
    torch.testing.assert_close(recurrences.selective_scan(x, dt, a, b, c), expected)


def test_long_convolution_is_the_sum():
    x, kernel = torch.randn(2, 11, 3), torch.randn(13, 3)
    expected = torch.stack(
        [sum(kernel[t - s] * x[:, s] for s in range(t + 1)) for t in range(11)], dim=1
    )
    torch.testing.assert_close(recurrences.long_convolution(x, kernel), expected, atol=1e-5, rtol=0)


# --- the mixers -----------------------------------------------------------------------------------


def build(name: str, spec: Spec = SPEC) -> nn.Module:
    reason = BACKBONES[name].missing("cpu")
    if reason is not None:
        pytest.skip(reason)
    torch.manual_seed(0)
    return BACKBONES[name].build(spec)


def call(mixer: nn.Module, x: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
    return mixer(x, embeddings) if getattr(mixer, "reads_embeddings", False) else mixer(x)


PLACES = [(name, 0) for name in BACKBONES] + [("baseconv", 1), ("mambaformer", 1)]


@pytest.mark.parametrize(("name", "layer"), PLACES)
def test_mixers_are_causal_and_differentiable(name, layer):
    mixer = build(name, replace(SPEC, layer=layer))
    x, e = torch.randn(2, 2, 40, 16).unbind()
    x.requires_grad_()
    out = call(mixer, x, e)
    assert out.shape == x.shape
    later = x.detach().clone()
    later[:, 25:] += 1
    later_e = e.clone()
    later_e[:, 25:] += 1
    torch.testing.assert_close(call(mixer, later, later_e)[:, :25], out[:, :25], atol=2e-5, rtol=0)
    out.square().sum().backward()
    for parameter in (x, *mixer.parameters()):
        assert parameter.grad is not None and parameter.grad.isfinite().all()
        assert parameter.grad.abs().max() > 0


@pytest.mark.parametrize("name", BACKBONES)
def test_autocast_changes_little(name):
    mixer = build(name)
    x, e = torch.randn(2, 2, 40, 16).unbind()
    expected = call(mixer, x, e)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = call(mixer, x, e)
    out.float().square().sum().backward()
    assert all(p.grad.isfinite().all() for p in mixer.parameters())
    assert (out - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("name", BACKBONES)
def test_rows_of_a_batch_are_apart(name):
    mixer = build(name)
    x, e = torch.randn(2, 3, 40, 16).unbind()
    torch.testing.assert_close(
        call(mixer, x, e)[1:2], call(mixer, x[1:2], e[1:2]), atol=2e-5, rtol=0
    )


def test_gla_with_open_gates_is_linear_attention():
    mixer = linear.Gla(SPEC)
    nn.init.zeros_(mixer.decay[1].weight)
    nn.init.constant_(mixer.decay[1].bias, 1e4)  # log sigmoid = 0
    x = torch.randn(1, 20, 16)
    q, k, v = (f(x).unflatten(-1, (2, -1)).transpose(1, 2) for f in (mixer.q, mixer.k, mixer.v))
    y = ((q @ k.mT).tril() @ v) * 4**-0.5
    y = F.rms_norm(y, (8,)).transpose(1, 2).flatten(2) * F.silu(mixer.gate(x))
    torch.testing.assert_close(mixer(x), mixer.out(y), atol=1e-5, rtol=1e-4)


def test_rwkv5_is_its_recurrence():
    mixer = linear.Rwkv5(SPEC).double()
    x = torch.randn(1, 20, 16, dtype=torch.float64)
    before = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=1)
    r, k, v, g = (
        f(x * mix + before * (1 - mix))
        for f, mix in zip((mixer.r, mixer.k, mixer.v, mixer.gate), mixer.mix, strict=True)
    )
    decay = torch.exp(-mixer.decay.exp()).view(2, 8, 1)
    bonus = mixer.bonus.view(2, 8, 1)
    state, out = torch.zeros(2, 8, 8, dtype=torch.float64), []
    for t in range(20):
        now = k[0, t].view(2, 8, 1) * v[0, t].view(2, 1, 8)
        out.append((r[0, t].view(2, 1, 8) @ (state + bonus * now)).squeeze(1))
        state = decay * state + now
    y = F.rms_norm(torch.stack(out), (8,)).flatten(1) * F.silu(g[0])
    torch.testing.assert_close(mixer(x)[0], mixer.out(y))


@torch.no_grad()
def test_retnet_is_its_recurrence():
    """Rotary positions by complex numbers, then S = decay S + k v^T."""
    mixer = linear.RetNet(SPEC).double()
    x = torch.randn(20, 16, dtype=torch.float64)
    q, k, v = (p(x).view(20, 2, 8) for p in (mixer.q, mixer.k, mixer.v))
    angle = torch.outer(torch.arange(20), 10000.0 ** (-torch.arange(4) / 4)).unsqueeze(1)
    turn = torch.polar(torch.ones_like(angle), angle)

    def rotated(part: torch.Tensor) -> torch.Tensor:
        turned = torch.complex(part[..., :4], part[..., 4:]) * turn
        return torch.cat([turned.real, turned.imag], dim=-1)

    q, k = rotated(q) / 8**0.5, rotated(k)
    decay = torch.tensor([1 - 2**-5, 1 - 2**-6], dtype=torch.float64).view(2, 1, 1)
    state, out = torch.zeros(2, 8, 8, dtype=torch.float64), []
    for t in range(20):
        state = decay * state + k[t].unsqueeze(-1) * v[t].unsqueeze(-2)
        out.append((q[t].unsqueeze(-2) @ state).squeeze(-2))
    y = F.rms_norm(torch.stack(out), (8,)).flatten(1) * F.silu(mixer.gate(x))
    torch.testing.assert_close(mixer(x[None])[0], mixer.out(y), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_deltanet_is_its_recurrence():
    mixer = linear.DeltaNet(SPEC).double()
    x = torch.randn(20, 16, dtype=torch.float64)
    q, k, v = (
        F.silu(convolve(f(x), taps(short)) + short.bias).view(20, 2, 8)
        for f, short in zip((mixer.q, mixer.k, mixer.v), mixer.short, strict=True)
    )
    beta = mixer.beta(x).sigmoid().view(20, 2, 1, 1)
    state, out = torch.zeros(2, 8, 8, dtype=torch.float64), []
    for t in range(20):
        unit_q, unit_k = (part[t] / part[t].norm(dim=-1, keepdim=True) for part in (q, k))
        new = v[t].unsqueeze(-2) - unit_k.unsqueeze(-2) @ state
        state = state + beta[t] * unit_k.unsqueeze(-1) * new
        out.append((unit_q.unsqueeze(-2) @ state).squeeze(-2))
    y = F.rms_norm(torch.stack(out), (8,)).flatten(1)
    torch.testing.assert_close(mixer(x[None])[0], mixer.out(y))


def test_gsa_is_its_recurrence():
    mixer = linear.Gsa(SPEC, slots=5).double()
    x = torch.randn(1, 20, 16, dtype=torch.float64)
    q, k, v, f = (p(x)[0].view(20, 2, -1) for p in (mixer.q, mixer.k, mixer.v, mixer.forget))
    q, k, keep = F.silu(q), F.silu(k), torch.sigmoid(f) ** (1 / 16)
    keys = values = torch.zeros(2, 5, 8, dtype=torch.float64)
    out = []
    for t in range(20):
        a = keep[t].unsqueeze(-1)
        keys = a * keys + (1 - a) * k[t].unsqueeze(1)
        values = a * values + (1 - a) * v[t].unsqueeze(1)
        read = ((keys @ q[t].unsqueeze(-1)).squeeze(-1) / 8**0.5).softmax(dim=-1)
        out.append((read.unsqueeze(1) @ values).squeeze(1))
    y = F.rms_norm(torch.stack(out), (8,)).flatten(1)
    torch.testing.assert_close(mixer(x)[0], mixer.out(y))


def test_mamba_is_that_of_transformers():
    modeling = pytest.importorskip("transformers.models.mamba.modeling_mamba")
    from transformers import MambaConfig

    torch.manual_seed(0)
    ours = state_space.Mamba(SPEC)
    config = MambaConfig(hidden_size=16, state_size=16, num_hidden_layers=1, time_step_rank=1)
    theirs = modeling.MambaMixer(config, layer_idx=0)
    pairs = {
        "in_proj": ours.project,
        "conv1d": ours.short,
        "x_proj": ours.select,
        "dt_proj": ours.step,
        "out_proj": ours.out,
    }
    for name, module in pairs.items():
        getattr(theirs, name).load_state_dict(module.state_dict())
    theirs.A_log.data, theirs.D.data = ours.log_a.data, ours.skip.data
    x = torch.randn(2, 12, 16)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-4)


def test_mamba2_of_transformers_is_scalar_decay():
    mixer = build("mamba2").inner
    x, heads, inner = torch.randn(1, 40, 16), 4, 32
    gate, mixed, dt = mixer.in_proj(x).split([inner, inner + 128, heads], dim=-1)
    taps = mixer.conv1d.weight.shape[-1]
    mixed = F.conv1d(
        F.pad(mixed.mT, (taps - 1, 0)), mixer.conv1d.weight, mixer.conv1d.bias, groups=160
    )
    value, key, query = F.silu(mixed).mT.split([inner, 64, 64], dim=-1)
    dt = F.softplus(dt + mixer.dt_bias).transpose(1, 2)
    value = value.unflatten(-1, (heads, -1)).transpose(1, 2)
    key, query = (part.unsqueeze(1).expand(-1, heads, -1, -1) for part in (key, query))
    log_decay = -mixer.A_log.exp().view(heads, 1) * dt
    y = recurrences.scalar_decay(query, key, value * dt.unsqueeze(-1), log_decay)
    y = (y + mixer.D.view(heads, 1, 1) * value).transpose(1, 2).flatten(2) * F.silu(gate)
    expected = mixer.out_proj(F.rms_norm(y, (inner,), mixer.norm.weight, 1e-5))
    torch.testing.assert_close(mixer(x), expected, atol=1e-4, rtol=1e-3)


def test_gated_deltanet_of_transformers_is_our_delta_rule(monkeypatch):
    """Its kernel's inputs are caught on the way."""
    mixer = build("gated-deltanet")
    modeling = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    kernel, caught = modeling.torch_chunk_gated_delta_rule, []

    def catch(*args, **kwargs):
        result = kernel(*args, **kwargs)
        caught.append((args, kwargs, result[0]))
        return result

    monkeypatch.setattr(modeling, "torch_chunk_gated_delta_rule", catch)
    mixer(torch.randn(2, 40, 16))
    ((query, key, value), settings, out) = caught[0]
    query, key = F.normalize(query, dim=-1), F.normalize(key, dim=-1)
    query, key, value = (part.transpose(1, 2) for part in (query * 8**-0.5, key, value))
    beta, g = (settings[name].transpose(1, 2) for name in ("beta", "g"))
    ours = recurrences.delta_rule(query, key, value, beta, g).transpose(1, 2)
    torch.testing.assert_close(ours, out, atol=1e-4, rtol=1e-3)


def test_h3_kernel_is_the_state_space():
    """The response to a unit impulse of h_t = diag(pole) h_{t-1} + x_t, y = 2 Re(c h)."""
    mixer = convolution.H3(SPEC)
    pole = torch.exp(
        torch.complex(-mixer.log_decay.exp(), mixer.turn) * mixer.log_step.exp().unsqueeze(-1)
    )
    weight = torch.view_as_complex(mixer.weight)
    state, expected = torch.ones_like(pole), []
    for _ in range(30):
        expected.append(2 * (weight * state).sum(dim=-1).real)
        state = pole * state
    torch.testing.assert_close(mixer.kernel(30), torch.stack(expected), atol=1e-4, rtol=1e-4)


def convolve(x: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    """The causal sum as a loop over distances: x [T, d], kernel [n, d]."""
    out = torch.zeros_like(x)
    for distance in range(min(len(x), len(kernel))):
        out[distance:] += kernel[distance] * x[: len(x) - distance]
    return out


def taps(conv: nn.Conv1d) -> torch.Tensor:
    return conv.weight[:, 0].T.flip(0)


@torch.no_grad()
def test_baseconv_is_its_formula():
    x = torch.randn(30, 16)
    even, odd = (build("baseconv", replace(SPEC, layer=layer)) for layer in (0, 1))
    short = convolve(x, taps(even.short)) + even.short.bias
    torch.testing.assert_close(even(x[None])[0], short * even.gate(x) + x, atol=1e-5, rtol=1e-4)
    long = convolve(x, odd.kernel())
    torch.testing.assert_close(odd(x[None])[0], long * odd.gate(x) + x, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_hyena_is_its_formula():
    mixer, x = build("hyena"), torch.randn(30, 16)
    first, second, v = (convolve(mixer.project(x), taps(mixer.short)) + mixer.short.bias).chunk(
        3, -1
    )
    v = second * v
    expected = mixer.out(first * (convolve(v, mixer.kernel()) + mixer.skip * v))
    torch.testing.assert_close(mixer(x[None])[0], expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_h3_is_its_state_spaces():
    """A shift register of k, then a complex diagonal state per head, step by step."""
    mixer, x = build("h3"), torch.randn(30, 16)
    k = convolve(mixer.k(x), mixer.shift).view(30, 8, 2)
    q, v = mixer.q(x).view(30, 8, 2), mixer.v(x).view(30, 8, 2)
    step = mixer.log_step.exp().view(8, 1)
    pole = torch.exp(torch.complex(-mixer.log_decay.exp(), mixer.turn) * step)
    weight = torch.view_as_complex(mixer.weight)
    state, out = torch.zeros(8, 2, 2, pole.shape[1], dtype=pole.dtype), []
    for t in range(30):
        product = k[t].unsqueeze(-1) * v[t].unsqueeze(-2)
        state = pole.view(8, 1, 1, -1) * state + product.unsqueeze(-1)
        read = 2 * (weight.view(8, 1, 1, -1) * state).sum(dim=-1).real
        read = read + mixer.skip.view(8, 1, 1) * product
        out.append((q[t].unsqueeze(-2) @ read).flatten())
    expected = mixer.out(torch.stack(out))
    torch.testing.assert_close(mixer(x[None])[0], expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("window", [1, 5, 40])
def test_a_window_sees_its_tokens_only(window):
    mixer = attention.Attention(SPEC, window=window)
    q, k, v = mixer.heads_of(x := torch.randn(1, 40, 16))
    for t in (0, 4, 39):
        seen = slice(max(0, t - window + 1), t + 1)
        weight = torch.einsum("bhd,bshd->bhs", q[:, t], k[:, seen]) * 8**-0.5
        y = torch.einsum("bhs,bshd->bhd", weight.softmax(dim=-1), v[:, seen])
        torch.testing.assert_close(mixer.attend(x)[:, t], y.flatten(1), atol=1e-5, rtol=1e-4)


def test_retrieval_attention_sees_the_nearest_past_chunks_only():
    mixer = attention.RetrievalAttention(replace(SPEC, chunk_size=4, top_k=2))
    x, e = torch.randn(2, 1, 40, 16).unbind()
    q, k, v = mixer.heads_of(x)
    unit = F.normalize(F.rms_norm(e, (16,))[0].view(10, 4, 16).mean(dim=1), dim=-1)
    expected = torch.zeros(40, 2, 8)
    for t in range(4, 40):
        score = F.normalize(x[0, t], dim=0) @ unit[: t // 4].T
        chunks = score.topk(min(2, t // 4)).indices
        seen = (4 * chunks.unsqueeze(1) + torch.arange(4)).flatten()
        weight = torch.einsum("hd,shd->hs", q[0, t], k[0, seen]) * 8**-0.5
        expected[t] = torch.einsum("hs,shd->hd", weight.softmax(dim=-1), v[0, seen])
    torch.testing.assert_close(mixer(x, e)[0], mixer.out(expected.flatten(1)), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["hymba", "hymba-retrieval"])
def test_hymba_averages_what_its_two_halves_say(name):
    mixer, (x, e) = build(name), torch.randn(2, 1, 40, 16)
    halves = call(mixer.attention, x, e), mixer.mamba(x)
    expected = sum(F.rms_norm(half, (16,)) for half in halves) / 2
    torch.testing.assert_close(call(mixer, x, e), expected, atol=1e-4, rtol=1e-3)


def test_mambaformer_takes_turns():
    kinds = [type(build("mambaformer", replace(SPEC, layer=layer))) for layer in range(4)]
    assert kinds == [state_space.Mamba, attention.Attention] * 2


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(state_space, "absent", lambda module: f"{module} is not there")
    assert "mamba2" in BACKBONES["mamba2"].missing("cpu")
    assert BACKBONES["gla"].missing("cpu") is None


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="heads: expected a divisor of width 16, got 3"):
        replace(SPEC, heads=3)
