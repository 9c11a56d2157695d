"""Retrieval in deep layers: how often it finds the answer, and the weights that let it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.recall import config, model, train
from benchmarks.recall.backbones import BACKBONES
from benchmarks.recall.hits import hit_rate
from benchmarks.recall.tasks import IGNORED

TINY = {
    "task": {"name": "mqar", "vocabulary": 64, "length": 16, "pairs": 2},
    "backbone": "baseconv",
    "width": 16,
    "branch": {"kind": "resona", "options": {"chunk_size": 2, "top_k": 1}},
    "training": {"examples": 40, "steps": 12, "batch": 8, "test_examples": 20, "held_out": 10}
    | {"evaluate_every": 5},
}


@pytest.fixture(autouse=True)
def _one_thread(threads):
    threads(1)


def cell(**changes) -> config.Cell:
    return config.make_cell(config.merge(TINY, changes))


@pytest.mark.parametrize("backbone", ["baseconv", "gla", "mamba", "mamba2"])
def test_linear_maps_can_be_drawn_as_in_zoology(backbone):
    if BACKBONES[backbone].missing("cpu") is not None:
        pytest.skip(BACKBONES[backbone].missing("cpu"))
    made = cell(backbone=backbone, width=64, linear_std=0.02, layers=3)
    torch.manual_seed(0)
    drawn = model.RecallModel(made)
    torch.manual_seed(0)
    own = model.RecallModel(replace(made, linear_std=None))
    for name, module in drawn.named_modules():
        if not isinstance(module, torch.nn.Linear):
            continue
        untouched = ".branch." in name or name.startswith("head.")
        before = own.get_submodule(name)
        if untouched:
            assert module.weight.shape == before.weight.shape and ".mixer." not in name
            continue
        std = 0.02 / 6**0.5 if name.endswith((".out", ".out_proj")) else 0.02
        error = 5 * std / (2 * module.weight.numel()) ** 0.5  # five standard errors
        assert module.weight.std().item() == pytest.approx(std, abs=error)
        is_step = name.endswith(".step")
        assert module.bias is None or (module.bias.abs().max() > 0) == is_step
        if is_step:
            assert torch.equal(module.bias, before.bias)


def rms(x: torch.Tensor) -> torch.Tensor:
    return x / x.square().mean(dim=-1, keepdim=True).add(torch.finfo(x.dtype).eps).sqrt()


@torch.no_grad()
@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("layer", [0, 1])
def test_hits_are_those_of_a_loop(layer, top_k):
    """Every question's chunks found by hand from what the block sees."""
    made = cell(branch={"layer": layer, "options": {"top_k": top_k}}, layers=2)
    torch.manual_seed(0)
    recall_model = model.RecallModel(made).eval()
    batch = made.make_task().generate(30, torch.Generator().manual_seed(1))
    embedding = recall_model.embedding(batch.tokens)
    h = recall_model.blocks[0](embedding, embedding) if layer else embedding
    x = recall_model.blocks[layer].norm(h)
    hits = []
    for row, column in (batch.labels != IGNORED).nonzero().tolist():
        pairs = rms(embedding[row]).view(8, 2, 16).mean(dim=1)[: column // 2]
        score = torch.nn.functional.cosine_similarity(x[row, column], pairs, dim=-1)
        tokens = batch.tokens[row].view(8, 2)[score.topk(min(top_k, len(pairs))).indices]
        hits.append(bool((tokens == batch.labels[row, column]).any()))
    assert sum(hits) > 0
    rate = hit_rate(recall_model, batch, rows=7)
    assert rate == pytest.approx(sum(hits) / len(hits))


def third_layer_hits(backbone: str, linear_std: float | None) -> float:
    """Before training."""
    if BACKBONES[backbone].missing("cpu") is not None:
        pytest.skip(BACKBONES[backbone].missing("cpu"))
    task = {"name": "mqar", "vocabulary": 8192, "length": 64, "pairs": 4}
    sizes = {"width": 64, "layers": 4, "linear_std": linear_std}
    made = cell(backbone=backbone, task=task, branch={"layer": 2}, **sizes)
    torch.manual_seed(0)
    batch = made.make_task().generate(32, torch.Generator().manual_seed(0))
    return hit_rate(model.RecallModel(made), batch, rows=32)


# Hymba's halves are normed behind their last maps, so small weights do not make them small.
@pytest.mark.parametrize("backbone", [name for name in BACKBONES if "hymba" not in name])
def test_small_weights_let_deep_layers_see_the_token(backbone):
    assert third_layer_hits(backbone, 0.02) > 0.95


@pytest.mark.parametrize("backbone", ["deltanet", "mamba2", "h3", "gsa"])
def test_own_weights_of_some_hide_the_token_from_deep_layers(backbone):
    assert third_layer_hits(backbone, None) < 0.9


@pytest.mark.parametrize(
    "branch",
    [
        {"kind": "none"},
        {"kind": "window"},
        {"kind": "mlp"},
        {"options": {"eligibility": "inclusive"}},
    ],
)
def test_hits_of_what_does_not_search_are_none(branch):
    made = cell(branch=branch)
    batch = made.make_task().generate(2, torch.Generator())
    assert hit_rate(model.RecallModel(made), batch, rows=2) is None


def test_a_result_says_how_often_retrieval_found_the_answer(tmp_path):
    result = train.Run(cell(), tmp_path / "a").train()
    assert [step for step, _ in result["hits"]] == [point[0] for point in result["curve"]]
    assert all(0 <= rate <= 1 for rate in [*(rate for _, rate in result["hits"]), result["hit"]])
    plain = train.Run(cell(branch={"kind": "none"}), tmp_path / "b").train()
    assert plain["hit"] is None and plain["hits"] == []
