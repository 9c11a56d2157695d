"""What the augmented layers of one model remember while it generates: `ModelCache`.

It lives inside the backbone's own cache, as one more of its layers, so whatever is done to that cache
(beam search reorders it, `generate` resets it) is done to the retrieval caches too.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .._layer_cache import cache_dtype, check_cache
from ..cache import ChunkCache
from ._errors import complain, require

if TYPE_CHECKING:
    from ..layer import Resona

FIRST_LENGTH = 256  # tokens; a cache without a limit doubles from here


class ModelCache:
    """One `ChunkCache` per augmented layer, under the names that Hugging Face caches give their layers.

    Args:
        owner: identifies the augmentation that it belongs to.
        max_length: capacity in tokens per sequence. None: grows as needed.
    """

    # Neither of transformers' two kinds of layers: what asks for those must keep finding the backbone's.
    is_compileable = False
    is_croppable = True
    is_sliding = False
    supports_early_init = False
    is_initialized = True

    def __init__(self, owner: str, max_length: int | None) -> None:
        self.owner = owner
        self.max_length = max_length
        self.caches: dict[str, ChunkCache] = {}
        self.not_kept: str | None = None  # why tokens went by without being stored

    @property
    def is_empty(self) -> bool:
        return self.get_seq_length() == 0 and self.not_kept is None

    def prepare(
        self, layers: dict[str, Resona], x: Tensor, rows: int, dtype: torch.dtype | None
    ) -> None:
        """Make room for `rows` more tokens in every layer, or raise and leave everything as it is.

        x: [B, T, d], of the shape that the layers will get, of which `rows` are tokens. dtype: of the
        caches; None: as `Resona.make_cache`.
        """
        batch = x.shape[0]
        if self.not_kept is not None:
            complain("cache", "one that holds all tokens so far", self.not_kept)
        if self.get_seq_length() == 0:
            caches = {name: self._new(layer, batch, rows, dtype) for name, layer in layers.items()}
        else:
            caches = self._checked(layers, x, dtype)
            caches = {name: self._grown(layers[name], old, rows) for name, old in caches.items()}
        self.caches = caches

    def _new(
        self, layer: Resona, batch: int, rows: int, dtype: torch.dtype | None, least: int = 0
    ) -> ChunkCache:
        if self.max_length is None:
            length = max(FIRST_LENGTH, least, rows)
        else:
            expected = f"at most max_length = {self.max_length} tokens per sequence"
            require(rows <= self.max_length, "cache", expected, rows)
            length = self.max_length
        # As large as a long cache would choose it, so that a grown one can take over the smaller one.
        history = 2 * layer.chunk_size + max(layer.key_conv - 1, 0)
        return layer.make_cache(batch, length, dtype=dtype, history=history)

    def _checked(
        self, layers: dict[str, Resona], x: Tensor, dtype: torch.dtype | None
    ) -> dict[str, ChunkCache]:
        require(
            self.caches.keys() == layers.keys(),
            "cache",
            f"of layers {sorted(layers)}",
            sorted(self.caches),
        )
        for name, layer in layers.items():
            cache = self.caches[name]
            check_cache(layer, cache, x, None)
            wanted = cache_dtype(layer, cache.device) if dtype is None else dtype
            expected = f"of dtype {wanted} in {name}"
            require(cache.dtype == wanted, "cache", expected, cache.dtype)
        lengths = {cache.get_seq_length() for cache in self.caches.values()}
        require(len(lengths) == 1, "cache", "one whose last forward has finished", sorted(lengths))
        return self.caches

    def _grown(self, layer: Resona, old: ChunkCache, rows: int) -> ChunkCache:
        inclusive = int(layer.eligibility == "inclusive")
        wanted = old.get_seq_length() + rows
        if wanted + inclusive <= old.max_length:
            return old
        if self.max_length is not None:
            expected = f"at most max_length = {self.max_length} tokens per sequence"
            complain("cache", expected, wanted)
        new = self._new(layer, old.batch, wanted, old.dtype, least=2 * old.max_length)
        new.load_state_dict(old.state_dict())
        return new

    def _each(self) -> Iterable[ChunkCache]:
        return self.caches.values()

    # --- What a layer of a Hugging Face cache can do ---------------------------------------------

    def get_seq_length(self) -> int:
        return max((cache.get_seq_length() for cache in self._each()), default=0)

    def get_max_length(self) -> int:
        return -1 if self.max_length is None else self.max_length

    def reset(self) -> None:
        self.not_kept = None
        for cache in self._each():
            cache.reset()

    def crop(self, tokens_to_remove: int) -> None:
        """Remove tokens from the end; the number is negative, as transformers gives it."""
        if tokens_to_remove != 0:
            for cache in self._each():
                cache.crop(-abs(tokens_to_remove))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        for cache in self._each():
            cache.reorder(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        for cache in self._each():
            cache.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        for cache in self._each():
            cache.batch_select_indices(indices)

    def offload(self) -> None:
        """Nothing to do: transformers offloads attention layers only."""

    def prefetch(self) -> None:
        """As `offload`."""

    def __repr__(self) -> str:
        return f"ModelCache({self.get_seq_length()} tokens, layers {sorted(self.caches)})"
