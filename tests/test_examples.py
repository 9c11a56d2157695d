"""The example scripts, small: what they learn, and that an interrupted run ends like an unbroken one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

import custom_model  # noqa: E402
import finetune_mamba2  # noqa: E402

SMALL = ["--steps", "8", "--save-every", "4", "--length", "32", "--batch", "2"]


@pytest.fixture(autouse=True)
def _one_thread(threads):
    threads(1)


@pytest.fixture
def transformers():
    return pytest.importorskip("transformers", reason="transformers 5.23 wants Python >= 3.11")


def finetune(out: Path, *arguments: str) -> int:
    return finetune_mamba2.main(["--out", str(out), *SMALL, *arguments])


def checkpoint(out: Path) -> dict:
    return torch.load(out / "checkpoint.pt", weights_only=True)


def assert_equal(got, expected) -> None:
    assert type(got) is type(expected)
    if isinstance(expected, dict):
        assert got.keys() == expected.keys()
        for key, value in expected.items():
            assert_equal(got[key], value)
    elif isinstance(expected, torch.Tensor):
        assert torch.equal(got, expected)
    elif isinstance(expected, (list, tuple)):
        assert len(got) == len(expected)
        for pair in zip(got, expected, strict=True):
            assert_equal(*pair)
    else:
        assert got == expected


def test_finetuning_lowers_the_loss_and_resumes_where_it_stopped(transformers, tmp_path, capsys):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert finetune(whole) == 0
    assert "held-out loss" in capsys.readouterr().out
    assert finetune(parts, "--steps-now", "3") == 0
    assert "stopped after 3 of 8 steps" in capsys.readouterr().out
    assert finetune(parts, "--resume", "--steps-now", "3") == 0
    assert finetune(parts, "--resume") == 0
    expected, got = checkpoint(whole), checkpoint(parts)
    assert_equal(got, expected)

    run = expected["run"]
    assert run["step"] == 8 and len(run["losses"]) == 8
    assert [step for step, _ in run["held_out"]] == [0, 4, 8]
    assert run["held_out"][-1][1] < run["held_out"][0][1] - 1
    assert (whole / "loss.png").read_bytes().startswith(b"\x89PNG")

    from resona_ext import load_resona

    model = transformers.Mamba2ForCausalLM.from_pretrained(whole / "backbone")
    load_resona(model, whole / "resona.safetensors")
    assert_equal(dict(model.state_dict()), dict(expected["model"]))


def test_finetuning_the_new_layers_only(transformers, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 60)
    arguments = ["--text", str(text), "--freeze-backbone", "--layers", "0,2", "--steps-now", "2"]
    assert finetune(tmp_path / "a", *arguments) == 0
    state = checkpoint(tmp_path / "a")["model"]
    torch.manual_seed(0)
    arguments = finetune_mamba2.parse(["--out", "unused"])
    for name, value in finetune_mamba2.make_model(arguments)[0].state_dict().items():
        assert torch.equal(state[name], value)
    assert state["backbone.layers.2.resona.o_proj.weight"].any()


def test_what_finetuning_says_when_it_cannot(transformers, tmp_path, capsys):
    out, text = tmp_path / "run", tmp_path / "short.txt"
    text.write_text("word " * 260)

    def says(message: str, *arguments: str) -> None:
        assert finetune(out, *arguments) == 1
        error = capsys.readouterr().err
        assert error.startswith("finetune_mamba2: ") and message in error

    says("--resume: there is no", "--resume")
    says("cannot read", "--text", str(tmp_path / "none"))
    says("--length 500 needs 5000 or more", "--text", str(text), "--length", "500")
    assert finetune(out, "--steps-now", "1") == 0
    says("--resume goes on from it")
    says("lr was 0.001, is 0.5", "--resume", "--lr", "0.5")
    with pytest.raises(SystemExit):
        finetune(out, "--batch", "0")
    assert "--batch must be at least 1, got 0" in capsys.readouterr().err


def test_the_custom_model_learns_to_copy(capsys):
    assert custom_model.train(False, 100, length=16) < 0.1
    assert custom_model.train(True, 100, length=16) > 0.9
    custom_model.main(["--steps", "1"])
    assert [line.partition(" ")[0] for line in capsys.readouterr().out.splitlines()] == [
        "without",
        "with",
    ]
