"""The decode cache with a search in two levels, against one full forward with the same sizes.

What moves and shortens sequences is in test_cache_two_level_moves.py."""

from __future__ import annotations

import itertools

import pytest
import torch
from support import ALL_DTYPES, Problem, embeddings, name_of
from test_cache import (
    ROWS,
    SHAPES,
    Text,
    assert_unchanged,
    make_cache,
    saved,
    snapshot,
)

import resona_ext
from resona_ext import ChunkCache, reference

ops = torch.ops.resona
EXTRAS = ("score_scale", "sink")


@pytest.fixture(autouse=True)
def _one_thread(threads):
    threads(1)


def full_forward(tensors: dict, p: Problem, size: int | None, probes: int | None) -> tuple:
    arguments = {name: tensors[name] for name in (*ROWS, *EXTRAS)}
    out, aux = resona_ext.retrieve_attend(
        **arguments,
        chunk_size=p.chunk_size,
        top_k=p.top_k,
        search="two_level",
        superchunk_size=size,
        probes=probes,
        return_aux=True,
    )
    return out, *aux


def make(
    length: int = 40,
    contents: str | None = None,
    size: int | None = 3,
    probes: int | None = 2,
    cache: dict | None = None,
    **options,
) -> Text:
    p = Problem(queries=length, context=length, **options)
    if contents is not None:
        shape = (p.batch, length, p.retrieval_heads, p.retrieval_dim)
        p.tensors["context_embedding"] = embeddings(contents, *shape, p.embedding_dtype or p.dtype)
        p.tensors["query_embedding"] = p.tensors["context_embedding"].flip(1)
    two_level = {"search": "two_level", "superchunk_size": size, "probes": probes}
    full = full_forward(p.tensors, p, size, probes)
    return Text(p, make_cache(p, **two_level, **(cache or {})), full)


def assert_superchunks(cache: ChunkCache, p: Problem, counts: list[int]) -> None:
    """What the cache holds are the bits of pooling the chunks of each sequence, and of their plain sum."""
    upper, context = cache.superchunks, p.tensors["context_embedding"]
    for b, count in enumerate(counts):
        own = ops.pool_chunks(context[b : b + 1, :count], p.chunk_size)
        pooled = reference.pool_chunks(own, upper.size)
        assert torch.equal(upper.embedding[b : b + 1, : pooled.shape[1]], pooled)
        total = torch.zeros_like(upper.sum[b])
        for chunk in own[0, pooled.shape[1] * upper.size :]:
            total += chunk
        assert torch.equal(upper.sum[b], total)


# --- A full forward equals its parts -------------------------------------------------------------


def test_the_search_is_not_the_exact_one():
    text = make()
    exact = ops.fused_retrieve_attend(**text.p.arguments())
    assert not torch.equal(text.full[2], exact[2])
    assert torch.equal(text.full[2][:, :8], exact[2][:, :8])


@pytest.mark.parametrize("sizes", [(1, 1), (2, 3), (4, 1), (5, 99), (99, 1)])
@pytest.mark.parametrize("shape", SHAPES)
def test_prefill_to_every_split_point_then_steps(shape, sizes):
    text = make(30, size=sizes[0], probes=sizes[1], **SHAPES[shape])
    for split in range(0, 31, 3):
        text.cache.reset()
        text.prefill(0, split)
        for token in range(split, 30):
            text.step(token)
        assert_superchunks(text.cache, text.p, [30, 30])


@pytest.mark.parametrize("shape", ["S 1", "S 2", "S 3"])
def test_prefill_in_three_pieces(shape):
    text = make(21, **SHAPES[shape])
    for cuts in itertools.combinations_with_replacement(range(0, 22, 2), 2):
        text.cache.reset()
        for begin, end in itertools.pairwise((0, *cuts, 21)):
            text.prefill(begin, end)
        assert_superchunks(text.cache, text.p, [21, 21])


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=name_of)
@pytest.mark.parametrize("embedding_dtype", ALL_DTYPES, ids=name_of)
def test_dtypes(dtype, embedding_dtype):
    options = dict(score_scale=True, sink=True, retrieval_heads=2, chunk_size=2)
    text = make(dtype=dtype, embedding_dtype=embedding_dtype, **options)
    text.prefill(0, 13)
    for token in range(13, 30):
        text.step(token)
    text.prefill(30, 40)
    assert_superchunks(text.cache, text.p, [40, 40])


@pytest.mark.parametrize("contents", ["repeated", "permuted", "zipf", "two_letters"])
def test_ties(contents):
    text = make(90, contents, chunk_size=2, dtype=torch.bfloat16, size=4)
    text.prefill(0, 9)
    for token in range(9, 90):
        text.step(token)


def test_against_the_reference():
    """Without the operators of the full forward."""
    text = make(60, "zipf", chunk_size=1, top_k=5, retrieval_heads=2)
    a, sizes = text.p.tensors, {"superchunk_size": 3, "probes": 2}
    chunks = reference.pool_chunks(a["context_embedding"], 1)
    search = (a["query_embedding"], chunks, 1, 5, 60)
    indices, scores = reference.retrieve_two_level(*search, **sizes)
    out, lse = reference.attend(a["query"], a["key"], a["value"], indices, 1)
    for token in range(60):
        rows = slice(token, token + 1)
        piece = text.piece(token, token + 1)
        got, aux = text.cache.step(*piece, top_k=5, return_aux=True)
        assert torch.equal(aux.indices, indices[:, rows])
        assert torch.equal(aux.scores, scores[:, rows])
        torch.testing.assert_close(got, out[:, rows])
        torch.testing.assert_close(aux.lse, lse[:, rows])


def test_nan_and_zero_embeddings():
    p = Problem(queries=44, context=44, chunk_size=2, top_k=4)
    p.tensors["context_embedding"][:, 4:12] = torch.nan
    p.tensors["context_embedding"][:, 16:24] = 0
    p.tensors["query_embedding"][:, 31] = 0
    _, _, indices, scores = full_forward(p.tensors, p, 2, 3)
    cache = make_cache(p, search="two_level", superchunk_size=2, probes=3)
    for token in range(44):
        piece = (p.tensors[name][:, token : token + 1] for name in ROWS)
        _, aux = cache.step(*piece, top_k=4, return_aux=True)
        assert torch.equal(aux.indices, indices[:, token : token + 1])
        assert torch.equal(aux.scores.isnan(), scores[:, token : token + 1].isnan())


@pytest.mark.parametrize("probes", [3, 150])
def test_a_long_search_gives_the_same_with_any_number_of_threads(threads, probes):
    p = Problem(batch=2, queries=1, context=30_000, retrieval_dim=128, chunk_size=1, top_k=5)
    a = p.tensors
    a["context_embedding"] = embeddings("zipf", 2, p.context, 1, 128, torch.float32)
    cache = make_cache(p, search="two_level", superchunk_size=60, probes=probes)
    state = make_cache(p).state_dict()
    for name, t in (("key", a["key"]), ("value", a["value"])):
        state[name] = t[:, :-1]
    state["chunk_embedding"] = ops.pool_chunks(a["context_embedding"], 1)[:, :-1]
    state["lengths"] = torch.full_like(state["lengths"], p.context - 1)
    state["longest"] = p.context - 1
    full = full_forward(a, p, 60, probes)
    new = (a["query"], a["key"][:, -1:], a["value"][:, -1:], a["query_embedding"])
    for count in (1, 3):
        threads(count)
        cache.load_state_dict(state)
        out, aux = cache.step(*new, a["context_embedding"][:, -1:], top_k=5, return_aux=True)
        for part, whole in zip((out, *aux), full, strict=True):
            assert torch.equal(part, whole)


def test_inclusive_prefill_sees_the_chunk_that_a_token_closes():
    text = make(39, chunk_size=3, top_k=2, cache={"max_length": 40})
    a, sizes = text.p.tensors, {"superchunk_size": 3, "probes": 2}
    # One dummy token moves the queries, which are aligned at the end, on by one.
    context = torch.nn.functional.pad(a["context_embedding"], (0, 0, 0, 0, 0, 1))
    search = (a["query_embedding"], ops.pool_chunks(context, 3), 3, 2, 40)
    expected = ops.retrieve_two_level(*search, **sizes)
    for begin, end in ((0, 2), (2, 3), (3, 20), (20, 39)):
        _, aux = text.cache.prefill(*text.piece(begin, end), **text.settings, inclusive=True)
        assert torch.equal(aux.indices, expected[0][:, begin:end])
        assert torch.equal(aux.scores, expected[1][:, begin:end])


# --- Sizes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "chunk_size", "sizes"),
    [(262144, 2, {}), (262144, 16, {}), (1 << 20, 2, {"probes": 5}), (10, 64, {}), (0, 1, {})],
)
def test_superchunks_by_default_go_by_the_capacity(length, chunk_size, sizes):
    layout = (1, length, 1, 1, 1, 1, chunk_size)
    cache = ChunkCache(*layout, search="two_level", device="meta", **sizes)
    expected, _ = ops._plan_two_level(length, chunk_size, 8, **sizes)
    assert cache.superchunk_size == cache.superchunks.size == expected
    assert cache.superchunks.embedding.shape[1] == length // chunk_size // expected


@pytest.mark.timeout(60, method="thread")
@pytest.mark.parametrize("probes", [None, 2, 2**62])
@pytest.mark.parametrize("size", [1, 9, 16, 2**62])
def test_a_given_size_is_kept(size, probes):
    """Also one that the capacity of eight chunks cannot fill."""
    cache = ChunkCache(
        2, 512, 1, 1, 1, 5, 64, search="two_level", superchunk_size=size, probes=probes
    )
    assert cache.superchunk_size == cache.superchunks.size == size
    assert cache.superchunks.embedding.shape == (2, 8 // size, 1, 5)


@pytest.mark.timeout(60, method="thread")
@pytest.mark.parametrize("size", [None, 3, 2**62])
def test_more_probes_than_chunks(size):
    """The exact search."""
    text = make(chunk_size=2, size=size, probes=2**62)
    text.full = ops.fused_retrieve_attend(**text.p.arguments())
    text.prefill(0, 20)
    for token in range(20, 40):
        text.step(token)
    text.cache.load_state_dict(saved(text.cache))
    text.cache.crop(24)
    text.prefill(24, 40)


def test_probes_of_one_call():
    text = make()
    wide = full_forward(text.p.tensors, text.p, 3, 99)
    text.prefill(0, 20)
    out, aux = text.cache.prefill(*text.piece(20, 30), **text.settings, probes=99)
    for part, whole in zip((out, *aux), wide, strict=True):
        assert torch.equal(part, whole[:, 20:30])
    out, aux = text.cache.step(*text.piece(30, 31), **text.settings, probes=99)
    for part, whole in zip((out, *aux), wide, strict=True):
        assert torch.equal(part, whole[:, 30:31])
    text.step(31)


def test_probes_by_default_go_by_top_k():
    """2 k, where that is above 16."""
    text = make(200, chunk_size=1, size=2, probes=None, top_k=20, batch=1)
    assert torch.equal(text.full[2], full_forward(text.p.tensors, text.p, 2, 40)[2])
    assert not torch.equal(text.full[2], full_forward(text.p.tensors, text.p, 2, 16)[2])
    text.cache.prefill(*text.piece(0, 190), **text.settings)
    for token in range(190, 200):
        step_to_rounding(text, token)


def step_to_rounding(text: Text, token: int) -> None:
    """With many slots and tiny chunks a long forward attends chunk by chunk, a step query by query."""
    out, aux = text.cache.step(*text.piece(token, token + 1), **text.settings)
    whole = [t[:, token : token + 1] for t in text.full]
    assert torch.equal(aux.indices, whole[2]) and torch.equal(aux.scores, whole[3])
    torch.testing.assert_close((out, aux.lse), tuple(whole[:2]))


def test_fewer_slots_than_the_exact_search_where_fewer_chunks_are_searched():
    text = make(64, chunk_size=1, size=4, probes=2, top_k=50)
    for token in range(64):
        step_to_rounding(text, token)
    assert (text.full[2][0, 63, 0] >= 0).sum() == 2 * 4 + 3


def test_an_exact_cache_is_as_it_was():
    text = make()
    plain = make_cache(text.p)
    assert plain.superchunks is None and plain.superchunk_size is None
    assert text.cache.state_dict().keys() == plain.state_dict().keys()
    # B = 2, C = 10 chunks in three superchunks of three, R E = 12, float32.
    assert text.cache.nbytes == plain.nbytes + 2 * 3 * 12 * 4 + 2 * 12 * 4


# --- Errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(search="fast"), 'search: expected "exact" or "two_level", got \'fast\''),
        (dict(search="exact"), 'superchunk_size: expected None with search="exact", got 3'),
        (dict(superchunk_size=0), "superchunk_size: expected None or an int of at least 1, got 0"),
        (dict(probes=1.5), "probes: expected None or an int of at least 1, got 1.5"),
    ],
)
def test_bad_settings(changes, message):
    two_level = {"search": "two_level", "superchunk_size": 3}
    with pytest.raises(ValueError) as error:
        ChunkCache(2, 10, 2, 4, 1, 4, 4, **(two_level | changes))
    assert str(error.value) == f"ChunkCache: {message}"


@pytest.mark.parametrize("method", ["prefill", "step"])
@pytest.mark.parametrize("exact", [True, False])
def test_bad_probes(method, exact):
    text = make()
    cache = make_cache(text.p) if exact else text.cache
    before = snapshot(cache)
    expected = 'None with search="exact", got 7' if exact else "None or at least 1, got 0"
    with pytest.raises(ValueError) as error:
        getattr(cache, method)(*text.piece(0, 1), **text.settings, probes=7 if exact else 0)
    assert str(error.value) == f"ChunkCache.{method}: probes: expected {expected}"
    assert_unchanged(cache, before)


def test_a_step_that_does_not_fit_changes_nothing():
    text = make(chunk_size=1)
    text.prefill(0, 7)
    before, upper = snapshot(text.cache), text.cache.superchunks
    kept = upper.embedding.clone(), upper.sum.clone()
    piece = list(text.piece(7, 8))
    piece[4] = piece[4].half()
    with pytest.raises(RuntimeError, match="resona::decode_step_two_level: context_embedding: exp"):
        text.cache.step(*piece, **text.settings)
    assert_unchanged(text.cache, before)
    assert torch.equal(upper.embedding, kept[0]) and torch.equal(upper.sum, kept[1])
