"""pool_chunks and retrieve: the same bits as the reference, on data that ties as well as on random data."""

import math

import pytest
import torch
from support import ALL_DTYPES, CONTENTS, embeddings, name_of

from resona_ext import reference

ops = torch.ops.resona


def both(query, context, chunk_size, top_k, cu_seqlens=None):
    length = context.shape[1]
    chunks = ops.pool_chunks(context, chunk_size, cu_seqlens)
    expected_chunks = reference.pool_chunks(context, chunk_size, cu_seqlens)
    assert torch.equal(chunks, expected_chunks)
    got = ops.retrieve(query, chunks, chunk_size, top_k, length, cu_seqlens)
    return got, reference.retrieve(query, chunks, chunk_size, top_k, length, cu_seqlens)


def assert_same_bits(got, expected):
    assert torch.equal(got[0], expected[0]), "indices differ"
    assert got[1].dtype == expected[1].dtype
    assert torch.equal(got[1].nan_to_num(7.0), expected[1].nan_to_num(7.0)), "scores differ"
    assert torch.equal(got[1].isnan(), expected[1].isnan())


@pytest.mark.parametrize("kind", CONTENTS)
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=name_of)
@pytest.mark.parametrize(
    "chunk_size, top_k, dim",
    [(1, 1, 16), (2, 1, 40), (3, 2, 7), (8, 4, 64), (16, 8, 33), (37, 24, 128), (64, 8, 72)],
)
def test_equals_reference(kind, dtype, chunk_size, top_k, dim):
    context = embeddings(kind, 1, 40 * chunk_size // (1 + chunk_size // 16) + 3, 2, dim, dtype)
    query = context.roll(5, dims=1)  # queries that occur in the context
    assert_same_bits(*both(query, context, chunk_size, top_k))


@pytest.mark.parametrize("kind", ["random", "four_letters"])
def test_many_tiles_of_chunks(kind):
    """More chunks than one tile holds, more queries than one task."""
    context = embeddings(kind, 2, 700, 1, 24, torch.float32)
    assert_same_bits(*both(context[:, -500:], context, 2, 5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_scores_that_rise_with_the_chunk(dtype):
    """Every chunk enters every list: the candidates of a row outgrow their buffer."""
    chunks = torch.randn(1, 400, 1, 32) + torch.linspace(0, 20, 400)[:, None, None]
    query = torch.randn(1, 50, 1, 32) + 5
    chunks, query = chunks.to(dtype), query.to(dtype)
    got = ops.retrieve(query, chunks, 2, 3, 800)
    assert_same_bits(got, reference.retrieve(query, chunks, 2, 3, 800))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_packed_restarts_the_grid(dtype):
    lengths = [0, 17, 3, 0, 64, 1, 40]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    context = embeddings("zipf", 1, sum(lengths), 2, 20, dtype)
    got, expected = both(context, context, 4, 3, cu_seqlens)
    assert_same_bits(got, expected)
    begin, end = int(cu_seqlens[4]), int(cu_seqlens[5])
    alone, _ = both(context[:, begin:end], context[:, begin:end], 4, 3)
    assert torch.equal(got[0][:, begin:end], alone[0])


def test_packed_rest_of_the_chunk_buffer_is_zero():
    context = torch.randn(1, 12, 1, 5)
    chunks = ops.pool_chunks(context, 4, torch.tensor([0, 3, 6, 12], dtype=torch.int32))
    assert chunks.shape[1] == 3
    assert chunks[:, 0].abs().sum() > 0 and torch.count_nonzero(chunks[:, 1:]) == 0


@pytest.mark.parametrize("exponent", [-140, -130, -40, 0, 60, 120])
def test_powers_of_two_change_no_index(exponent):
    """The smallest leave subnormal queries, the largest overflow a float32 dot product."""
    context = embeddings("four_letters", 1, 300, 1, 32, torch.float32)
    query = torch.randint(-3, 4, (1, 300, 1, 32)).float()
    plain, _ = both(query, context, 3, 4)
    scaled, expected = both(torch.ldexp(query, torch.tensor(exponent)), context, 3, 4)
    assert_same_bits(scaled, expected)
    assert torch.equal(plain[0], scaled[0]) and torch.equal(plain[1], scaled[1])


@pytest.mark.parametrize("magnitude", [1e-40, 1e-20, 1.0, 1e15, 1e30, 3e38])
def test_chunks_are_used_as_given(magnitude):
    chunks = torch.randn(1, 40, 1, 16) * magnitude
    chunks[:, 7] *= 1e-6
    query = torch.randn(1, 200, 1, 16)
    got = ops.retrieve(query, chunks, 5, 6, 200)
    assert_same_bits(got, reference.retrieve(query, chunks, 5, 6, 200))


def test_zero_norm_query_scores_zero_and_takes_the_first_chunks():
    context = torch.randn(1, 40, 1, 8)
    query = torch.zeros(1, 40, 1, 8)
    (indices, scores), expected = both(query, context, 4, 3)
    assert_same_bits((indices, scores), expected)
    assert indices[0, -1, 0].tolist() == [0, 1, 2] and scores[0, -1, 0].tolist() == [0, 0, 0]


def test_zero_norm_chunk_stays_zero():
    context = torch.randn(1, 12, 1, 8)
    context[:, 4:8] = torch.tensor([1.0, -1.0, 2.0, -2.0]).view(1, 4, 1, 1)
    chunks = ops.pool_chunks(context, 4)
    assert torch.count_nonzero(chunks[:, 1]) == 0 and torch.equal(
        chunks, reference.pool_chunks(context, 4)
    )


def test_negative_zero_is_made_positive():
    """The score -1e-60 rounds to -0 in float32."""
    query = torch.tensor([1e-30, 1.0]).view(1, 1, 1, 2).expand(1, 4, 1, 2)
    chunks = torch.tensor([[-1e-30, 0.0], [0.0, 0.0]]).view(1, 2, 1, 2)
    _, scores = ops.retrieve(query, chunks, 2, 1, 4)
    zero = scores[0, 3, 0, 0].item()
    assert zero == 0 and math.copysign(1, zero) == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["query", "chunks", "both"])
def test_nan_ranks_below_every_number_and_fills_by_index(bad, where):
    chunks = torch.randn(1, 30, 1, 6)
    query = torch.randn(1, 120, 1, 6)
    if where != "query":
        chunks[:, 3, :, 2] = bad
        chunks[:, 9, :, 1] = bad
    if where != "chunks":
        query[:, 60:, :, 0] = bad
    got = ops.retrieve(query, chunks, 4, 12, 120)
    assert_same_bits(got, reference.retrieve(query, chunks, 4, 12, 120))


@pytest.mark.parametrize("last", [0.0, 1e-30])
def test_a_nan_chunk_does_not_hide_the_norms_of_its_tile(last):
    """Scores near zero by cancellation: the filter's bound must come from the large chunks."""
    for seed in range(20):
        torch.manual_seed(seed)
        query = torch.randn(1, 1, 1, 64)
        chunks = torch.randn(1, 41, 1, 64)
        chunks -= (chunks * query).sum(-1, keepdim=True) / query.square().sum() * query
        chunks[0, 38] = math.nan
        chunks[0, 39] = last
        got = ops.retrieve(query, chunks, 1, 3, 41)
        assert_same_bits(got, reference.retrieve(query, chunks, 1, 3, 41))


def test_nan_context_reaches_its_own_chunk_only():
    context = torch.randn(1, 20, 1, 4)
    context[:, 6] = math.nan
    chunks = ops.pool_chunks(context, 4)
    assert chunks.isnan().all(dim=-1).flatten().tolist() == [False, True, False, False, False]


EMPTY = {
    "no batch": (0, 5, 9, 2, 2),
    "no queries": (2, 0, 9, 2, 2),
    "no context": (2, 0, 0, 2, 2),
    "shorter than a chunk": (1, 3, 3, 4, 2),
    "chunk of one": (1, 9, 9, 1, 3),
    "more slots than chunks": (1, 9, 9, 2, 50),
}


@pytest.mark.parametrize("case", EMPTY)
def test_empty_and_small(case):
    batch, queries, length, chunk_size, top_k = EMPTY[case]
    context, query = torch.randn(batch, length, 2, 5), torch.randn(batch, queries, 2, 5)
    assert_same_bits(*both(query, context, chunk_size, top_k))


def test_strict_causality():
    """Chunk j is eligible from position (j + 1) S on, and not a token earlier."""
    context = torch.randn(1, 13, 1, 4)
    indices, scores = ops.retrieve(context, ops.pool_chunks(context, 4), 4, 9, 13)
    filled = (indices >= 0).sum(dim=-1).flatten().tolist()
    assert filled == [p // 4 for p in range(13)]
    assert scores[indices < 0].eq(-math.inf).all()


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded", "strided_last", "offset"])
def test_any_strides(layout):
    base = torch.randn(2, 48, 3, 10)
    view = {
        "transposed": base.transpose(1, 2).contiguous().transpose(1, 2),
        "sliced": torch.randn(2, 96, 5, 24)[:, ::2, 1:4, 3:13],
        "expanded": torch.randn(2, 1, 3, 10).expand(2, 48, 3, 10),
        "strided_last": torch.randn(2, 48, 3, 20)[..., ::2],
        "offset": torch.randn(2 * 48 * 3 * 10 + 1)[1:].view(2, 48, 3, 10),
    }[layout]
    assert_same_bits(*both(view, view, 5, 3))


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=name_of)
def test_unaligned_pointers(dtype):
    """Not even aligned to an element."""
    plain = torch.randn(1, 40, 1, 9).to(dtype)
    raw = bytearray(1) + bytearray(plain.contiguous().view(torch.uint8).numpy().tobytes())
    moved = torch.frombuffer(raw, dtype=torch.uint8)[1:].numpy()
    view = torch.from_numpy(moved).untyped_storage()
    unaligned = torch.empty(0, dtype=dtype).set_(view, 0, plain.shape)
    assert unaligned.data_ptr() % unaligned.element_size() != 0
    got = ops.retrieve(unaligned, ops.pool_chunks(unaligned, 3), 3, 4, 40)
    assert_same_bits(got, reference.retrieve(plain, reference.pool_chunks(plain, 3), 3, 4, 40))


def test_large_dimension_is_streamed():
    context = embeddings("zipf", 1, 60, 1, 3000, torch.bfloat16)
    assert_same_bits(*both(context, context, 3, 4))
