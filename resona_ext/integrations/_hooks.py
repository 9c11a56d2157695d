"""How the layers of a running model reach what they need: `Pass` and `Insertion`.

One forward of an augmented model, with gradient checkpointing of its blocks:

    backbone                 opens a pass                                     Passes
      first block            its input is the token embeddings e: a Pass      Passes
        augmented block      an argument carries the Pass past the border     Insertion.before_block
          == checkpoint ==   of what is recomputed in backward
          mixer              the Pass is taken off the argument again         Insertion.before_mixer
          mixer, done        its output y becomes mix(y, retrieved)           Insertion.after_mixer
    backbone, done           closes the pass                                  Passes

A stash on the module instead of the argument would hold the embeddings of the last forward when an
earlier one is recomputed, and give wrong gradients without a word.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ._cache import ModelCache
from ._errors import complain, require

if TYPE_CHECKING:
    from ..layer import Resona
    from ._passes import Passes
    from .families import Site


class Pass:
    """What the augmented layers share in one forward. B batch, T tokens, d width."""

    def __init__(
        self,
        embeddings: Tensor,
        attention_mask: Tensor | None,
        cu_seqlens: Tensor | None,
        indices: Tensor | None,
    ) -> None:
        self.embeddings = embeddings  # [B, T, d], right after the embedding matrix
        self.attention_mask = attention_mask  # [B, T] or None
        self.cu_seqlens = cu_seqlens
        self.indices = indices  # [B, T, R, k] or None: made offline
        self.cache: ModelCache | None = None
        self.unused_cache: ModelCache | None = None  # to which nothing is written
        self.is_grad_enabled = torch.is_grad_enabled()


class Carried:
    """The argument of a block, with the Pass beside it."""

    __slots__ = ("argument", "of_pass")

    def __init__(self, argument: object, of_pass: Pass) -> None:
        self.argument = argument
        self.of_pass = of_pass


class Insertion:
    """One Resona beside one mixer. Its methods are the hooks of that layer."""

    def __init__(self, passes: Passes, site: Site, carrier: str | None) -> None:
        self.passes = passes
        self.site = site
        self.carrier = carrier
        self.pending: Pass | None = None  # between the two hooks of the mixer

    @property
    def name(self) -> str:
        return self.site.name

    @property
    def resona(self) -> Resona:
        return getattr(self.site.owner, self.site.child)

    def register(self) -> list:
        mixer = self.site.mixer
        handles = [
            mixer.register_forward_pre_hook(self.before_mixer, with_kwargs=True),
            mixer.register_forward_hook(self.after_mixer, with_kwargs=True, always_call=True),
        ]
        if self.carrier is not None:
            block = self.site.block
            handles.append(block.register_forward_pre_hook(self.before_block, with_kwargs=True))
        return handles

    def before_block(self, block: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        of_pass = self.passes.current(self.name)
        return args, {**kwargs, self.carrier: Carried(kwargs.get(self.carrier), of_pass)}

    def before_mixer(self, mixer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if self.carrier is None:
            self.pending = self.passes.current(self.name)
            return args, kwargs
        kwargs = dict(kwargs)
        carried = kwargs.pop(self.carrier, None)
        if not isinstance(carried, Carried):
            self.passes.refuse_outside(self.name)
        if carried.argument is not None:
            kwargs[self.carrier] = carried.argument
        self.pending = carried.of_pass
        return args, kwargs

    def after_mixer(self, mixer: nn.Module, args: tuple, kwargs: dict, output: object) -> object:
        of_pass, self.pending = self.pending, None
        if output is None:  # the mixer has raised
            return None
        if of_pass.is_grad_enabled and not torch.is_grad_enabled():
            complain(
                self.name,
                "non-reentrant gradient checkpointing (use_reentrant=False)",
                "reentrant checkpointing, which cuts the gradient to the embeddings",
            )
        is_tuple = isinstance(output, tuple)
        y = output[0] if is_tuple else output
        mixed = self._mixed(of_pass, args[0] if args else kwargs["hidden_states"], y)
        return (mixed, *output[1:]) if is_tuple else mixed

    def _mixed(self, of_pass: Pass, x: Tensor, y: Tensor) -> Tensor:
        def here(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.to(x.device)  # a backbone spread over devices

        return self.resona(
            x,
            here(of_pass.embeddings),
            y,
            cu_seqlens=here(of_pass.cu_seqlens),
            attention_mask=here(of_pass.attention_mask),
            indices=here(of_pass.indices),
            cache=None if of_pass.cache is None else of_pass.cache.caches[self.name],
            mesh=self.passes.mesh,
        )

    def check_placement(self, embeddings: Tensor) -> None:
        """Whether the new weights fit the backbone's, before anything is computed or stored."""
        weight = self.resona.q_proj.weight
        if type(weight) is not nn.Parameter or hasattr(weight, "_fsdp_flattened"):
            return  # sharded: dtype and device change for the computation
        device = next((p.device for p in self.site.mixer.parameters()), embeddings.device)
        argument = f"{self.name}: device of the Resona weights"
        require(weight.device == device, argument, f"{device} like the mixer", weight.device)
        if not torch.is_autocast_enabled(device.type):
            argument = f"{self.name}: dtype of the Resona weights"
            expected = f"{embeddings.dtype} like the embeddings, or autocast"
            require(weight.dtype == embeddings.dtype, argument, expected, weight.dtype)
