"""What the operators ask of the memory that they write to."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from resona_ext.ops import resona as ops

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def flags_at(address: int) -> list[str]:
    """The kernel's flags of the mapping that holds this address."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if borders := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(borders[1], 16) <= address < int(borders[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    raise AssertionError(f"no mapping holds {address:#x}")


@pytest.mark.skipif(not HUGE_PAGES.exists(), reason="no transparent huge pages on this system")
@pytest.mark.parametrize("tokens, asked", [(16384, True), (64, False)])
def test_large_results_are_written_to_huge_pages(tokens, asked):
    """In a process of its own: memory that an allocator keeps from a large result stays marked."""
    answer = subprocess.check_output([sys.executable, __file__, str(tokens)], text=True)
    assert answer.split()[-1] == str(asked)


def asks_for_huge_pages(tokens: int) -> bool:
    query = torch.zeros(1, tokens, 8, 128)
    key = value = torch.zeros(1, tokens, 1, 128)
    indices = torch.full((1, tokens, 1, 1), -1, dtype=torch.int32)
    out, _ = ops.attend(query, key, value, indices, 64)
    assert not out.any()
    return "hg" in flags_at(out.data_ptr() + out.numel() * 2)


if __name__ == "__main__":
    print(asks_for_huge_pages(int(sys.argv[1])))
