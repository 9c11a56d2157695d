"""The decode cache with a search in two levels: ragged batches, beams, crops, saving, and any mix of them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import Problem
from test_cache import (
    ROWS,
    Model,
    Text,
    assert_unchanged,
    make_cache,
    ragged_pieces,
    saved,
    snapshot,
)
from test_cache_two_level import EXTRAS, assert_superchunks, full_forward, make


@pytest.fixture(autouse=True)
def _one_thread(threads):
    threads(1)


@pytest.mark.parametrize("how", ["right", "left"])
def test_ragged_batch(how):
    text = make(batch=5, chunk_size=2, score_scale=True, sink=True)
    begins = [0] * 5
    for counts in ([14, 14, 0, 17, 2], [3, 0, 15, 1, 1]):
        mask = torch.zeros(5, 17, dtype=torch.long)
        for b, count in enumerate(counts):
            mask[b, 17 - count if how == "left" else 0 :][:count] = 1
        pieces = ragged_pieces(text, counts, begins, 17, how)
        out, aux = text.cache.prefill(*pieces, **text.settings, attention_mask=mask)
        for b, (begin, count) in enumerate(zip(begins, counts, strict=True)):
            own, first = slice(b, b + 1), 17 - count if how == "left" else 0
            part = [t[own, first : first + count] for t in (out, *aux)]
            text.expect((part[0], part[1:]), begin, begin + count, own)
        begins = [b + n for b, n in zip(begins, counts, strict=True)]
        assert_superchunks(text.cache, text.p, begins)
    for _ in range(14):
        pieces = ragged_pieces(text, [1] * 5, begins, 1, "right")
        out, aux = text.cache.step(*pieces, **text.settings)
        for b, begin in enumerate(begins):
            own = slice(b, b + 1)
            text.expect((out[own], [t[own] for t in aux]), begin, begin + 1, own)
        begins = [b + 1 for b in begins]
        assert_superchunks(text.cache, text.p, begins)


def choose(text: Text, index: torch.Tensor) -> None:
    for name in ROWS:
        text.p.tensors[name] = text.p.tensors[name][index]
    text.full = tuple(t[index] for t in text.full)


def test_reorder():
    text = make(batch=4, chunk_size=2)
    text.prefill(0, 23)
    buffers = [text.cache.superchunks.embedding, text.cache.superchunks.sum]
    addresses = [t.data_ptr() for t in buffers]
    beam = torch.tensor([2, 2, 0, 1])
    text.cache.reorder(beam)
    choose(text, beam)
    assert_superchunks(text.cache, text.p, [23] * 4)
    text.step(23)
    text.prefill(24, 40)
    text.cache.reset()
    text.prefill(0, 40)
    now = [text.cache.superchunks.embedding, text.cache.superchunks.sum]
    assert [t.data_ptr() for t in now] == addresses


def test_selected_and_repeated_sequences():
    text = make(batch=3, chunk_size=2)
    text.prefill(0, 23)
    text.cache.batch_repeat_interleave(2)
    text.cache.batch_select_indices(torch.tensor([5, 0, 2, 3]))
    choose(text, torch.tensor([2, 0, 1, 1]))
    assert_superchunks(text.cache, text.p, [23] * 4)
    for token in range(23, 36):
        text.step(token)


@pytest.mark.parametrize("history", [None, 0])
@pytest.mark.parametrize("chunk_size", [1, 3])
def test_crop_to_every_length(chunk_size, history):
    text = make(37, chunk_size=chunk_size, cache={"history": history})
    for keep in range(38):
        text.cache.reset()
        text.prefill(0, 30)
        for token in range(30, 37):
            text.step(token)
        before = snapshot(text.cache)
        sums = text.cache.superchunks.sum.clone()
        try:
            text.cache.crop(keep)
        except ValueError:
            assert keep % chunk_size
            assert_unchanged(text.cache, before)
            assert torch.equal(text.cache.superchunks.sum, sums)
            continue
        assert_superchunks(text.cache, text.p, [keep, keep])
        for token in range(keep, min(keep + 7, 37)):
            text.step(token)
        text.prefill(min(keep + 7, 37), 37)


def test_crop_per_sequence():
    text = make(batch=3, chunk_size=2)
    text.prefill(0, 38)
    text.cache.crop([38, 14, 30])
    assert_superchunks(text.cache, text.p, [38, 14, 30])
    text.cache.crop(-2)
    assert_superchunks(text.cache, text.p, [36, 12, 28])
    text.cache.crop(0)
    text.prefill(0, 40)


@pytest.mark.parametrize("room", [0, 60])
def test_save_and_load(room):
    """A state is that of any cache: exact or in two levels, whatever the size of superchunks."""
    text = make(chunk_size=2, batch=3)
    text.prefill(0, 31)
    text.cache.crop([31, 20, 6])
    state = saved(text.cache)
    assert state.keys() == make_cache(text.p).state_dict().keys()
    text.cache = make_cache(
        text.p, max_length=40 + room, search="two_level", superchunk_size=3, probes=2
    )
    text.cache.load_state_dict(state)
    assert_superchunks(text.cache, text.p, [31, 20, 6])
    exact = make_cache(text.p)
    exact.load_state_dict(state)
    other = make_cache(text.p, search="two_level", superchunk_size=4)
    other.load_state_dict(saved(exact))
    assert_superchunks(other, text.p, [31, 20, 6])
    text.cache.crop(6)
    for token in range(6, 40):
        text.step(token)


def test_a_state_that_does_not_fit_changes_nothing():
    text = make(chunk_size=2)
    text.prefill(0, 31)
    before, upper = snapshot(text.cache), text.cache.superchunks
    kept = upper.embedding.clone(), upper.sum.clone()
    with pytest.raises(ValueError, match="chunk_size: expected 2, got 3"):
        text.cache.load_state_dict({**text.cache.state_dict(), "chunk_size": 3})
    assert_unchanged(text.cache, before)
    assert torch.equal(upper.embedding, kept[0]) and torch.equal(upper.sum, kept[1])


class TwoLevelModel(Model):
    def last(self, b: int, count: int) -> tuple:
        if not count:
            return ()
        rows = [torch.stack(t).unsqueeze(0) for t in zip(*self.tokens[b], strict=True)]
        rows[0], rows[3] = rows[0][:, -count:], rows[3][:, -count:]
        extras = {name: self.p.tensors[name] for name in EXTRAS}
        tensors = dict(zip(ROWS, rows, strict=True)) | extras
        return full_forward(tensors, self.p, *self.sizes)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_any_sequence_of_operations(data):
    draw = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    torch.manual_seed(draw(0, 2**20))
    p = Problem(
        batch=draw(1, 3),
        queries=1,
        context=60,
        head_dim=4,
        retrieval_dim=5,
        chunk_size=data.draw(st.sampled_from([1, 2, 3])),
        top_k=draw(1, 4),
        score_scale=data.draw(st.booleans()),
    )
    model = TwoLevelModel(p)
    model.sizes = (draw(1, 6), draw(1, 4))
    two_level = {"search": "two_level", "superchunk_size": model.sizes[0]}
    cache = make_cache(p, **two_level, probes=model.sizes[1])
    text = Text(p, cache, ())
    kinds = st.sampled_from(["step", "prefill", "prefill", "crop", "reorder", "select", "load"])
    for kind in data.draw(st.lists(kinds, min_size=4, max_size=14)):
        batch = cache.batch
        if kind in ("step", "prefill"):
            rows = 1 if kind == "step" else draw(0, 25)
            counts = [1] * batch
            if kind == "prefill":
                counts = [draw(0, rows) for _ in range(batch)]
            pieces = [torch.randn(batch, rows, *p.tensors[name].shape[2:]) for name in ROWS]
            form = {} if kind == "step" else {"lengths": counts}
            if max(len(t) + n for t, n in zip(model.tokens, counts, strict=True)) > 60:
                with pytest.raises(ValueError, match="at most max_length = 60"):
                    getattr(cache, kind)(*pieces, **text.settings, **form)
                continue
            out, aux = getattr(cache, kind)(*pieces, **text.settings, **form)
            for b, expected in enumerate(model.append(pieces, counts)):
                for part, whole in zip((out, *aux), expected, strict=False):
                    assert torch.equal(part[b : b + 1, : counts[b]], whole)
        elif kind == "crop":
            keep = draw(-12, 60)
            try:
                cache.crop(keep)
            except ValueError:
                continue
            for tokens in model.tokens:
                del tokens[max(0, len(tokens) + keep) if keep < 0 else keep :]
        elif kind == "load":
            state = saved(cache)
            cache = make_cache(p, batch=batch, **two_level, probes=model.sizes[1])
            cache.load_state_dict(state)
        else:
            index = [draw(0, batch - 1) for _ in range(batch if kind == "reorder" else 2)]
            move = cache.reorder if kind == "reorder" else cache.batch_select_indices
            move(torch.tensor(index))
            model.tokens = [list(model.tokens[i]) for i in index]
