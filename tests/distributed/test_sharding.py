"""DTensor: batch and heads may be split, and nothing has to be gathered for it."""

import pytest
from dtensor_cases import (
    check_packed,
    check_prefix,
    check_retrieval,
    check_steps,
    refuse_to_move_caches,
)
from processes import run


@pytest.mark.parametrize("check", [check_retrieval, check_packed, check_prefix, check_steps])
def test_operators_on_dtensors(check, tmp_path):
    for result in run(2, check, folder=tmp_path):
        assert result == ("returned", "equal"), result


def test_every_public_operator_has_a_rule():
    import torch

    from resona_ext.distributed.sharding import RESULTS

    schemas = [s for s in torch._C._jit_get_all_schemas() if s.name.startswith("resona::")]
    public = {s.name.removeprefix("resona::") for s in schemas}
    without_tensors = {"_build_info", "_cpu_stage_times", "_plan_two_level"}
    assert public - set(RESULTS) == without_tensors


def test_what_is_written_in_place_is_not_moved(tmp_path):
    for kind, texts, *_ in run(2, refuse_to_move_caches, folder=tmp_path):
        assert kind == "returned", texts
        assert all("what is written in place cannot be moved" in text for text in texts), texts
