"""Training steps over processes: the outputs and gradients of one process."""

import pytest
from model_cases import check_augmented, check_plane, check_wrapped
from processes import run


@pytest.mark.parametrize("ranks, check", [(2, check_wrapped), (4, check_plane)])
def test_wrapped_models(ranks, check, tmp_path):
    for result in run(ranks, check, folder=tmp_path):
        assert result == ("returned", "equal"), result


def test_an_augmented_model(tmp_path):
    pytest.importorskip("transformers", reason="transformers 5.23 wants Python >= 3.11")
    for result in run(2, check_augmented, folder=tmp_path):
        assert result == ("returned", "equal"), result
