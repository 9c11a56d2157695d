"""Planted mistakes that AddressSanitizer and UndefinedBehaviorSanitizer must find; their twins pass."""

import re

import numpy as np
import pytest
import sanitized
from cases import Case
from harness import SCHEDULES

SOURCE = np.arange(3, 67, dtype=np.uint32)
TILES = np.arange(256, dtype=np.uint32)  # four of 64
CAUGHT = {
    "row_out_of_bounds": (SOURCE, "heap-buffer-overflow"),
    "shared_out_of_bounds": (SOURCE, "use-after-poison"),
    "local_out_of_bounds": (SOURCE, "stack-buffer-overflow|out of bounds for type"),
    "misaligned_pointer": (SOURCE[:2], "misaligned address"),
    "deadlock": (SOURCE, "deadlock: no thread can go on"),
    "missing_wait": (SOURCE, "differ, the first at"),
    "missing_trailing_barrier": (TILES.reshape(4, 64)[:, ::-1].ravel(), "differ, the first at"),
    "stack_overflow": (SOURCE, "stack-overflow"),
}


def planted(kernel: str, bug: int) -> Case:
    expected = CAUGHT[kernel][0]
    source = TILES if kernel == "missing_trailing_barrier" else SOURCE
    return Case(
        name=f"{kernel}-{bug}",
        kernel=kernel,
        inputs={"in": source},
        expected={"out": expected},
        scalars={"blocks": 1, "bug": bug},
    )


@pytest.fixture(scope="module")
def outcomes():
    return sanitized.run([(planted(k, bug), SCHEDULES[:6]) for k in CAUGHT for bug in (0, 1)])


@pytest.mark.parametrize("kernel", CAUGHT)
def test_planted(outcomes, kernel):
    assert outcomes[f"{kernel}-0"] == ""
    assert re.search(CAUGHT[kernel][1], outcomes[f"{kernel}-1"]), outcomes[f"{kernel}-1"][-2000:]
