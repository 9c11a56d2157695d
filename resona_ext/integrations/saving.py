"""The new layers alone in one safetensors file, with what it takes to put them back."""

from __future__ import annotations

import ctypes
import hashlib
import inspect
import json
import os
from pathlib import Path

import torch
from torch import Tensor, nn

from ..layer import Resona
from ._errors import complain, require
from .augmentation import ATTRIBUTE, Augmentation, augment, settings_with_defaults

FORMAT = "resona_ext 1"
CUSTOM = "custom"  # a context encoder given as a callable, which no file can hold
# May differ from the file: they are turned at test time.
KNOBS = ("top_k", "alpha", "search", "superchunk_size", "probes")


def save_resona(model: nn.Module | Augmentation, path: str | os.PathLike) -> None:
    """Write the parameters and settings of the new layers to a safetensors file.

    An existing file is replaced only when the new one is whole. With FSDP every rank has to call it.

    Raises:
        ValueError: the model is not augmented.
        ModuleNotFoundError: safetensors is not installed (`pip install resona_ext[transformers]`).
    """
    from safetensors.torch import save_file

    augmentation = _augmentation_of(model, "save_resona")
    require(augmentation is not None, "model", "an augmented one", "a plain one", "save_resona")
    tensors = {name: _whole(t) for name, t in _tensors(augmentation).items()}
    metadata = {
        "format": FORMAT,
        "config": json.dumps(_config(augmentation)),
        "sha256": _digest(tensors),
    }
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file(tensors, temporary, metadata)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_resona(model: nn.Module, path: str | os.PathLike) -> Augmentation:
    """Read what `save_resona` wrote. A plain model is augmented first, as the saved one was.

    A model that is augmented already must have the same layers and settings; top_k, alpha and how
    it searches stay as they are in it. A layer with a context encoder of your own has to be augmented
    with it first.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, not of `save_resona`, or of another kind of model. The model
            is then as it was.
        ModuleNotFoundError: safetensors is not installed (`pip install resona_ext[transformers]`).
    """
    config, tensors = _read(Path(path))
    augmentation = _augmentation_of(model, "load_resona")
    is_new = augmentation is None
    if is_new:
        _require(config["settings"].get("encoder") != CUSTOM, "model", "augmented", "a plain one")
        options = {"embedding": config["embedding"]} if config["embedding"] is not None else {}
        augmentation = augment(model, config["layers"], **options, **config["settings"])
    try:
        _check(augmentation, config)
        _copy(tensors, _tensors(augmentation))
    except Exception:
        if is_new:
            augmentation.remove()
        raise
    return augmentation


def _augmentation_of(model: nn.Module | Augmentation, function: str) -> Augmentation | None:
    if isinstance(model, Augmentation):
        return model
    model = getattr(model, "module", model)  # of DistributedDataParallel
    model = getattr(model, "_orig_mod", model)  # of torch.compile
    expected = "an nn.Module or an Augmentation"
    require(isinstance(model, nn.Module), "model", expected, type(model).__name__, function)
    return getattr(model, ATTRIBUTE, None)


def _require(ok: bool, argument: str, expected: object, got: object) -> None:
    require(ok, argument, expected, got, "load_resona")


def _tensors(augmentation: Augmentation) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": tensor
        for name, layer in augmentation.layers.items()
        for key, tensor in layer.state_dict().items()
    }


def _whole(t: Tensor) -> Tensor:
    t = t.full_tensor() if hasattr(t, "full_tensor") else t  # a DTensor
    return t.detach().cpu().contiguous().clone()


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        t = tensors[name]
        digest.update(f"{name} {t.dtype} {list(t.shape)}".encode())
        digest.update(ctypes.string_at(t.data_ptr(), t.nbytes))
    return digest.hexdigest()


def _config(augmentation: Augmentation) -> dict:
    layout = augmentation.layout
    settings = {k: v for k, v in augmentation.settings.items() if k not in ("device", "dtype")}
    if not isinstance(settings["encoder"], str):
        settings["encoder"] = CUSTOM
    names = {id(module): name for name, module in augmentation.model.named_modules()}
    return {
        "family": layout.family.name,
        "width": layout.width,
        "layers": list(augmentation.layers),
        "embedding": names.get(id(layout.embedding)) if layout.is_named else None,
        "settings": settings,
    }


def _read(path: Path) -> tuple[dict, dict[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"load_resona: path: expected a file of save_resona, got {path}")
    expected = "a whole safetensors file of save_resona"
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        complain(str(path), expected, f"one that cannot be read: {error}", "load_resona")
    got = metadata.get("format", "another safetensors file")
    _require(got == FORMAT, str(path), f"format {FORMAT}", got)
    got = "one whose contents have changed"
    _require(metadata.get("sha256") == _digest(tensors), str(path), expected, got)
    return _checked_config(path, metadata.get("config", "")), tensors


def _checked_config(path: Path, text: str) -> dict:
    try:
        config = json.loads(text)
        kinds = {"family": str, "width": int, "layers": list, "settings": dict}
        valid = all(isinstance(config[name], kind) for name, kind in kinds.items())
        valid = valid and (config["embedding"] is None or isinstance(config["embedding"], str))
        valid = valid and all(isinstance(name, str) for name in config["layers"])
        known = inspect.signature(Resona).parameters
        valid = valid and all(name in known for name in config["settings"])
    except (json.JSONDecodeError, KeyError, TypeError):
        valid = False
    _require(valid, str(path), "the config of save_resona", "a damaged one")
    return config


def _check(augmentation: Augmentation, config: dict) -> None:
    mine = _config(augmentation)
    for name in ("family", "width", "layers"):
        _require(mine[name] == config[name], f"{name} of the model", config[name], mine[name])
    signature = inspect.signature(Resona).parameters
    defaults = {name: p.default for name, p in signature.items()}
    full = [
        defaults | settings_with_defaults(mine["width"], settings)
        for settings in (mine["settings"], config["settings"])
    ]
    for name in signature:
        have, want = (settings[name] for settings in full)
        if name not in (*KNOBS, "device", "dtype", "d_model"):
            _require(have == want, f"{name} of the model", repr(want), repr(have))


def _copy(source: dict[str, Tensor], target: dict[str, Tensor]) -> None:
    _require(source.keys() == target.keys(), "tensors", sorted(target), sorted(source))
    for name, t in target.items():
        got = source[name]
        _require(got.shape == t.shape, name, list(t.shape), list(got.shape))
        _require(got.is_floating_point(), name, "floating point", got.dtype)
        sharded = hasattr(t, "full_tensor")
        _require(not sharded, "model", "one not yet sharded (load before FSDP)", "a sharded one")
    with torch.no_grad():
        for name, t in target.items():
            t.copy_(source[name])
