"""Any other model: mixers by the names of their modules, embeddings from the embedding module."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ._errors import complain, require
from .families import Family, Layout, Site

CHILD = "resona_layers"  # a ModuleList of the model: a mixer's parent may not bear another child


class NamedLayers(Family):
    """The mixer's first argument, or `hidden_states`, is its input x; what it returns, or the first
    of it, is y. Both are [B, T, d], as is the result of the embedding."""

    name = "model with named layers"
    packages = ()
    carrier = None
    cache = "past_key_values"

    def layout_of(
        self, model: nn.Module, names: Sequence[str], embedding: str | nn.Module | None
    ) -> Layout:
        modules = dict(model.named_modules())
        missing = [name for name in names if name not in modules or not name]
        require(not missing, "layers", "names of modules of the model", missing)
        require(not hasattr(model, CHILD), "model", f"no attribute {CHILD}", "one")
        owner = nn.ModuleList()
        sites = [
            Site(name, modules[name], modules[name], owner, str(i)) for i, name in enumerate(names)
        ]
        return Layout(self, model, find_embedding(model, embedding), sites, owner)


def find_embedding(model: nn.Module, embedding: str | nn.Module | None) -> nn.Module:
    """The token embedding: as told, else what Hugging Face models name, else the only nn.Embedding."""
    if isinstance(embedding, str):
        found = dict(model.named_modules()).get(embedding)
        require(found is not None, "embedding", "the name of a module of the model", embedding)
        embedding = found
    if embedding is None and hasattr(model, "get_input_embeddings"):
        embedding = model.get_input_embeddings()
    if embedding is None:
        found = {name: m for name, m in model.named_modules() if isinstance(m, nn.Embedding)}
        if len(found) != 1:
            expected = (
                "its name, as the model has no get_input_embeddings() and not one nn.Embedding"
            )
            complain("embedding", expected, sorted(found))
        embedding = next(iter(found.values()))
    weight = getattr(embedding, "weight", None)
    is_matrix = weight is not None and weight.dim() == 2
    require(is_matrix, "embedding", "a module whose weight is [tokens, d]", embedding)
    return embedding
