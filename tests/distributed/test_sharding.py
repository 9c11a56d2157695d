"""DTensor: batch and heads may be split, and nothing has to be gathered for it."""

import pytest
import torch
from dtensor_cases import (
    check_layer,
    check_packed,
    check_prefix,
    check_retrieval,
    check_steps,
    refuse_to_move_caches,
)
from processes import run

from resona_ext.distributed.sharding import RESULTS


@pytest.mark.parametrize("check", [check_retrieval, check_packed, check_prefix, check_steps])
def test_operators_on_dtensors(check, tmp_path):
    for result in run(2, check, folder=tmp_path):
        assert result == ("returned", "equal"), result


def test_a_layer_split_by_heads(tmp_path):
    for result in run(2, check_layer, folder=tmp_path):
        assert result == ("returned", "equal"), result


def test_every_operator_on_tensors_has_a_rule():
    schemas = [s for s in torch._C._jit_get_all_schemas() if s.name.startswith("resona::")]
    on_tensors = {s.name for s in schemas if any("Tensor" in str(a.type) for a in s.arguments)}
    assert on_tensors == {f"resona::{name}" for name in RESULTS}


def test_what_is_written_in_place_is_not_moved(tmp_path):
    for kind, texts, *_ in run(2, refuse_to_move_caches, folder=tmp_path):
        assert kind == "returned", texts
        assert all("what is written in place cannot be moved" in text for text in texts), texts
