"""The layer and its cache with a mesh: as in one process, forward and backward, prompt and steps."""

import pytest
from layer_cases import (
    MISTAKES,
    check_beams,
    check_caches,
    check_layers,
    make_layer_mistakes,
    refuse_planes,
)
from processes import run

ONE_TWO_FOUR = [(ranks, check) for ranks in (1, 2, 4) for check in (check_layers, check_caches)]


@pytest.mark.parametrize("ranks, check", [*ONE_TWO_FOUR, (2, check_beams)])
def test_ranks_agree_with_one_process(ranks, check, tmp_path):
    for result in run(ranks, check, folder=tmp_path):
        assert result == ("returned", {}), result


def test_a_mistake_is_an_error_on_every_rank(tmp_path):
    results = run(2, make_layer_mistakes, folder=tmp_path)
    assert all(kind == "returned" for kind, *_ in results), results
    texts = [value for _, value, *_ in results]
    for name, (_, expected) in MISTAKES.items():
        of_ranks = [text[name] for text in texts]
        assert any(expected in text for text in of_ranks), (name, of_ranks)
        assert "no error" not in of_ranks, (name, of_ranks)


def test_a_mesh_has_one_dimension(tmp_path):
    for kind, texts, *_ in run(2, refuse_planes, folder=tmp_path):
        assert kind == "returned", texts
        assert all('one dimension, as mesh["context"]' in text for text in texts), texts
