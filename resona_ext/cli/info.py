"""Print what this build contains, what machine it runs on, and whether CUDA is usable, and why.

Paste it into a report of a problem.
"""

from __future__ import annotations

import argparse
import importlib
import json
import platform
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

import torch

from .. import _cuda
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
    build = _build_info()
    return {
        "package": {
            "version": __version__,
            "installed as": _distribution(),
            "library": _library_path(),
            "pybind module resona_ext._C": _pybind_module(),
        },
        "build": build,
        "cuda": _cuda_state(build),
        "machine": {
            "cpu": machine.cpu_model(),
            "threads": torch.get_num_threads(),
            "system": platform.platform(),
            "python": platform.python_version(),
            "torch": torch.__version__,
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


def _distribution() -> str | None:
    """The wheel's version with its label (0.1.0+cu130); None in a checkout that is not installed."""
    try:
        return metadata.version("resona_ext")
    except metadata.PackageNotFoundError:
        return None


def _cuda_state(build: dict) -> dict:
    facts = _cuda.collect(build.get("cuda", "none"), build.get("cuda_architectures", []), gpus=True)
    found = _cuda.verdict(facts)
    return {
        "usable": found.usable,
        "why": found.reason,
        "what to do": found.remedy,
        "driver": _cuda.driver_release(),
        "driver knows CUDA": facts.driver and ".".join(map(str, facts.driver)),
        "torch cuda": facts.torch_cuda,
        "gpus": [asdict(gpu) for gpu in facts.gpus],
    }


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
