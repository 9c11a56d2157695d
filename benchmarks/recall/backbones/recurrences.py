"""The recurrences that the mixers share, in plain PyTorch and chunk by chunk.

Inside a chunk everything is a matrix product, from chunk to chunk a state is handed on; the tests hold
each against its step-by-step definition. query, key [B, H, T, D], value [B, H, T, V]; decays are given
as logarithms (<= 0), and only differences of their sums are exponentiated, so nothing overflows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import wraps

import torch
from torch import Tensor

CHUNK = 64
VECTOR_CHUNK = 16  # here a chunk costs chunk^2 * D numbers, not chunk^2


def at_least_float32(function: Callable) -> Callable:
    """Long sums lose too much in half precision: autocast is off inside, half inputs are widened."""

    @wraps(function)
    def widened(*tensors: Tensor | None) -> Tensor:
        device = tensors[0].device.type
        with torch.autocast(device, enabled=False):
            wide = (
                x if x is None else x.to(torch.promote_types(x.dtype, torch.float32))
                for x in tensors
            )
            return function(*wide).to(tensors[0].dtype)

    return widened


@at_least_float32
def scalar_decay(query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor) -> Tensor:
    """S_t = a_t S_{t-1} + k_t v_t^T, y_t = q_t S_t: log_decay [B, H, T] -> [B, H, T, V]."""
    state, out = _state(key, value), []
    for q, k, v, g in _chunks(CHUNK, query, key, value, log_decay):
        total, left, span = _sums(g)
        out.append(((q @ k.mT) * span) @ v + (q * total.exp().unsqueeze(-1)) @ state)
        state = _last(total).exp() * state + (k * left.unsqueeze(-1)).mT @ v
    return torch.cat(out, dim=2)


@at_least_float32
def delta_rule(
    query: Tensor, key: Tensor, value: Tensor, beta: Tensor, log_decay: Tensor | None = None
) -> Tensor:
    """S_t = a_t (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T, y_t = q_t S_t; beta, log_decay [B, H, T].

    With u_t = b_t (v_t - a_t S_{t-1}^T k_t) this is S_t = a_t S_{t-1} + k_t u_t^T: within a chunk the u
    solve a unit triangular system.
    """
    log_decay = torch.zeros_like(beta) if log_decay is None else log_decay
    state, out = _state(key, value), []
    for q, k, v, b, g in _chunks(CHUNK, query, key, value, beta, log_decay):
        total, left, span = _sums(g)
        b, total_exp = b.unsqueeze(-1), total.exp().unsqueeze(-1)
        system = b * ((k @ k.mT) * span).tril(-1)
        wanted = b * (v - (k * total_exp) @ state)
        u = torch.linalg.solve_triangular(system, wanted, upper=False, unitriangular=True)
        out.append(((q @ k.mT) * span) @ u + (q * total_exp) @ state)
        state = _last(total).exp() * state + (k * left.unsqueeze(-1)).mT @ u
    return torch.cat(out, dim=2)


@at_least_float32
def key_decay(query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor) -> Tensor:
    """S_t = diag(a_t) S_{t-1} + k_t v_t^T, y_t = q_t S_t: log_decay [B, H, T, D]."""
    state, out = _state(key, value), []
    for q, k, v, g in _chunks(VECTOR_CHUNK, query, key, value, log_decay):
        total, left, span = _vector_sums(g)
        weight = torch.einsum("bhid,bhijd,bhjd->bhij", q, span, k)
        out.append(weight @ v + (q * total.exp()) @ state)
        state = total[:, :, -1].exp().unsqueeze(-1) * state + (k * left).mT @ v
    return torch.cat(out, dim=2)


@at_least_float32
def value_decay(query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor) -> Tensor:
    """S_t = S_{t-1} diag(a_t) + k_t v_t^T, y_t = q_t S_t: log_decay [B, H, T, V]."""
    state, out = _state(key, value), []
    for q, k, v, g in _chunks(VECTOR_CHUNK, query, key, value, log_decay):
        total, left, span = _vector_sums(g)
        inside = torch.einsum("bhij,bhijv,bhjv->bhiv", q @ k.mT, span, v)
        out.append(inside + (q @ state) * total.exp())
        state = total[:, :, -1].exp().unsqueeze(-2) * state + k.mT @ (v * left)
    return torch.cat(out, dim=2)


@at_least_float32
def selective_scan(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """h_t = exp(dt_t a) h_{t-1} + dt_t x_t b_t^T, y_t = h_t c_t, step by step.

    x, dt [B, T, D], a [D, N], b, c [B, T, N] -> [B, T, D]. Transformers' form of the same indexes the
    sequence in its loop, whose backward is quadratic in T; unbind keeps it linear.
    """
    decay = (dt.unsqueeze(-1) * a).exp()
    drive = (dt * x).unsqueeze(-1) * b.unsqueeze(2)
    h, out = torch.zeros_like(drive[:, 0]), []
    for decay_t, drive_t, c_t in zip(decay.unbind(1), drive.unbind(1), c.unbind(1), strict=True):
        h = decay_t * h + drive_t
        out.append((h @ c_t.unsqueeze(-1)).squeeze(-1))
    return torch.stack(out, dim=1)


@at_least_float32
def long_convolution(x: Tensor, kernel: Tensor) -> Tensor:
    """y_t = sum over s <= t of kernel[t - s] x_s, by FFT: x [B, T, D], kernel [>= T, D]."""
    steps = x.shape[1]
    size = 2 * steps  # no wrap-around
    product = torch.fft.rfft(x, size, dim=1) * torch.fft.rfft(kernel[:steps], size, dim=0)
    return torch.fft.irfft(product, size, dim=1)[:, :steps]


def _state(k: Tensor, v: Tensor) -> Tensor:
    return k.new_zeros(*k.shape[:2], k.shape[-1], v.shape[-1])


def _chunks(size: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(x.split(size, dim=2) for x in tensors), strict=True)


def _last(total: Tensor) -> Tensor:
    return total[..., -1:].unsqueeze(-1)


def _sums(g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The decay up to each step (its logarithm), from each step to the end, and between any two."""
    total = g.cumsum(dim=-1)
    span = total.unsqueeze(-1) - total.unsqueeze(-2)
    past = torch.ones(span.shape[-2:], dtype=torch.bool, device=g.device).tril()
    return (
        total,
        (total[..., -1:] - total).exp(),
        span.masked_fill(~past, -torch.inf).exp(),
    )


def _vector_sums(g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    total = g.cumsum(dim=2)
    span = total.unsqueeze(3) - total.unsqueeze(2)
    past = torch.ones(span.shape[2:4], dtype=torch.bool, device=g.device).tril().unsqueeze(-1)
    return total, (total[:, :, -1:] - total).exp(), span.masked_fill(~past, -torch.inf).exp()
