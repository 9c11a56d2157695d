"""DTensor: batch and heads may be split, and nothing has to be gathered for it."""

from dtensor_cases import check_dtensors
from processes import run


def test_operator_on_dtensors(tmp_path):
    for result in run(2, check_dtensors, folder=tmp_path):
        assert result == ("returned", "equal"), result
