"""What has to happen where a kernel has a mistake planted in it (harness.mutant)."""

import pytest
from harness import Simulator

REPORTS = r"race: |nobody has written|in flight|without griddepcontrol_wait"


def reported(sim: Simulator):
    """Around runs of a mutant of the race build: one of them is reported."""
    return pytest.raises(sim.Error, match=REPORTS)
