"""From the arguments of a forward to its `Pass`, and from the backbone's cache to ours.

Everything that can be wrong with a forward is found in `_begin`, before any layer has computed or
stored something: an error leaves model and caches as they were.
"""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor, nn

from ._cache import ModelCache
from ._errors import complain, require
from ._hooks import Insertion, Pass
from .families import Layout

INDICES = "resona_indices"  # argument of an augmented model's forward
PACKING = ("seq_idx", "cu_seq_lens_q", "cu_seq_lens_k")


class Passes:
    """The hooks of the model, the backbone and its first layer: one `Pass` per forward."""

    def __init__(self, model: nn.Module, layout: Layout, owner: str, max_length: int | None):
        self.model, self.layout = model, layout
        self.owner, self.max_length = owner, max_length
        self.insertions: list[Insertion] = []
        self.explicit: ModelCache | None = None  # of Augmentation.use_cache
        self.mesh = None  # of Augmentation.mesh
        self._is_open = False
        self._current: Pass | None = None
        self._attach_to: object | None = None
        self._arguments: dict = {}  # of the model's forward, while it runs

    def register(self) -> list:
        model, backbone = self.model, self.layout.backbone
        handles = [
            model.register_forward_pre_hook(self._before_model, with_kwargs=True),
            backbone.register_forward_pre_hook(self._before_backbone),
            backbone.register_forward_hook(self._after_backbone, always_call=True),
            model.register_forward_hook(self._after_model, always_call=True),
        ]
        if self.layout.is_named:
            handles.append(self.layout.embedding.register_forward_hook(self._after_embedding))
        else:
            first = self.layout.sites[0].block
            handles.append(first.register_forward_pre_hook(self._before_first, with_kwargs=True))
        for insertion in self.insertions:
            handles += insertion.register()
        return handles

    def current(self, name: str) -> Pass:
        return self.refuse_outside(name) if self._current is None else self._current

    def refuse_outside(self, name: str) -> NoReturn:
        complain(
            name,
            "a forward of the whole model",
            "a layer by itself. If torch.utils.checkpoint recomputes whole blocks, use the model's "
            "own activation_checkpointing_enable(), or checkpoint within the blocks",
        )

    # --- Hooks -----------------------------------------------------------------------------------

    def _before_model(self, model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if getattr(model, "_is_replica", False):
            complain("model", "DistributedDataParallel", "DataParallel, whose threads share hooks")
        kwargs = dict(kwargs)
        indices = kwargs.pop(INDICES, None)
        self._arguments = {**kwargs, INDICES: indices}
        return args, kwargs

    def _before_backbone(self, backbone: nn.Module, args: tuple) -> None:
        self._is_open, self._current, self._attach_to = True, None, None

    def _before_first(self, block: nn.Module, args: tuple, kwargs: dict) -> None:
        if not self._is_open:
            self.refuse_outside(self.layout.sites[0].name)
        self._begin(self.layout.family.embeddings_of(args, kwargs), kwargs)

    def _after_embedding(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        if self._is_open and self._current is None:
            self._begin(output, self._arguments)

    def _after_backbone(self, backbone: nn.Module, args: tuple, output: object) -> None:
        of_pass, cache = self._current, self._attach_to
        self._is_open, self._current, self._attach_to = False, None, None
        if output is not None and cache is not None:
            self.layout.family.attach(cache, of_pass.cache or of_pass.unused_cache)

    def _after_model(self, model: nn.Module, args: tuple, output: object) -> None:
        self._arguments = {}

    # --- What they find --------------------------------------------------------------------------

    def _begin(self, e: Tensor, arguments: dict) -> None:
        width = self.layout.width
        valid = e.dim() == 3 and e.shape[-1] == width
        require(valid, "embeddings", f"[B, T, {width}]", list(e.shape))
        for insertion in self.insertions:
            insertion.check_placement(e)
        of_pass = Pass(
            e,
            checked_mask(arguments.get("attention_mask"), e),
            checked_packing(arguments),
            self._arguments.get(INDICES),
        )
        backbone_cache = arguments.get(self.layout.family.cache)
        if self.explicit is not None:
            self._use(of_pass, self.explicit)
        elif backbone_cache is not None:
            self._bind(of_pass, backbone_cache)
        self._current = of_pass

    def _bind(self, of_pass: Pass, backbone_cache: object) -> None:
        """Find the retrieval caches in the backbone's, or make them if it is empty."""
        family = self.layout.family
        held = family.caches_in(backbone_cache)
        mine = [cache for cache in held if cache.owner == self.owner]
        require(len(held) == len(mine), "cache", "one of this model", "one of another")
        has_tokens = family.holds_tokens(backbone_cache)
        if not mine:
            got = "one that the backbone filled without this augmentation"
            require(not has_tokens, "cache", "an empty one or one of this model", got)
            mine = [family.new_cache(self.owner, self.max_length)]
            self._attach_to = backbone_cache
        elif not has_tokens:
            mine[0].reset()
        self._use(of_pass, mine[0])

    def _use(self, of_pass: Pass, cache: ModelCache) -> None:
        reason = self._reason_not_to_keep(of_pass)
        if reason is None:
            of_pass.cache = cache
            self._prepare(of_pass)
            return
        # A whole sequence needs no cache. Only what would follow it does.
        require(cache.is_empty, "cache", "None or an empty one", f"one with tokens, and {reason}")
        cache.not_kept = reason
        of_pass.unused_cache = cache

    def _reason_not_to_keep(self, of_pass: Pass) -> str | None:
        parameters = (p for i in self.insertions for p in i.resona.parameters())
        if torch.is_grad_enabled() and any(
            t.requires_grad for t in (of_pass.embeddings, *parameters)
        ):
            return "gradients, which a cache has none of: call the model under torch.no_grad()"
        if of_pass.indices is not None:
            return f"{INDICES}, which are made for whole sequences: pass use_cache=False"
        if not all(i.resona.encoders.is_pooled for i in self.insertions):
            return "a context encoder of your own, which sees whole chunks: pass use_cache=False"
        if of_pass.cu_seqlens is not None:
            return "packed sequences (cu_seqlens): pass use_cache=False"
        if self.mesh is not None:
            return "a mesh, whose ranks hold parts of the sequence: pass use_cache=False"
        return None

    def _prepare(self, of_pass: Pass) -> None:
        e, mask = of_pass.embeddings, of_pass.attention_mask
        rows = e.shape[1] if mask is None else int(mask.sum(dim=1).max())
        is_cast = torch.is_autocast_enabled(e.device.type)
        layers = {insertion.name: insertion.resona for insertion in self.insertions}
        of_pass.cache.prepare(layers, e, rows, None if is_cast else e.dtype)


def checked_mask(mask: Tensor | None, e: Tensor) -> Tensor | None:
    """The last T columns of a padding mask [B, >= T], holes filled; None where nothing is masked.

    Only what stands left or right of all tokens is padding. transformers masks a padding token inside
    of a prompt too: its mixers skip that token, here it keeps its place in its chunk.
    """
    if mask is None:
        return None
    batch, rows = e.shape[:2]
    valid = mask.dim() == 2 and mask.shape[0] == batch and mask.shape[1] >= rows
    require(valid, "attention_mask", f"[{batch}, at least {rows}], 1 at tokens", list(mask.shape))
    expected = "bool or integer, 1 at tokens"
    require(not mask.dtype.is_floating_point, "attention_mask", expected, mask.dtype)
    real = (mask[:, mask.shape[1] - rows :] != 0).int()
    started, not_ended = real.cummax(1).values, real.flip(1).cummax(1).values.flip(1)
    mask = started * not_ended
    # As transformers does it for its own layers. Tracing must not ask for values.
    is_traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return None if not is_traced and bool(mask.all()) else mask


def checked_packing(arguments: dict) -> Tensor | None:
    """cu_seqlens int32 [n + 1] of packed sequences, or None."""
    borders = arguments.get("cu_seqlens")
    if borders is not None:
        return borders.to(torch.int32)
    given = [name for name in PACKING if arguments.get(name) is not None]
    require(not given, "packed sequences", "cu_seqlens as well", given)
    return None
