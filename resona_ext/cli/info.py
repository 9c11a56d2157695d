"""Print what this build contains and what machine it runs on."""

from __future__ import annotations

import argparse
import importlib
import json
import platform
from pathlib import Path

import torch

from ..version import __version__
from . import machine


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> None:
    facts = collect()
    if arguments.json:
        print(json.dumps(facts, indent=2))
        return
    for section, values in facts.items():
        print(section)
        width = max(map(len, values), default=0)
        for name, value in values.items():
            print(f"  {name:<{width}}  {_in_words(value)}")


def collect() -> dict[str, dict]:
    """Everything that `info` knows, as plain JSON values."""
    return {
        "package": {
            "version": __version__,
            "library": _library_path(),
            "pybind module resona_ext._C": _pybind_module(),
        },
        "build": _build_info(),
        "machine": {
            "cpu": machine.cpu_model(),
            "threads": torch.get_num_threads(),
            "cuda devices": machine.cuda_devices(),
            "system": platform.platform(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torch cuda": torch.version.cuda,
        },
    }


def _library_path() -> str | None:
    loaded = (path for path in torch.ops.loaded_libraries if "resona" in Path(path).name)
    return next(loaded, None)


def _build_info() -> dict:
    """What the library says of itself; the keys are the library's business."""
    try:
        build_info = torch.ops.resona._build_info
    except AttributeError:
        return {"error": "the loaded library has no resona::_build_info"}
    return json.loads(build_info())


def _pybind_module() -> str:
    try:
        return f"present ({importlib.import_module('resona_ext._C').__file__})"
    except ImportError as error:
        return f"missing ({error})"


def _in_words(value) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(_in_words, value)) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_in_words(item)}" for name, item in value.items()) or "none"
    return str(value)
