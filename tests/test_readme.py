"""The README's examples run as they stand."""

import re
from pathlib import Path

import pytest
import torch

README = (Path(__file__).parents[1] / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.S)


def test_there_are_two_examples():
    assert len(EXAMPLES) == 2


@pytest.mark.parametrize("example", EXAMPLES, ids=["operator", "layer"])
def test_example(example, capsys):
    names = {}
    exec(compile(example, "README.md", "exec"), names)
    if "Block" in names:
        block = names["Block"](torch.nn.Linear(32, 32), 32)
        x = torch.randn(1, 200, 32)
        assert block(x, x).shape == x.shape
    else:
        assert "torch.Size([1, 4096, 8, 64])" in capsys.readouterr().out
        assert names["query"].grad is not None


def test_the_operator_example_is_short():
    assert len(EXAMPLES[0].strip().splitlines()) <= 20


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (Path(__file__).parents[1] / target).exists(), target
