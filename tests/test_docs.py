"""The examples of docs (add-resona.md, decode.md, two-level.md) run as they stand, one after another."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
EXAMPLES = re.findall(r"```python\n(.*?)```", (DOCS / "add-resona.md").read_text(), re.S)


def test_add_resona(tmp_path, monkeypatch, threads, capsys):
    pytest.importorskip("transformers", reason="transformers 5.23 wants Python >= 3.11")
    threads(1)
    monkeypatch.chdir(tmp_path)
    names = {}
    for i, example in enumerate(EXAMPLES):
        exec(compile(example, f"add-resona.md, example {i}", "exec"), names)
    told = "['backbone.layers.0', 'backbone.layers.2', 'backbone.layers.3']"
    assert told in capsys.readouterr().out and told in EXAMPLES[0]
    assert names["greedy"].shape == names["beams"].shape == (2, 308)
    assert names["indices"].shape == (2, 512, 1, 8) and names["loss"].isfinite()


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#:]+)\)", (DOCS / "add-resona.md").read_text()):
        assert (DOCS / target).exists(), target


def test_two_level(capsys):
    (example,) = re.findall(r"```python\n(.*?)```", (DOCS / "two-level.md").read_text(), re.S)
    exec(compile(example, "two-level.md", "exec"), {})
    assert "SearchRecall(recall=" in capsys.readouterr().out


def test_decode(threads):
    threads(1)
    examples = re.findall(r"```python\n(.*?)```", (DOCS / "decode.md").read_text(), re.S)
    names = {}
    for i, example in enumerate(examples):
        exec(compile(example, f"decode.md, example {i}", "exec"), names)
    assert names["cache"].search == "two_level"
