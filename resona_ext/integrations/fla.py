"""Models of flash-linear-attention (fla)."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from ._cache import ModelCache
from .families import Family


class FlaModelCache(ModelCache):
    """As fla's caches treat their layers: state is mapped by a function and put back."""

    def _map_state(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        """What `function`, a selection of sequences, does to their numbers."""
        first = next(iter(self._each()))
        return function(first._sequence)

    @property
    def state(self) -> None:
        return None

    @state.setter
    def state(self, sequences: Tensor) -> None:
        self.batch_select_indices(sequences)

    def _validate_crop(self, max_length: int) -> int:
        length = self.get_seq_length()
        return min(length, max_length if max_length >= 0 else max(0, length + max_length))

    def crop(self, max_length: int) -> None:
        """Keep max_length tokens, or remove as many as a negative number says."""
        for cache in self._each():
            cache.crop(max_length)


class Fla(Family):
    """Blocks call attn(hidden_states=..., past_key_values=..., **kwargs), which returns a tuple.

    The pass travels as an argument of its own among the kwargs. A cache grows its layers in the first
    forward, so the retrieval caches join it when that has ended.
    """

    name = "fla"
    packages = ("fla.models",)
    mixers = ("attn", "mixer")
    carrier = "resona_pass"
    cache = "past_key_values"

    def _is_backbone(self, module: nn.Module) -> bool:
        return super()._is_backbone(module) and isinstance(module.layers, nn.ModuleList)

    def new_cache(self, owner: str, max_length: int | None) -> ModelCache:
        return FlaModelCache(owner, max_length)
