"""`augment`: put Resona into the layers of a model that exists, and take it out again."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from torch import nn

from ..layer import Resona
from ._cache import ModelCache
from ._errors import complain, require
from ._hooks import Insertion
from ._passes import Passes
from .families import ENDS_AND_MIDDLE, Family, Layout, Site, choose
from .fla import Fla
from .mamba_ssm import MambaSsm
from .named import CHILD, NamedLayers
from .transformers import TransformersMamba

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

FAMILIES: list[Family] = [TransformersMamba(), Fla(), MambaSsm()]
ATTRIBUTE = "_resona_augmentation"  # of an augmented model


def augment(
    model: nn.Module,
    layers: str | Sequence[int | str] = ENDS_AND_MIDDLE,
    *,
    embedding: str | nn.Module | None = None,
    max_length: int | None = None,
    mesh: DeviceMesh | None = None,
    **resona_kwargs,
) -> Augmentation:
    """Insert a `Resona` beside the mixer of chosen layers. The model is changed in place.

    Known are Hugging Face Mamba, Mamba-2 and Falcon-Mamba (transformers 5), models of fla, and
    mamba_ssm's MambaLMHeadModel; of any other model, name the mixers. With the defaults the model
    computes at first exactly what it did before. Queries come from what the mixer is given (the
    block's normalised input), keys and values from the token embeddings.

    Args:
        model: as loaded or made: before torch.compile, DDP and FSDP.
        layers: "ends+middle" (first, middle and last, as in the paper's language models), ids of
            layers, or names: of blocks or mixers of a known family, else of mixers, modules whose
            input and output are [B, T, d].
        embedding: for named layers: the token embedding or its name. Default: what the model's
            `get_input_embeddings()` says, or its only nn.Embedding.
        max_length: most tokens that a cache will hold per sequence. None: it grows as needed.
        mesh: of one dimension, whose ranks share each sequence, consecutive tokens in the order of the
            ranks. Retrieval goes over the ranks; that the model's own mixers do is the model's task
            (`resona_ext.distributed.on_whole_sequence` helps). No caches.
        resona_kwargs: of `Resona`. Defaults that differ from its own: num_heads such that heads are
            as wide as possible up to 64, mix="additive", zero_init_output=True with it, encoder
            "identity", or "tied" with trainable_retrieval=True; dtype and device of the model.

    Returns:
        What was done, with the means to train, save and undo it. The model keeps a reference.

    Raises:
        ValueError: nothing is known of such a model, a layer does not exist, or an argument does not
            fit. The model is then as it was.
    """
    _refuse_wrapped(model)
    require(
        getattr(model, ATTRIBUTE, None) is None, "model", "one not yet augmented", "one that is"
    )
    layout, sites = _find(model, layers, embedding)
    return Augmentation(model, layout, sites, max_length, resona_kwargs, mesh)


def _find(
    model: nn.Module, layers: str | Sequence[int | str], embedding: str | nn.Module | None
) -> tuple[Layout, list[Site]]:
    for family in FAMILIES:
        layout = family.layout(model)
        if layout is not None:
            require(embedding is None, "embedding", f"None for {family.name}", embedding)
            return layout, choose(layout, layers)
    names = [layers] if isinstance(layers, str) and layers != ENDS_AND_MIDDLE else layers
    is_named = not isinstance(names, str) and all(isinstance(name, str) for name in names)
    if not is_named:
        known = ", ".join(family.name for family in FAMILIES)
        expected = f"a model of {known}, or the mixers by name in `layers`"
        complain("model", expected, f"{type(model).__module__}.{type(model).__qualname__}")
    require(len(set(names)) == len(names) > 0, "layers", "each layer once", list(names))
    layout = NamedLayers().layout_of(model, names, embedding)
    return layout, layout.sites


def _refuse_wrapped(model: nn.Module) -> None:
    """What is compiled would go on without the hooks; a wrapper has parameters of its own by now."""
    require(isinstance(model, nn.Module), "model", "an nn.Module", type(model).__name__)
    wrappers = (
        "OptimizedModule",
        "DistributedDataParallel",
        "DataParallel",
        "FSDP",
        "FullySharded",
    )
    for name, module in model.named_modules():
        kind = type(module).__name__
        is_wrapper = kind.startswith(wrappers)
        is_compiled = module._compiled_call_impl is not None
        where = f"{kind} at {name or 'its root'}"
        expected = "one that is not yet compiled or wrapped (augment it first)"
        require(not is_wrapper and not is_compiled, "model", expected, where)


def settings_with_defaults(width: int, given: dict) -> dict:
    """The keyword arguments of `Resona` that `augment` uses."""
    settings = {"mix": "additive"} | given
    if "num_heads" not in settings:
        head_dim = settings.get("head_dim") or max(n for n in range(1, 65) if width % n == 0)
        settings["num_heads"] = max(width // head_dim, 1)
    settings.setdefault("zero_init_output", settings["mix"] == "additive")
    settings.setdefault("encoder", "tied" if settings.get("trainable_retrieval") else "identity")
    return settings


class Augmentation:
    """What `augment` did to a model.

    Attributes:
        model: the model.
        layers: {name of the layer: its Resona}.
        settings: keyword arguments of every `Resona`.
        max_length: of the caches; may be changed.
        mesh: whose ranks share each sequence, or None; may be changed.
    """

    def __init__(
        self,
        model: nn.Module,
        layout: Layout,
        sites: list[Site],
        max_length: int | None,
        resona_kwargs: dict,
        mesh: DeviceMesh | None = None,
    ) -> None:
        require(max_length is None or max_length >= 1, "max_length", "None or positive", max_length)
        self.model, self.layout = model, layout
        self.settings = settings_with_defaults(layout.width, resona_kwargs)
        self._passes = Passes(model, layout, uuid.uuid4().hex, max_length)
        self.mesh = mesh
        self._frozen: list[nn.Parameter] = []

        new = [self._new_resona(site) for site in sites]
        if layout.is_named:
            model.add_module(CHILD, layout.new_child)
        for site, resona in zip(sites, new, strict=True):
            site.owner.add_module(site.child, resona)
        carrier = layout.family.carrier
        self._passes.insertions = [Insertion(self._passes, site, carrier) for site in sites]
        self._handles = self._passes.register()
        setattr(model, ATTRIBUTE, self)

    def _new_resona(self, site: Site) -> Resona:
        taken = hasattr(site.owner, site.child)
        require(not taken, "model", f"no {site.child} in {site.name} yet", "one")
        weight = self.layout.embedding.weight
        device = next(site.mixer.parameters(), weight).device
        settings = {"dtype": weight.dtype, "device": device} | self.settings
        return Resona(self.layout.width, **settings).train(site.mixer.training)

    # --- Use -------------------------------------------------------------------------------------

    @property
    def layers(self) -> dict[str, Resona]:
        return {insertion.name: insertion.resona for insertion in self._passes.insertions}

    @property
    def max_length(self) -> int | None:
        return self._passes.max_length

    @max_length.setter
    def max_length(self, max_length: int | None) -> None:
        self._passes.max_length = max_length

    @property
    def mesh(self) -> DeviceMesh | None:
        return self._passes.mesh

    @mesh.setter
    def mesh(self, mesh: DeviceMesh | None) -> None:
        is_line = mesh is None or mesh.ndim == 1
        require(is_line, "mesh", 'one of one dimension, as mesh["context"]', mesh)
        self._passes.mesh = mesh

    def parameters(self) -> Iterator[nn.Parameter]:
        """Of the new layers, the frozen ones too."""
        for resona in self.layers.values():
            yield from resona.parameters()

    def set(self, *, top_k: int | None = None, alpha: float | None = None) -> None:
        """Turn the knobs of all layers at test time: chunks per query, weight of what is retrieved.

        Raises:
            ValueError: out of range, or alpha with mix="gate", which computes its own.
        """
        mix = self.settings["mix"]
        if top_k is not None:
            require(top_k >= 1, "top_k", "at least 1", top_k, "Augmentation.set")
        if alpha is not None:
            valid = mix == "additive" or (mix == "fixed" and 0 <= alpha <= 1)
            expected = 'a number with mix="additive", one in [0, 1] with "fixed", None with "gate"'
            require(valid, "alpha", expected, f'{alpha} with "{mix}"', "Augmentation.set")
        changed = {"top_k": top_k, "alpha": alpha}
        changed = {name: value for name, value in changed.items() if value is not None}
        self.settings |= changed
        for resona in self.layers.values():
            vars(resona).update(changed)

    def freeze_backbone(self) -> None:
        """Train the new layers only: all other parameters no longer require gradients."""
        new = {id(p) for p in self.parameters()}
        backbone = [p for p in self.model.parameters() if p.requires_grad and id(p) not in new]
        for parameter in backbone:
            parameter.requires_grad_(False)
        self._frozen += backbone

    def unfreeze_backbone(self) -> None:
        """Undo `freeze_backbone`: what was frozen before it stays so."""
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self._frozen = []

    def parameter_groups(self, lr: float, resona_lr: float, **options) -> list[dict]:
        """Groups for an optimizer: the backbone at lr, the new layers at resona_lr (in the paper higher).

        options: further keys of both groups, as weight_decay. Frozen parameters are in neither.
        """
        new = [p for p in self.parameters() if p.requires_grad]
        ids = {id(p) for p in new}
        old = [p for p in self.model.parameters() if p.requires_grad and id(p) not in ids]
        groups = [
            {"name": "backbone", "params": old, "lr": lr, **options},
            {"name": "resona", "params": new, "lr": resona_lr, **options},
        ]
        return [group for group in groups if group["params"]]

    def remove(self) -> nn.Module:
        """Take all of it out; the model is what it was, bit for bit. Returns the model."""
        require(self._handles != [], "model", "one that is augmented", "removed", "remove")
        self.unfreeze_backbone()
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self.layout.is_named:
            delattr(self.model, CHILD)
        else:
            for insertion in self._passes.insertions:
                delattr(insertion.site.owner, insertion.site.child)
        delattr(self.model, ATTRIBUTE)
        return self.model

    def make_cache(self) -> ModelCache:
        """An empty cache for `use_cache`."""
        return self.layout.family.new_cache(self._passes.owner, self.max_length)

    @contextlib.contextmanager
    def use_cache(self, cache: ModelCache) -> Iterator[ModelCache]:
        """Forwards within append to `cache`: for named layers, whose own cache nobody here knows."""
        require(isinstance(cache, ModelCache), "cache", "from make_cache", type(cache).__name__)
        before, self._passes.explicit = self._passes.explicit, cache
        try:
            yield cache
        finally:
            self._passes.explicit = before
