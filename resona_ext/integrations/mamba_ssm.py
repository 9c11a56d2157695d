"""MambaLMHeadModel of the mamba_ssm package (Mamba, Mamba-2, hybrids with attention)."""

from __future__ import annotations

from ._cache import ModelCache
from .families import Family

KEY = "resona"


class MambaSsm(Family):
    """Blocks call mixer(x, inference_params=...). `inference_params` owns a dict of caches by layer.

    The package has no gradient checkpointing, so the mixer finds the pass at its augmentation. Its
    CUDA graphs (`cg=True`) replay steps that no host counts: they are refused.
    """

    name = "mamba_ssm"
    packages = ("mamba_ssm.models",)
    embedding = "embedding"
    carrier = None
    cache = "inference_params"

    def caches_in(self, cache: object) -> list[ModelCache]:
        held = cache.key_value_memory_dict.get(KEY)
        if held is not None and cache.seqlen_offset == 0:
            held.reset()  # as the mixers do, which start anew at offset 0
        return [] if held is None else [held]

    def attach(self, cache: object, model_cache: ModelCache) -> None:
        cache.key_value_memory_dict[KEY] = model_cache

    def holds_tokens(self, cache: object) -> bool:
        return cache.seqlen_offset > 0
