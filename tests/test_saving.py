"""`save_resona` and `load_resona`: round trips, and files that are not what they should be."""

from __future__ import annotations

import json

import pytest
import torch
from small_models import SETTINGS, logits, make_model, tokens, wake

from resona_ext.integrations import augment, load_resona, save_resona

safetensors = pytest.importorskip("safetensors.torch")


@pytest.fixture(autouse=True)
def _one_thread(threads):
    threads(1)


@pytest.fixture
def saved(tmp_path):
    """A model, the file of its new layers, and its logits."""
    model, ids = make_model(), tokens()
    augmentation = augment(model, trainable_retrieval=True, key_conv=2, **SETTINGS)
    wake(augmentation)
    save_resona(augmentation, tmp_path / "resona.safetensors")
    return model, tmp_path / "resona.safetensors", ids, logits(model, ids)


def plain_twin(model):
    twin = make_model()
    state = {k: v for k, v in model.state_dict().items() if ".resona." not in k}
    twin.load_state_dict(state)
    return twin


def test_into_a_plain_model(saved):
    model, path, ids, expected = saved
    twin = plain_twin(model)
    load_resona(twin, path)
    assert torch.equal(logits(twin, ids), expected)
    assert {p.name for p in path.parent.iterdir()} == {path.name}  # no temporary file


def test_into_an_augmented_model_whose_knobs_stay(saved):
    model, path, ids, expected = saved
    twin = plain_twin(model)
    augmentation = augment(
        twin, trainable_retrieval=True, key_conv=2, chunk_size=4, top_k=1, encoder="tied"
    )
    assert load_resona(twin, path) is augmentation
    assert not torch.equal(logits(twin, ids), expected)
    augmentation.set(top_k=2)
    assert torch.equal(logits(twin, ids), expected)


def test_knobs_are_saved(saved):
    model, path, ids, _ = saved
    model._resona_augmentation.set(top_k=3, alpha=0.5)
    save_resona(model, path)
    twin = plain_twin(model)
    (layer, *_) = load_resona(twin, path).layers.values()
    assert (layer.top_k, layer.alpha) == (3, 0.5)
    assert torch.equal(logits(twin, ids), logits(model, ids))


def test_another_dtype(saved):
    model, path, _, _ = saved
    twin = plain_twin(model).to(torch.bfloat16)
    (layer, *_) = load_resona(twin, path).layers.values()
    wanted = next(iter(model._resona_augmentation.layers.values())).o_proj.weight
    assert torch.equal(layer.o_proj.weight, wanted.to(torch.bfloat16))


def test_a_context_encoder_of_ones_own(tmp_path):
    def last(chunks):
        return chunks[:, :, -1]

    path, ids = tmp_path / "r.safetensors", tokens()
    model = make_model()
    settings = {"encoder": last, "retrieval_dim": 32, **SETTINGS}
    wake(augment(model, **settings))
    save_resona(model, path)
    twin = plain_twin(model)
    with pytest.raises(ValueError, match="load_resona: model: expected augmented, got a plain one"):
        load_resona(twin, path)
    augment(twin, **settings)
    load_resona(twin, path)
    assert torch.equal(logits(twin, ids), logits(model, ids))


def test_pretrained_weights_of_the_backbone_are_saved_by_themselves(saved, tmp_path):
    """save_pretrained writes all; from_pretrained leaves the new layers out, load_resona adds them."""
    model, path, ids, expected = saved
    model.save_pretrained(tmp_path / "all")
    twin = type(model).from_pretrained(tmp_path / "all").eval()
    assert not any("resona" in name for name in twin.state_dict())
    load_resona(twin, path)
    assert torch.equal(logits(twin, ids), expected)


# --- Files that do not fit ------------------------------------------------------------------------


def truncated(path):
    path.write_bytes(path.read_bytes()[:-100])


def flipped(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def not_safetensors(path):
    path.write_bytes(b"PK\x03\x04 something else entirely")


def foreign(path):
    safetensors.save_file({"weight": torch.zeros(3)}, path)


def rewritten(change):
    def damage(path):
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata()
        config = json.loads(metadata["config"])
        change(config)
        tensors = safetensors.load_file(path)
        safetensors.save_file(tensors, path, metadata | {"config": json.dumps(config)})

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            truncated,
            "expected a whole safetensors file of save_resona, got one that cannot be read",
        ),
        (not_safetensors, "expected a whole safetensors file of save_resona, got one that cannot"),
        (flipped, "expected a whole safetensors file .*, got one whose contents have changed"),
        (foreign, "expected format resona_ext 1, got another safetensors file"),
        (rewritten(lambda c: c.pop("layers")), "expected the config of save_resona, got a damaged"),
        (rewritten(lambda c: c["settings"].update(unheard_of=1)), "got a damaged one"),
        (rewritten(lambda c: c.update(width=64)), "width of the model: expected 64, got 32"),
        (rewritten(lambda c: c["settings"].update(num_heads=2)), "expected"),
        (
            rewritten(lambda c: c.update(layers=["backbone.layers.9"])),
            "layers: expected names of layers, as backbone.layers.0, got 'backbone.layers.9'",
        ),
        (rewritten(lambda c: c.update(layers=c["layers"][:1])), "tensors: expected"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_bad_files_leave_the_model_alone(saved, damage, message):
    model, path, _, _ = saved
    damage(path)
    twin = plain_twin(model)
    names = dir(twin), list(twin.state_dict())
    with pytest.raises(ValueError, match=message):
        load_resona(twin, path)
    assert (dir(twin), list(twin.state_dict())) == names


def test_settings_that_differ_leave_the_model_alone(saved):
    model, path, ids, _ = saved
    twin = plain_twin(model)
    augmentation = augment(twin, key_conv=3, trainable_retrieval=True, **SETTINGS)
    wake(augmentation)
    before = logits(twin, ids)
    with pytest.raises(ValueError, match="load_resona: key_conv of the model: expected 2, got 3"):
        load_resona(twin, path)
    assert torch.equal(logits(twin, ids), before)
    augmentation.remove()
    augment(twin, [0, 1, 2], key_conv=2, trainable_retrieval=True, **SETTINGS)
    with pytest.raises(ValueError, match="load_resona: layers of the model: expected"):
        load_resona(twin, path)


def test_no_file_and_no_augmentation(tmp_path):
    with pytest.raises(
        FileNotFoundError, match="load_resona: path: expected a file of save_resona"
    ):
        load_resona(make_model(), tmp_path / "none")
    with pytest.raises(
        ValueError, match="save_resona: model: expected an augmented one, got a plain"
    ):
        save_resona(make_model(), tmp_path / "none")
