"""Selections made offline: what the encoder is asked, what is chosen, and the models that use it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small_models import SETTINGS, logits, make_model, tokens, wake
from torch import Tensor

from resona_ext import PrecomputedRetrieval
from resona_ext.integrations import augment

S = SETTINGS["chunk_size"]


@pytest.fixture(autouse=True)
def _one_thread(threads):
    threads(1)


def counts(texts: list[Tensor]) -> Tensor:
    """An encoder of token ids: how often each occurs."""
    return torch.stack([t.bincount(minlength=61) for t in texts]).float()


class SentenceEncoder:
    """As a sentence transformer: `encode` takes texts and returns an array."""

    def __init__(self):
        self.asked = []

    def encode(self, texts: list[str]) -> np.ndarray:
        self.asked += texts
        return np.array([[text.count(c) for c in "abcdefgh"] for text in texts], np.float32)


def naive(sequence: Tensor, top_k: int, query_tokens: int, stride: int) -> list[list[int]]:
    """Token by token, from the description."""
    length, rows = len(sequence), []
    for t in range(length):
        begin = t // stride * stride
        query = counts([sequence[max(0, begin - query_tokens) : begin]])[0].double()
        scored = []
        for j in range(length // S):
            if (j + 1) * S <= begin - query_tokens:
                chunk = counts([sequence[j * S : (j + 1) * S]])[0].double()
                scored.append((-float(query @ chunk / query.norm() / chunk.norm()), j))
        best = [j for _, j in sorted(scored)[:top_k]]
        rows.append(best + [-1] * (top_k - len(best)))
    return rows


@pytest.mark.parametrize(
    ("length", "query_tokens", "stride"), [(30, 4, 4), (29, 7, 3), (30, 2, 5), (3, 4, 4), (0, 4, 4)]
)
def test_it_chooses_what_the_description_says(length, query_tokens, stride):
    ids = tokens(2, length)
    retrieval = PrecomputedRetrieval(counts, S, 3, query_tokens=query_tokens, stride=stride)
    got = retrieval(ids)
    assert got.shape == (2, length, 1, 3) and got.dtype == torch.int32
    for row, sequence in zip(got, ids, strict=True):
        assert row[:, 0].tolist() == naive(sequence, 3, query_tokens, stride)


def test_nothing_at_or_behind_a_token_has_a_say():
    ids = tokens(1, 40)
    retrieval = PrecomputedRetrieval(counts, S, 2, stride=3, query_tokens=5)
    before = retrieval(ids)
    for t in range(1, 40):
        changed = ids.clone()
        changed[:, t:] = tokens(1, 40 - t)
        assert torch.equal(retrieval(changed)[:, : t + 1], before[:, : t + 1])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(side):
    ids = tokens(1, 22)
    retrieval = PrecomputedRetrieval(counts, S, 2)
    first = 7 if side == "left" else 0
    padded, mask = torch.zeros(2, 29).long(), torch.zeros(2, 29).long()
    padded[0, first : first + 22], mask[0, first : first + 22] = ids[0], 1
    got = retrieval(padded, mask)
    assert torch.equal(got[0, first : first + 22], retrieval(ids)[0])
    got[0, first : first + 22] = -1
    assert (got == -1).all()


def test_packed_sequences():
    ids = tokens(1, 50)
    retrieval = PrecomputedRetrieval(counts, S, 2)
    got = retrieval(ids, cu_seqlens=torch.tensor([0, 21, 21, 50]))
    assert torch.equal(got[:, :21], retrieval(ids[:, :21]))
    assert torch.equal(got[:, 21:], retrieval(ids[:, 21:]))


def test_an_encoder_of_texts():
    encoder = SentenceEncoder()
    ids = torch.tensor([[1, 1, 2, 2, 5, 5, 6, 6, 1, 2, 1, 2, 3, 4, 3, 4]])

    def decode(ids):
        return "".join("abcdefgh"[i] for i in ids)

    retrieval = PrecomputedRetrieval(encoder.encode, S, 1, decode=decode)
    got = retrieval(ids)[0, :, 0, 0].tolist()
    assert encoder.asked == ["bbcc", "ffgg", "bcbc", "dede", "bbcc", "ffgg", "bcbc"]
    assert got == [-1] * 8 + [0] * 4 + [0] * 4


# --- In a model -----------------------------------------------------------------------------------


def augmented(**settings):
    model = make_model()
    wake(augment(model, **(SETTINGS | settings)))
    return model


def test_the_model_attends_to_what_it_is_given():
    model, ids = augmented(), tokens()
    indices = PrecomputedRetrieval(counts, S, 2)(ids)
    searched, given = logits(model, ids), logits(model, ids, resona_indices=indices)
    assert not torch.equal(searched, given)
    assert torch.equal(logits(model, ids), searched)  # only for that forward
    none = logits(model, ids, resona_indices=torch.full_like(indices, -1))
    model._resona_augmentation.remove()
    assert torch.equal(none, logits(model, ids))


def test_left_padded_rows_equal_unpadded():
    model, ids = augmented(), tokens(1, 22)
    retrieval = PrecomputedRetrieval(counts, S, 2)
    padded = torch.nn.functional.pad(ids, (7, 0))
    mask = (padded != 0).long()
    got = logits(model, padded, attention_mask=mask, resona_indices=retrieval(padded, mask))
    expected = logits(model, ids, resona_indices=retrieval(ids))
    torch.testing.assert_close(got[:, 7:], expected, rtol=0, atol=1e-5)


def test_training_with_checkpointing():
    model, ids = augmented().train(), tokens()
    indices = PrecomputedRetrieval(counts, S, 2)(ids)
    results = []
    for _ in range(2):
        model.zero_grad()
        model(ids, labels=ids, resona_indices=indices).loss.backward()
        results.append(model.backbone.layers[0].resona.q_proj.weight.grad.clone())
        model.activation_checkpointing_enable({"use_reentrant": False})
    assert results[0].any()
    torch.testing.assert_close(*results)


# --- Bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"encoder": "MiniLM"}, "encoder: expected a callable, got str"),
        ({"decode": 3}, "decode: expected a callable, got int"),
        ({"chunk_size": 0}, "chunk_size: expected an int of at least 1, got 0"),
        ({"top_k": 1.5}, "top_k: expected an int of at least 1, got 1.5"),
        ({"query_tokens": 0}, "query_tokens: expected an int of at least 1, got 0"),
        ({"stride": -1}, "stride: expected an int of at least 1, got -1"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit(arguments, message):
    with pytest.raises(ValueError) as error:
        PrecomputedRetrieval(**({"encoder": counts, "chunk_size": S, "top_k": 2} | arguments))
    assert str(error.value) == f"PrecomputedRetrieval: {message}"


@pytest.mark.parametrize(
    ("encoder", "arguments", "message"),
    [
        (
            counts,
            {"input_ids": torch.zeros(2, 9)},
            "input_ids: expected integers [B, T], got torch.f",
        ),
        (counts, {"input_ids": torch.zeros(9).long()}, "input_ids: expected integers [B, T], got"),
        (
            counts,
            {"attention_mask": torch.ones(2, 8)},
            "attention_mask: expected [2, 9], got [2, 8]",
        ),
        (
            counts,
            {"attention_mask": torch.tensor([[1] * 9, [1, 0, 1] * 3])},
            "attention_mask: expected no padding between tokens, got a hole in row 1",
        ),
        (counts, {"cu_seqlens": torch.tensor([0, 9])}, "cu_seqlens: expected borders from 0 to 9"),
        (lambda texts: torch.zeros(1, 5), {}, "the result of encoder: expected [8, E], got [1, 5]"),
        (
            lambda texts: torch.full((len(texts), 5), torch.nan),
            {},
            "the result of encoder: expected finite numbers, got NaN or infinity",
        ),
    ],
)
def test_input_that_does_not_fit(encoder, arguments, message):
    with pytest.raises(ValueError) as error:
        PrecomputedRetrieval(encoder, S, 2)(**({"input_ids": tokens(2, 9)} | arguments))
    assert f"PrecomputedRetrieval: {message}" in str(error.value)
