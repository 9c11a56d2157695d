"""The decode cache: prefill in pieces and single steps against one full forward over all tokens."""

from __future__ import annotations

import copy
import io
import itertools
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import ALL_DTYPES, Problem, embeddings, name_of

from resona_ext import ChunkCache

ops = torch.ops.resona
ROWS = ("query", "key", "value", "query_embedding", "context_embedding")
BUFFERS = (
    "key",
    "value",
    "chunk_embedding",
    "open_sum",
    "history",
    "carry",
    "lengths",
    "history_start",
)


@pytest.fixture(autouse=True)
def _one_thread(threads):
    threads(1)


@dataclass
class Text:
    """Tokens of a batch, a cache for them, and what a full forward over all of them gives."""

    p: Problem
    cache: ChunkCache
    full: tuple

    def piece(self, begin: int, end: int, rows: slice = slice(None)) -> tuple:
        return tuple(self.p.tensors[name][rows, begin:end] for name in ROWS)

    @property
    def settings(self) -> dict:
        tensors = self.p.tensors
        return {
            "top_k": self.p.top_k,
            "score_scale": tensors["score_scale"],
            "sink": tensors["sink"],
            "return_aux": True,
        }

    def expect(self, got: tuple, begin: int, end: int, rows: slice = slice(None)) -> None:
        """On the CPU a step runs the arithmetic of the full forward, so the bits are the same."""
        out, aux = got
        for part, whole in zip((out, *aux), self.full, strict=True):
            assert torch.equal(part, whole[rows, begin:end])

    def prefill(self, begin: int, end: int) -> None:
        self.expect(self.cache.prefill(*self.piece(begin, end), **self.settings), begin, end)

    def step(self, token: int) -> None:
        got = self.cache.step(*self.piece(token, token + 1), **self.settings)
        self.expect(got, token, token + 1)


def make_cache(p: Problem, **changes) -> ChunkCache:
    arguments = dict(
        batch=p.batch,
        max_length=p.context,
        num_kv_heads=p.kv_heads,
        head_dim=p.head_dim,
        retrieval_heads=p.retrieval_heads,
        retrieval_dim=p.retrieval_dim,
        chunk_size=p.chunk_size,
        dtype=p.dtype,
        embedding_dtype=p.embedding_dtype,
    )
    return ChunkCache(**{**arguments, **changes})


def make(length: int = 22, contents: str | None = None, cache: dict | None = None, **options):
    p = Problem(queries=length, context=length, **options)
    if contents is not None:
        shape = (p.batch, length, p.retrieval_heads, p.retrieval_dim)
        p.tensors["context_embedding"] = embeddings(contents, *shape, p.embedding_dtype or p.dtype)
        p.tensors["query_embedding"] = p.tensors["context_embedding"].flip(1)
    full = ops.fused_retrieve_attend(**p.arguments())
    return Text(p, make_cache(p, **(cache or {})), full)


def snapshot(cache: ChunkCache) -> dict:
    state = {name: getattr(cache, name).clone() for name in BUFFERS}
    return {**state, "longest": cache.get_seq_length()}


def assert_unchanged(cache: ChunkCache, before: dict) -> None:
    assert cache.get_seq_length() == before["longest"]
    for name in BUFFERS:
        assert torch.equal(getattr(cache, name), before[name]), name


SHAPES = {
    "S 1": dict(chunk_size=1, top_k=3),
    "S 2": dict(chunk_size=2, top_k=1, heads=6, kv_heads=2, retrieval_heads=2),
    "S 3": dict(chunk_size=3, top_k=2, score_scale=True, sink=True),
    "S 5": dict(chunk_size=5, top_k=9, heads=4, kv_heads=4, retrieval_heads=4, score_scale=True),
    "S 8": dict(chunk_size=8, top_k=2, sink=True, head_dim=7, retrieval_dim=9),
    "S 30": dict(chunk_size=30, top_k=2, sink=True),
}


# --- A full forward equals its parts -------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_prefill_to_every_split_point_then_steps(shape):
    text = make(**SHAPES[shape])
    for split in range(text.p.context + 1):
        text.cache.reset()
        text.prefill(0, split)
        for token in range(split, text.p.context):
            text.step(token)
    assert text.cache.lengths.tolist() == [22, 22]
    chunks = ops.pool_chunks(text.p.tensors["context_embedding"], text.p.chunk_size)
    assert torch.equal(text.cache.chunk_embedding, chunks)


@pytest.mark.parametrize("shape", ["S 1", "S 3", "S 5"])
def test_prefill_in_three_pieces(shape):
    text = make(17, **SHAPES[shape])
    for cuts in itertools.combinations_with_replacement(range(18), 2):
        text.cache.reset()
        for begin, end in itertools.pairwise((0, *cuts, 17)):
            text.prefill(begin, end)


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=name_of)
@pytest.mark.parametrize("embedding_dtype", ALL_DTYPES, ids=name_of)
def test_dtypes(dtype, embedding_dtype):
    text = make(dtype=dtype, embedding_dtype=embedding_dtype, score_scale=True, sink=True)
    text.prefill(0, 6)
    for token in range(6, 13):
        text.step(token)
    text.prefill(13, 22)


@pytest.mark.parametrize("contents", ["repeated", "permuted", "zipf", "two_letters"])
def test_ties(contents):
    text = make(60, contents, chunk_size=4, top_k=3, dtype=torch.bfloat16)
    text.prefill(0, 9)
    for token in range(9, 60):
        text.step(token)


def test_nan_and_zero_embeddings():
    p = Problem(queries=22, context=22, chunk_size=2, top_k=4)
    p.tensors["context_embedding"][:, 4:8] = torch.nan
    p.tensors["context_embedding"][:, 12:14] = 0
    p.tensors["query_embedding"][:, 15] = 0
    indices, scores = ops.fused_retrieve_attend(**p.arguments())[2:]
    cache = make_cache(p)
    for token in range(22):
        piece = (p.tensors[name][:, token : token + 1] for name in ROWS)
        _, aux = cache.step(*piece, top_k=4, return_aux=True)
        assert torch.equal(aux.indices, indices[:, token : token + 1])
        assert torch.equal(aux.scores.isnan(), scores[:, token : token + 1].isnan())


def test_a_long_search_gives_the_same_with_any_number_of_threads(threads):
    p = Problem(batch=1, queries=1, context=20_000, retrieval_dim=128, chunk_size=1, top_k=5)
    a = p.tensors
    a["context_embedding"] = embeddings("zipf", 1, p.context, 1, 128, torch.float32)
    cache = make_cache(p)
    with torch.no_grad():
        cache.chunk_embedding.copy_(ops.pool_chunks(a["context_embedding"], 1))
        cache.key.copy_(a["key"])
        cache.value.copy_(a["value"])
    full = ops.fused_retrieve_attend(**p.arguments())
    last = (a["query"], a["key"][:, -1:], a["value"][:, -1:], a["query_embedding"])
    for count in (1, 3):
        threads(count)
        cache.lengths.fill_(p.context - 1)
        cache._longest = p.context - 1
        out, aux = cache.step(*last, a["context_embedding"][:, -1:], top_k=5, return_aux=True)
        for part, whole in zip((out, *aux), full, strict=True):
            assert torch.equal(part, whole)


def test_embeddings_without_a_head_dimension():
    text = make(chunk_size=3)
    *rows, query_embedding, context_embedding = text.piece(0, 21)
    got = text.cache.prefill(
        *rows, query_embedding[:, :, 0], context_embedding[:, :, 0], **text.settings
    )
    text.expect(got, 0, 21)
    *rows, query_embedding, context_embedding = text.piece(21, 22)
    got = text.cache.step(
        *rows, query_embedding[:, :, 0], context_embedding[:, :, 0], **text.settings
    )
    text.expect(got, 21, 22)


def test_inclusive_prefill_sees_the_chunk_that_a_token_closes():
    text = make(21, chunk_size=3, top_k=2, cache={"max_length": 22})
    a = text.p.tensors
    # One dummy token moves the queries, which are aligned at the end, on by one.
    context = torch.nn.functional.pad(a["context_embedding"], (0, 0, 0, 0, 0, 1))
    expected = ops.retrieve(a["query_embedding"], ops.pool_chunks(context, 3), 3, 2, 22)
    for begin, end in ((0, 2), (2, 3), (3, 10), (10, 21)):
        _, aux = text.cache.prefill(*text.piece(begin, end), **text.settings, inclusive=True)
        assert torch.equal(aux.indices, expected[0][:, begin:end])
        assert torch.equal(aux.scores, expected[1][:, begin:end])
    with pytest.raises(ValueError, match=r"at most max_length = 22 .* got 23"):
        text.cache.prefill(*text.piece(0, 1), **text.settings, inclusive=True)


# --- Ragged batches ------------------------------------------------------------------------------


def ragged_pieces(texts: Text, counts: list[int], begins: list[int], rows: int, side: str):
    """Row b holds tokens [begins[b], begins[b] + counts[b]), garbage around them."""
    pieces = []
    for name in ROWS:
        t = texts.p.tensors[name]
        padded = torch.full((t.shape[0], rows, *t.shape[2:]), 1e3, dtype=t.dtype)
        for b, (begin, count) in enumerate(zip(begins, counts, strict=True)):
            first = rows - count if side == "left" else 0
            padded[b, first : first + count] = t[b, begin : begin + count]
        pieces.append(padded)
    return pieces


@pytest.mark.parametrize("how", ["lengths", "right", "left"])
def test_ragged_batch(how):
    text = make(batch=5, chunk_size=3, score_scale=True, sink=True)
    begins = [0] * 5
    for counts in ([4, 4, 0, 7, 2], [3, 0, 5, 1, 1]):
        rows = 7
        side = "left" if how == "left" else "right"
        mask = torch.zeros(5, rows, dtype=torch.long)
        for b, count in enumerate(counts):
            mask[b, rows - count if side == "left" else 0 :][:count] = 1
        form = {"lengths": torch.tensor(counts)} if how == "lengths" else {"attention_mask": mask}
        pieces = ragged_pieces(text, counts, begins, rows, side)
        out, aux = text.cache.prefill(*pieces, **text.settings, **form)
        for b, (begin, count) in enumerate(zip(begins, counts, strict=True)):
            own, first = slice(b, b + 1), rows - count if side == "left" else 0
            part = [t[own, first : first + count] for t in (out, *aux)]
            text.expect((part[0], part[1:]), begin, begin + count, own)
        assert not out[mask == 0].any()
        assert (aux.indices[mask == 0] == -1).all()
        begins = [b + n for b, n in zip(begins, counts, strict=True)]
        assert text.cache.lengths.tolist() == begins
    for _ in range(10):
        pieces = ragged_pieces(text, [1] * 5, begins, 1, "right")
        out, aux = text.cache.step(*pieces, **text.settings)
        for b, begin in enumerate(begins):
            own = slice(b, b + 1)
            text.expect((out[own], [t[own] for t in aux]), begin, begin + 1, own)
        begins = [b + 1 for b in begins]
    assert text.cache.get_seq_length() == max(begins)


# --- Beams, crops, saving ------------------------------------------------------------------------


def test_reorder():
    text = make(batch=4, chunk_size=3)
    text.prefill(0, 11)
    addresses = [getattr(text.cache, name).data_ptr() for name in BUFFERS]
    beam = torch.tensor([2, 2, 0, 1])
    text.cache.reorder(beam)
    assert [getattr(text.cache, name).data_ptr() for name in BUFFERS] == addresses
    for name in ROWS:
        text.p.tensors[name] = text.p.tensors[name][beam]
    text.full = tuple(t[beam] for t in text.full)
    text.step(11)
    text.prefill(12, 22)


def test_selected_and_repeated_sequences():
    text = make(batch=3, chunk_size=3)
    text.prefill(0, 10)
    text.cache.batch_repeat_interleave(2)
    text.cache.batch_select_indices(torch.tensor([5, 0, 2, 3]))
    chosen = torch.tensor([2, 0, 1, 1])
    for name in ROWS:
        text.p.tensors[name] = text.p.tensors[name][chosen]
    text.full = tuple(t[chosen] for t in text.full)
    assert text.cache.batch == 4
    for token in range(10, 15):
        text.step(token)


@pytest.mark.parametrize("history", [None, 0, 4, 100])
@pytest.mark.parametrize("size", [1, 3, 4])
def test_crop_to_every_length(size, history):
    text = make(19, chunk_size=size, cache={"history": history})
    reach = 2 * size if history is None else history
    for keep in range(20):
        text.cache.reset()
        text.prefill(0, 15)
        for token in range(15, 19):
            text.step(token)
        before = snapshot(text.cache)
        if keep % size and keep // size * size < 19 - reach and keep < 19:
            with pytest.raises(
                ValueError, match=r"crop: length: expected a multiple of chunk_size"
            ):
                text.cache.crop(keep)
            assert_unchanged(text.cache, before)
            continue
        text.cache.crop(keep)
        assert text.cache.lengths.tolist() == [keep, keep]
        for token in range(keep, min(keep + 2 * size, 19)):
            text.step(token)
        text.prefill(min(keep + 2 * size, 19), 19)


def test_a_second_crop_knows_what_the_first_overwrote():
    text = make(20, chunk_size=4)  # history 8
    text.prefill(0, 20)
    text.cache.crop(14)  # tokens 12 and 13 are left of the window
    with pytest.raises(ValueError, match="at least 12, where the history of sequence 0"):
        text.cache.crop(11)
    text.cache.crop(13)
    text.cache.crop(8)  # a border; nothing of the window is left
    text.step(8)
    text.step(9)
    text.cache.crop(9)
    with pytest.raises(ValueError, match="at least 8"):
        text.cache.crop(7)
    text.prefill(9, 20)


def test_crop_per_sequence_and_from_the_end():
    text = make(20, batch=3, chunk_size=4)
    text.prefill(0, 18)
    text.cache.crop([18, 16, 30])
    assert text.cache.lengths.tolist() == [18, 16, 18]
    text.cache.crop(-2)
    assert text.cache.lengths.tolist() == [16, 14, 16]
    assert text.cache.get_seq_length() == 16
    text.cache.crop([16, 12, 16])
    text.cache.crop(12)
    text.prefill(12, 20)
    text.cache.crop(-100)
    assert text.cache.get_seq_length() == 0
    text.prefill(0, 20)


def saved(cache: ChunkCache) -> dict:
    file = io.BytesIO()
    torch.save(cache.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("room", [0, 30])
def test_save_and_load(room):
    text = make(cache={"carry_rows": 1, "carry_dim": 3}, chunk_size=3)
    carry = torch.randn(2, 22, 3)
    for begin, end in ((0, 9), (9, 13)):
        rows = carry[:, begin:end]
        got = text.cache.prefill(*text.piece(begin, end), **text.settings, carry=rows)
        text.expect(got, begin, end)
    state = saved(text.cache)
    text.cache = make_cache(text.p, max_length=22 + room, carry_rows=1, carry_dim=3)
    text.cache.load_state_dict(state)
    assert torch.equal(text.cache.carried(), carry[:, 12:13])
    got = text.cache.step(*text.piece(13, 14), **text.settings, carry=carry[:, 13:14])
    text.expect(got, 13, 14)
    text.cache.crop(12)
    assert torch.equal(text.cache.carried(), carry[:, 11:12])


def test_a_state_holds_no_more_than_is_in_use():
    text = make(cache={"max_length": 10_000})
    text.prefill(0, 3)
    state = text.cache.state_dict()
    assert state["key"].shape[1] == 3 and state["key"].untyped_storage().nbytes() < 10_000
    assert all(isinstance(v, int | torch.Tensor) for v in state.values())


def test_deepcopy_is_independent():
    text = make(chunk_size=3)
    text.prefill(0, 10)
    twin = copy.deepcopy(text.cache)
    text.prefill(10, 22)
    text.cache = twin
    for token in range(10, 22):
        text.step(token)


def test_carried_rows():
    text = make(cache={"carry_rows": 3, "carry_dim": 2}, chunk_size=4)
    carry = torch.randn(2, 22, 2)
    padded = torch.nn.functional.pad(carry, (0, 0, 3, 0))
    at = 0
    for count in (1, 1, 3, 7, 1, 9):
        assert torch.equal(text.cache.carried(), padded[:, at : at + 3])
        append = text.cache.step if count == 1 else text.cache.prefill
        piece = text.piece(at, at + count)
        append(*piece, top_k=2, carry=carry[:, at : at + count])
        at += count
    text.cache.crop(17)
    assert torch.equal(text.cache.carried(), carry[:, 14:17])
    with pytest.raises(ValueError, match="crop: length: expected at least 14"):
        text.cache.crop(12)
    text.cache.reset()
    assert not text.cache.carried().any()


# --- Any sequence of operations ------------------------------------------------------------------


class Model:
    """The cache as lists of tokens: every output is computed from scratch."""

    def __init__(self, p: Problem) -> None:
        self.p = p
        self.tokens: list[list[tuple]] = [[] for _ in range(p.batch)]

    def append(self, pieces: list, counts: list[int]) -> list[tuple]:
        for b, count in enumerate(counts):
            self.tokens[b] += [tuple(t[b, i] for t in pieces) for i in range(count)]
        return [self.last(b, count) for b, count in enumerate(counts)]

    def last(self, b: int, count: int) -> tuple:
        if not count:
            return ()
        rows = [torch.stack(t).unsqueeze(0) for t in zip(*self.tokens[b], strict=True)]
        rows[0], rows[3] = rows[0][:, -count:], rows[3][:, -count:]
        a = self.p.tensors
        extras = (self.p.chunk_size, self.p.top_k, a["score_scale"], a["sink"])
        return ops.fused_retrieve_attend(*rows, *extras)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_any_sequence_of_operations(data):
    torch.manual_seed(data.draw(st.integers(0, 2**20)))
    p = Problem(
        batch=data.draw(st.integers(1, 3)),
        queries=1,
        context=40,
        head_dim=4,
        retrieval_dim=5,
        chunk_size=data.draw(st.sampled_from([1, 2, 3, 5, 8])),
        top_k=data.draw(st.integers(1, 4)),
        score_scale=data.draw(st.booleans()),
        sink=data.draw(st.booleans()),
    )
    cache, model = make_cache(p), Model(p)
    text = Text(p, cache, ())
    kinds = st.sampled_from(
        ["step", "step", "prefill", "prefill", "crop", "reorder", "reset", "load"]
    )
    for kind in data.draw(st.lists(kinds, min_size=4, max_size=14)):
        before = snapshot(cache)
        if kind in ("step", "prefill"):
            rows = 1 if kind == "step" else data.draw(st.integers(0, 14))
            counts = [1] * p.batch
            if kind == "prefill":
                counts = data.draw(
                    st.lists(st.integers(0, rows), min_size=p.batch, max_size=p.batch)
                )
            pieces = [torch.randn(p.batch, rows, *p.tensors[name].shape[2:]) for name in ROWS]
            form = {} if kind == "step" else {"lengths": counts}
            if max(len(t) + n for t, n in zip(model.tokens, counts, strict=True)) > 40:
                with pytest.raises(ValueError, match="at most max_length = 40"):
                    getattr(cache, kind)(*pieces, **text.settings, **form)
                assert_unchanged(cache, before)
                continue
            out, aux = getattr(cache, kind)(*pieces, **text.settings, **form)
            for b, expected in enumerate(model.append(pieces, counts)):
                for part, whole in zip((out, *aux), expected, strict=False):
                    assert torch.equal(part[b : b + 1, : counts[b]], whole)
        elif kind == "crop":
            keep = data.draw(st.integers(-12, 40))
            try:
                cache.crop(keep)
            except ValueError:
                assert_unchanged(cache, before)
            else:
                for tokens in model.tokens:
                    del tokens[max(0, len(tokens) + keep) if keep < 0 else keep :]
        elif kind == "reorder":
            index = data.draw(
                st.lists(st.integers(0, p.batch - 1), min_size=p.batch, max_size=p.batch)
            )
            cache.reorder(torch.tensor(index))
            model.tokens = [list(model.tokens[i]) for i in index]
        elif kind == "reset":
            cache.reset()
            model.tokens = [[] for _ in range(p.batch)]
        else:
            state = saved(cache)
            cache = text.cache = make_cache(p)
            cache.load_state_dict(state)
        assert cache.lengths.tolist() == [len(t) for t in model.tokens]
        assert cache.get_seq_length() == max(map(len, model.tokens))
