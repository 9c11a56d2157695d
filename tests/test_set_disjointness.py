"""Set disjointness: what its description promises, on many rows."""

import pytest
import torch

from benchmarks.recall.tasks import make_task
from benchmarks.recall.tasks.set_disjointness import ANSWER, BEGIN, FIRST_WORD, SEPARATOR

ROWS = 3000


def draw(first: int, second: int, vocabulary: int = 64, seed: int = 0):
    task = make_task(
        dict(name="set-disjointness", vocabulary=vocabulary, first=first, second=second)
    )
    return task.generate(ROWS, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("first, second", [(4, 16), (16, 4), (1, 1), (30, 30)])
def test_rows_are_as_described(first, second):
    tokens, labels, targets = draw(first, second)
    assert tokens.shape == (ROWS, first + second + 3) and torch.equal(labels, targets)
    a, b = tokens[:, 1 : 1 + first], tokens[:, 2 + first : -1]
    for column, token in ((0, BEGIN), (1 + first, SEPARATOR), (-1, ANSWER)):
        assert (tokens[:, column] == token).all()
    words = torch.cat([a, b], dim=1)
    assert words.min() >= FIRST_WORD and words.max() < 64
    for part in (a, b):  # no token twice within a list
        ordered = part.sort(dim=1).values
        assert (ordered[:, 1:] != ordered[:, :-1]).all()
    common = a[:, :, None] == b[:, None, :]
    assert (common.sum(dim=(1, 2)) == 1).all()
    answer = (a * common.any(dim=2)).sum(dim=1)
    assert torch.equal(labels[:, -1], answer) and (labels[:, :-1] == -100).all()


def test_the_answer_is_anywhere_and_anything():
    """Chi-squared against uniform, below its 0.999 quantile; the draw is fixed."""
    tokens, labels, _ = draw(6, 10)
    a, b = tokens[:, 1:7], tokens[:, 8:-1]
    answer = labels[:, -1:]
    for values, kinds, limit in (
        ((a == answer).int().argmax(1), 6, 20.5),
        ((b == answer).int().argmax(1), 10, 27.9),
        (answer[:, 0] - FIRST_WORD, 60, 98.3),
        (a[:, 0] - FIRST_WORD, 60, 98.3),
        (b[:, 3] - FIRST_WORD, 60, 98.3),
    ):
        counts = torch.bincount(values, minlength=kinds).double()
        expected = ROWS / kinds
        assert ((counts - expected) ** 2 / expected).sum() < limit


def test_seeds():
    assert torch.equal(draw(4, 8).tokens, draw(4, 8).tokens)
    assert not torch.equal(draw(4, 8).tokens, draw(4, 8, seed=1).tokens)


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(first=0), "first: expected >= 1"),
        (dict(second=0), "second: expected >= 1"),
        (dict(vocabulary=20, first=9, second=8), "vocabulary: expected >= 21, got 20"),
        (dict(length=9, first=4, second=4), "length: expected 0 or first"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=f"set-disjointness: {message}"):
        make_task(dict(name="set-disjointness", **settings))
