"""Where embeddings, layers, mixers and caches are in each family of models.

A `Family` is recognised by the modules that define a model's classes, so none of the libraries is
imported here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from ._cache import ModelCache
from ._errors import complain, require

ENDS_AND_MIDDLE = "ends+middle"


@dataclass
class Site:
    """A layer that can be augmented."""

    name: str  # of the block, or of the mixer, in model.named_modules()
    block: nn.Module
    mixer: nn.Module
    owner: nn.Module  # gets the Resona as its child
    child: str


@dataclass
class Layout:
    """One model of a family."""

    family: Family
    backbone: nn.Module  # what one forward of it computes is a pass over T tokens
    embedding: nn.Module  # its weight is the embedding matrix
    sites: list[Site]
    new_child: nn.ModuleList | None = None  # of the model, where the blocks get none

    @property
    def width(self) -> int:
        return self.embedding.weight.shape[1]

    @property
    def is_named(self) -> bool:
        """Whether embeddings are what the embedding module returns, not what the first block gets."""
        return self.new_child is not None


class Family:
    """Models whose backbone holds `.layers` and a token embedding, and whose blocks hold a mixer.

    Attributes:
        name: for messages and saved files.
        packages: prefixes of the modules that define its backbones.
        embedding: name of the token embedding in the backbone.
        mixers: names under which a block may hold its mixer.
        carrier: keyword argument that a block hands to its mixer unread, and on which a `Pass` can
            travel through gradient checkpointing. None if the family has no checkpointing of its own.
        cache: keyword argument of a block that holds the backbone's cache.
    """

    name: str
    packages: tuple[str, ...]
    embedding = "embeddings"
    mixers: tuple[str, ...] = ("mixer",)
    carrier: str | None
    cache: str

    def layout(self, model: nn.Module) -> Layout | None:
        """The one backbone of this family in `model`, or None."""
        found = [(name, m) for name, m in model.named_modules() if self._is_backbone(m)]
        if not found:
            return None
        names = [name or "the model" for name, _ in found]
        require(len(found) == 1, "model", f"one {self.name} backbone", f"{len(found)}: {names}")
        self.check_version()
        prefix, backbone = found[0]
        prefix = f"{prefix}.layers" if prefix else "layers"
        sites = [
            Site(f"{prefix}.{i}", block, mixer, block, "resona")
            for i, block in enumerate(backbone.layers)
            if (mixer := self._mixer(block)) is not None
        ]
        return Layout(self, backbone, getattr(backbone, self.embedding), sites)

    def check_version(self) -> None:
        """Raise if the installed library is not one that this family was written for."""

    def _is_backbone(self, module: nn.Module) -> bool:
        origins = [cls.__module__ for cls in type(module).__mro__]
        is_ours = any(
            origin == package or origin.startswith(package + ".")
            for origin in origins
            for package in self.packages
        )
        return is_ours and hasattr(module, "layers") and hasattr(module, self.embedding)

    def _mixer(self, block: nn.Module) -> nn.Module | None:
        return next((getattr(block, name) for name in self.mixers if hasattr(block, name)), None)

    def embeddings_of(self, args: tuple, kwargs: dict) -> Tensor:
        """The token embeddings, from the arguments of the first block."""
        return args[0] if args else kwargs["hidden_states"]

    # --- The backbone's cache --------------------------------------------------------------------

    def new_cache(self, owner: str, max_length: int | None) -> ModelCache:
        return ModelCache(owner, max_length)

    def caches_in(self, cache: object) -> list[ModelCache]:
        """The retrieval caches that a backbone's cache holds."""
        return [layer for layer in cache.layers if isinstance(layer, ModelCache)]

    def attach(self, cache: object, model_cache: ModelCache) -> None:
        """Behind all other layers, which some caches only make during the first forward."""
        cache.layers.append(model_cache)

    def holds_tokens(self, cache: object) -> bool:
        """Whether the backbone's own layers have seen tokens."""
        for layer in cache.layers:
            if isinstance(layer, ModelCache):
                continue
            previous = getattr(layer, "has_previous_state", None)
            if isinstance(previous, dict):
                previous = any(previous.values())
            if previous or (hasattr(layer, "get_seq_length") and layer.get_seq_length() > 0):
                return True
        return False


def choose(layout: Layout, layers: str | Sequence[int | str]) -> list[Site]:
    """The sites that `layers` names: "ends+middle", ids, or names of blocks or mixers."""
    sites = layout.sites
    require(sites != [], "model", "layers with a mixer", "none")
    if layers == ENDS_AND_MIDDLE:
        return [sites[i] for i in sorted({0, len(sites) // 2, len(sites) - 1})]
    layers = [layers] if isinstance(layers, str) else layers
    chosen = [
        _by_name(sites, layer) if isinstance(layer, str) else _by_id(layout, layer)
        for layer in layers
    ]
    names = [site.name for site in chosen]
    require(names != [], "layers", "at least one layer", "none")
    require(len(set(names)) == len(names), "layers", "each layer once", names)
    return chosen


def _by_name(sites: list[Site], name: str) -> Site:
    for site in sites:
        mixers = [n for n, module in site.block.named_children() if module is site.mixer]
        if name in (site.name, *(f"{site.name}.{mixer}" for mixer in mixers)):
            return site
    complain("layers", f"names of layers, as {sites[0].name}", repr(name))


def _by_id(layout: Layout, i: int) -> Site:
    depth = len(layout.backbone.layers)
    valid = isinstance(i, int) and not isinstance(i, bool) and -depth <= i < depth
    require(valid, "layers", f"ids from {-depth} to {depth - 1}", i)
    block = layout.backbone.layers[i]
    found = [site for site in layout.sites if site.block is block]
    require(found != [], "layers", "layers with a mixer", i)
    return found[0]
