"""Training an augmented model: gradients, checkpointing, autocast, compile, DDP and FSDP."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from small_models import LAYERS, SETTINGS, logits, make_model, tokens, wake
from torch.nn.parallel import DistributedDataParallel

from resona_ext import augment, load_resona, save_resona


@pytest.fixture(autouse=True)
def _one_thread(threads):
    threads(1)


def training_model(kind: str = "mamba2", **settings):
    model = make_model(kind).train()
    augmentation = augment(model, **(SETTINGS | settings))
    wake(augmentation)
    return model, augmentation


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def backward(model, *batches) -> dict[str, torch.Tensor]:
    """Of the sum of the losses: all forwards come before the one backward."""
    model.zero_grad()
    sum(model(ids, labels=ids).loss for ids in batches).backward()
    return gradients(model)


def assert_same(got: dict, expected: dict, **tolerance) -> None:
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, msg=name, **tolerance)


def test_gradients_reach_everything_that_trains():
    model, augmentation = training_model(trainable_retrieval=True)
    got = backward(model, tokens())
    assert got.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(g.isfinite().all() for g in got.values())
    for layer in augmentation.layers.values():
        assert all(p.grad.abs().sum() > 0 for p in layer.parameters())


def test_freeze_backbone():
    model, augmentation = training_model()
    model.backbone.norm_f.weight.requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    augmentation.freeze_backbone()
    got = backward(model, tokens())
    assert got and all(".resona." in name for name in got)
    augmentation.unfreeze_backbone()
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before


def test_parameter_groups():
    model, augmentation = training_model()
    backbone, resona = augmentation.parameter_groups(1e-5, 1e-3, weight_decay=0.1)
    assert (backbone["lr"], resona["lr"], resona["weight_decay"]) == (1e-5, 1e-3, 0.1)
    trained = [p for p in model.parameters() if p.requires_grad]
    grouped = [*backbone["params"], *resona["params"]]
    assert {id(p) for p in grouped} == {id(p) for p in trained} and len(grouped) == len(trained)
    assert {id(p) for p in resona["params"]} <= {id(p) for p in augmentation.parameters()}
    torch.optim.AdamW([backbone, resona]).step()
    augmentation.freeze_backbone()
    assert [g["name"] for g in augmentation.parameter_groups(1e-5, 1e-3)] == ["resona"]


# --- Checkpointing --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mamba2", "mamba"])
@pytest.mark.parametrize("settings", [{}, {"trainable_retrieval": True, "mix": "gate"}], ids=str)
def test_gradient_checkpointing_with_two_forwards_before_one_backward(kind, settings):
    model, _ = training_model(kind, **settings)
    batches = tokens(), tokens(length=26)
    expected = backward(model, *batches)
    model.activation_checkpointing_enable({"use_reentrant": False})
    assert_same(backward(model, *batches), expected)


def test_reentrant_checkpointing_is_refused():
    model, _ = training_model()
    model.activation_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match="expected non-reentrant gradient checkpointing"):
        model(tokens())


def test_a_block_recomputed_from_outside_is_refused():
    model, _ = training_model()
    block = model.backbone.layers[0]
    with pytest.raises(ValueError, match="expected a forward of the whole model, got a layer by"):
        block(torch.randn(2, 9, 32))
    loss = model(tokens()).logits.sum()
    loss.backward()  # the failed call has left nothing behind


# --- Precision and compile ------------------------------------------------------------------------


def test_autocast():
    """All chunks are selected, so that no rounding can change the selection."""
    model, _ = training_model(top_k=8)
    ids = tokens(length=24)
    expected = model(ids).logits
    with torch.autocast("cpu", torch.bfloat16):
        got = model(ids).logits
        assert got.dtype == torch.float32  # as the plain model's
        model(ids, labels=ids).loss.backward()
        steps = model.eval().generate(ids[:, :9], max_new_tokens=8, do_sample=False)
        again = model.generate(ids[:, :9], max_new_tokens=8, do_sample=False, use_cache=False)
    torch.testing.assert_close(got, expected, rtol=0.05, atol=0.05)
    assert torch.equal(steps, again)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_model_of_another_dtype(dtype):
    model = make_model().to(dtype)
    augmentation = augment(model, **SETTINGS)
    wake(augmentation)
    assert all(p.dtype == dtype for p in augmentation.parameters())
    ids = tokens(length=9)
    got = model.generate(ids, max_new_tokens=8, do_sample=False)
    assert got.shape == (2, 17)
    model.to(torch.float32)
    assert logits(model, ids).isfinite().all()


@pytest.fixture
def shallow():
    """Two layers, as compilation takes seconds for each."""
    torch._dynamo.reset()
    model = make_model(num_hidden_layers=2).train()
    wake(augment(model, [0], **SETTINGS))
    return model


def test_compiled(shallow):
    ids = tokens(length=14)
    expected = backward(shallow, ids)
    compiled = torch.compile(shallow, backend="aot_eager")
    assert_same(backward(compiled, ids), {f"_orig_mod.{k}": g for k, g in expected.items()})
    assert not torch._dynamo.utils.counters["graph_break"]
    before = logits(shallow.eval(), ids)
    torch.testing.assert_close(logits(compiled, ids), before)


def test_compiled_with_checkpointing(shallow):
    batches = tokens(length=14), tokens(length=14)
    expected = backward(shallow, *batches)
    shallow.activation_checkpointing_enable({"use_reentrant": False})
    compiled = torch.compile(shallow, backend="eager")
    assert_same(backward(compiled, *batches), {f"_orig_mod.{k}": g for k, g in expected.items()})


# --- Several processes ----------------------------------------------------------------------------


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_ddp(one_process):
    model, _ = training_model(trainable_retrieval=True)
    ids = tokens()
    expected = backward(model, ids)
    wrapped = DistributedDataParallel(model)
    for _ in range(2):  # the second forward would complain of parameters unused in the first
        got = backward(wrapped, ids)
    assert_same(got, {f"module.{k}": g for k, g in expected.items()})


@pytest.mark.parametrize("checkpointing", [False, True])
def test_fsdp(one_process, tmp_path, checkpointing):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, _ = training_model()
    ids = tokens()
    expected = backward(model, ids)
    model.zero_grad()
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    mesh = init_device_mesh("cpu", (1,))
    for block in model.backbone.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    got = {name: g.full_tensor() for name, g in backward(model, ids).items()}
    assert_same(got, expected)

    before = logits(model.eval(), ids)
    save_resona(model, tmp_path / "resona.safetensors")
    with pytest.raises(ValueError, match="expected one not yet sharded"):
        load_resona(model, tmp_path / "resona.safetensors")
    whole = make_model()
    state = {name: t.full_tensor() for name, t in model.state_dict().items()}
    whole.load_state_dict({name: t for name, t in state.items() if ".resona." not in name})
    load_resona(whole, tmp_path / "resona.safetensors")
    torch.testing.assert_close(logits(whole, ids), before)


@pytest.mark.parametrize("wrap", ["compile", "module.compile", "ddp", "data parallel"])
def test_what_is_wrapped_already_is_refused(wrap, one_process):
    model = make_model()
    if wrap == "module.compile":
        model.backbone.layers[1].compile()
    else:
        wrappers = {"compile": torch.compile, "ddp": DistributedDataParallel}
        model = wrappers.get(wrap, torch.nn.DataParallel)(model)
    with pytest.raises(ValueError, match="augment: model: expected one that is not yet compiled"):
        augment(model, **SETTINGS)
    assert not any("resona" in name for name in model.state_dict())


def test_the_depth_of_a_deep_copy_in_training():
    """A copy made between forward and backward computes its own gradients."""
    model, _ = training_model()
    ids = tokens()
    expected = backward(model, ids)
    model(ids, labels=ids)
    twin = copy.deepcopy(model)
    assert_same(backward(twin, ids), expected)
    assert len(twin._resona_augmentation.layers) == LAYERS - 1
