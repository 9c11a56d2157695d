"""Mamba, Mamba-2 and Falcon-Mamba of Hugging Face transformers 5."""

from __future__ import annotations

import sys

from ._errors import require
from .families import Family

OLDEST = 5


class TransformersMamba(Family):
    """Blocks call mixer(x, cache_params=..., attention_mask=...) and look at neither argument.

    `cache_params` carries the pass, since Mamba and Falcon-Mamba hand nothing else on. Gradient
    checkpointing wraps the forward of a block, within its hooks.
    """

    name = "transformers Mamba"
    packages = tuple(f"transformers.models.{name}" for name in ("mamba", "mamba2", "falcon_mamba"))
    carrier = "cache_params"
    cache = "cache_params"

    def check_version(self) -> None:
        version = getattr(sys.modules.get("transformers"), "__version__", "unknown")
        major = version.partition(".")[0]
        expected = f"transformers >= {OLDEST}, whose caches hold layers"
        require(not major.isdigit() or int(major) >= OLDEST, "model", expected, version)
