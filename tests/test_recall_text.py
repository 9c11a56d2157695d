"""Language modelling on files: WikiText-style text in, perplexity out."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.recall import __main__ as cli
from benchmarks.recall import store, train
from benchmarks.recall.config import make_cell
from benchmarks.recall.tasks import make_task
from benchmarks.recall.tasks.text import END_OF_LINE, UNKNOWN, encode, read_lines

FOLDER = Path(__file__).parent / "data" / "wikitext"
FILES = {"train": str(FOLDER / "train.txt"), "test": str(FOLDER / "test.txt")}


@pytest.fixture(autouse=True)
def one_thread():
    """Models this small only lose by threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def text(**settings):
    return make_task({"name": "text", "vocabulary": 100, "length": 8, **FILES, **settings})


def test_a_word_is_a_token_and_rare_ones_are_unknown():
    ids = encode(FILES["test"], FILES["train"], "", 100)
    words = (FOLDER / "test.txt").read_text().split()
    lines = 3
    assert len(ids) == len(words) + lines and (ids == END_OF_LINE).sum() == lines
    known = set((FOLDER / "train.txt").read_text().split())
    assert (ids == UNKNOWN).sum() == sum(word not in known for word in words) > 0
    the = encode(FILES["train"], FILES["train"], "", 3)
    assert (the == 2).sum() == (FOLDER / "train.txt").read_text().split().count("the")


def test_the_test_is_the_whole_text_window_by_window():
    task = text()
    stream = encode(FILES["test"], FILES["train"], "", 100)
    batch = task.test_set()
    count = (len(stream) - 1) // 8
    assert torch.equal(batch.tokens.flatten(), stream[: 8 * count])
    assert torch.equal(batch.labels.flatten(), stream[1 : 8 * count + 1])
    made = make_cell(
        {"task": {"name": "text", "vocabulary": 100, "length": 8, **FILES}, "backbone": "gla"}
    )
    assert torch.equal(train.make_data(task, made).test.tokens, batch.tokens)


def test_training_windows_are_pieces_of_the_training_text():
    stream = encode(FILES["train"], FILES["train"], "", 100).tolist()
    pieces = {tuple(stream[i : i + 9]) for i in range(len(stream) - 8)}
    batch = text().generate(500, torch.Generator().manual_seed(0))
    drawn = {(*a, b[-1]) for a, b in zip(batch.tokens.tolist(), batch.labels.tolist(), strict=True)}
    assert drawn <= pieces and len(drawn) > 0.8 * len(pieces)


def test_a_folder_is_read_in_order_of_names():
    both = encode(str(FOLDER), FILES["train"], "", 100)
    parts = [encode(FILES[name], FILES["train"], "", 100) for name in ("test", "train")]
    assert torch.equal(both, torch.cat(parts))


def test_lines_may_come_from_the_hub(monkeypatch):
    """Rows of WikiText by a stand-in for datasets; they hold lines with their blanks."""
    rows = [{"text": line} for line in ("", " = Mill = \n", "", " The mill\n The river \n")]
    stand_in = SimpleNamespace(load_dataset=lambda *place, **options: rows)
    monkeypatch.setitem(sys.modules, "datasets", stand_in)
    assert read_lines("hub:wikitext-2:test") == ("= Mill =", "The mill", "The river")
    stand_in.load_dataset = lambda *place, **options: [{"body": "x"}]
    with pytest.raises(ValueError, match="text: hub:me/own:test: its rows have no 'text'"):
        read_lines("hub:me/own:test")


def test_a_tokenizer_file_may_be_given(tmp_path):
    library = pytest.importorskip("tokenizers")
    made = library.Tokenizer(
        library.models.WordLevel({"[UNK]": 0, "The": 1, "mill": 2}, unk_token="[UNK]")
    )
    made.pre_tokenizer = library.pre_tokenizers.WhitespaceSplit()
    made.save(str(tmp_path / "tokenizer.json"))
    task = text(tokenizer=str(tmp_path / "tokenizer.json"))
    assert task.test_set().tokens[0, :3].tolist() == [0, 1, 2]
    small = text(tokenizer=str(tmp_path / "tokenizer.json"), vocabulary=3)
    small.test_set()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train": ""}, "text: train: expected a file or folder, got ''"),
        ({"test": "nowhere.txt"}, "text: cannot read nowhere.txt"),
        ({"length": 1000}, "expected more than length = 1000 tokens, got 4"),
        ({"tokenizer": "nowhere.json"}, "text: tokenizer nowhere.json: "),
        ({"test": str(FOLDER.parent)}, "holds no .txt, .tokens, .raw file"),
    ],
)
def test_wrong_files_are_one_line(settings, message):
    with pytest.raises(ValueError, match=message) as caught:
        text(**settings).test_set()
    assert "\n" not in str(caught.value)


def test_perplexity_falls_and_is_reported(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cli, "BUILD", tmp_path)
    task = {"name": "text", "vocabulary": 100, "length": 8, **FILES}
    grid = {
        "suite": "words",
        "about": "a test",
        "defaults": {
            "task": task,
            "backbone": "baseconv",
            "width": 16,
            "layers": 1,
            "training": {"examples": None, "steps": 15, "batch": 8, "held_out": 8, "stop_at": None},
        },
        "cells": [{"branch": [{"kind": "resona", "layer": "spread"}, {"kind": "mlp"}]}],
    }
    path = tmp_path / "words.json"
    path.write_text(json.dumps(grid))
    assert cli.main(["run", str(path), "--output", str(tmp_path / "words.jsonl")]) == 0
    _, rows = store.read(tmp_path / "words.jsonl")
    for row in rows:
        untrained = row["result"]["curve"][0][-1]
        assert 1 < row["result"]["perplexity"] < untrained / 1.5
    capsys.readouterr()
    assert cli.main(["report", str(tmp_path / "words.jsonl"), "--plots", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "text: perplexity" in out and f"{rows[0]['result']['perplexity']:.3f}" in out
