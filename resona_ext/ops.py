"""Loads libresona.so and teaches torch about its operators: `resona` is torch.ops.resona.

The kernels and schemas are C++ (csrc/ops/register.cpp). What torch wants in Python is registered from
here, each part in its own module: fakes (torch.compile, export), autograd, autocast, vmap, FLOPs.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

LIBRARY = Path(__file__).with_name("libresona.so")

if not LIBRARY.exists():
    raise ImportError(
        f"resona_ext: {LIBRARY} is missing. Build it with `make build` in a checkout, or reinstall "
        "the package with `pip install --no-build-isolation .`"
    )
torch.ops.load_library(str(LIBRARY))

resona = torch.ops.resona

from . import _autograd, _cuda, _fakes, _transforms  # noqa: E402

_build = json.loads(resona._build_info())
_cuda.warn_if_expected(_cuda.collect(_build["cuda"], _build["cuda_architectures"], gpus=False))
_fakes.register()
_libraries = (_autograd.register(), _transforms.register())
