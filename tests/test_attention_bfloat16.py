"""attend in bfloat16, which has kernels of its own on processors with matrix tiles: shapes that do not fill a
tile, and values that the softmax between two tile products must survive."""

import math

import pytest
import torch

from resona_ext import reference

ops = torch.ops.resona
BF16 = torch.finfo(torch.bfloat16).eps


def problem(queries=150, chunk_size=16, dim=32, heads=2, kv_heads=2, top_k=4, chunks=9):
    context = chunks * chunk_size + queries
    query = torch.randn(1, queries, heads, dim).bfloat16()
    key, value = (torch.randn(1, context, kv_heads, dim).bfloat16() for _ in range(2))
    indices = torch.stack([torch.randperm(chunks)[:top_k] for _ in range(queries)])
    return query, key, value, indices[None, :, None].int(), chunk_size


def assert_close(arguments, scale=None, **extras):
    """Equal to float32 arithmetic on the same numbers, up to the rounding of weights and results."""
    query, key, value, indices, chunk_size = arguments
    out, lse = ops.attend(*arguments, **extras, scale=scale)
    wide = (query.float(), key.float(), value.float(), indices, chunk_size)
    expected, expected_lse = reference.attend(*wide, **extras, scale=scale)
    torch.testing.assert_close(out.float(), expected, rtol=2 * BF16, atol=2 * BF16, equal_nan=True)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-5, equal_nan=True)
    return out


@pytest.mark.parametrize(
    "chunk_size", [1, 2, 7, 15, 16, 17, 31, 33, 48, 64, 65, 80, 100, 112, 128, 150]
)
def test_every_number_of_keys(chunk_size):
    assert_close(problem(chunk_size=chunk_size, chunks=5, top_k=3))


@pytest.mark.parametrize("dim", [1, 15, 16, 31, 32, 33, 64, 100, 128, 200, 256])
def test_every_width(dim):
    assert_close(problem(dim=dim, queries=70))


@pytest.mark.parametrize("queries", [1, 15, 16, 17, 32, 63, 64, 65, 129, 200])
@pytest.mark.parametrize("heads, kv_heads", [(1, 1), (6, 2)])
def test_every_number_of_rows(queries, heads, kv_heads):
    assert_close(problem(queries=queries, heads=heads, kv_heads=kv_heads, chunks=3, top_k=3))


@pytest.mark.parametrize("scale", [0.0, -0.7, 3.0])
def test_scale_of_either_sign(scale):
    assert_close(problem(dim=8), scale=scale)


def test_a_repeated_chunk_counts_each_time():
    arguments = problem(top_k=4)
    arguments[3][..., 1:3] = arguments[3][..., :1]
    assert_close(arguments)


@pytest.mark.parametrize("size", [1.0, 30.0, 1e6])
def test_bias(size):
    arguments = problem()
    bias = torch.randn(arguments[3].shape) * size
    bias[:, ::7] = -math.inf
    bias[:, 1::7, :, 0] = -math.inf
    query, key, value, indices, chunk_size = arguments
    out, lse = ops.attend(*arguments, bias=bias)
    wide = (query.double(), key.double(), value.double(), indices, chunk_size)
    expected, expected_lse = reference.attend(*wide, bias=bias.double())
    # The rounding of a logit is that of its size.
    rounding = 2 * BF16 + 4 * size * torch.finfo(torch.float32).eps
    torch.testing.assert_close(out.double(), expected, rtol=rounding, atol=rounding)
    torch.testing.assert_close(lse.double(), expected_lse.double(), rtol=1e-5, atol=1e-5)


def test_sink():
    assert_close(problem(), sink=torch.tensor([2.0, -math.inf]))


def test_weights_that_underflow():
    query, key, value, indices, chunk_size = problem(chunks=4, top_k=4)
    key[:, :16] *= 1e3
    key[:, 16:32] *= 1e-38
    assert_close((query, key, value, indices, chunk_size))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_stays_in_its_rows(bad):
    query, key, value, indices, chunk_size = problem(queries=40, heads=1, kv_heads=1)
    query[:, 5] = bad
    out, lse = ops.attend(query, key, value, indices, chunk_size)
    assert out[:, 5].isnan().all() and lse[:, 5].isnan().all()
    others = torch.arange(40) != 5
    assert out[:, others].isfinite().all() and lse[:, others].isfinite().all()


def test_rows_do_not_depend_on_their_neighbours():
    query, key, value, indices, chunk_size = problem(queries=100)
    out, lse = ops.attend(query, key, value, indices, chunk_size)
    for first in (1, 37, 99):
        part = ops.attend(query[:, first:], key, value, indices[:, first:], chunk_size)
        assert torch.equal(part[0], out[:, first:]) and torch.equal(part[1], lse[:, first:])
