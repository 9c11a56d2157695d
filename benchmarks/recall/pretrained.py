"""A Hugging Face causal language model in the place of a backbone, with Resona put in by `augment`."""

from __future__ import annotations

import importlib

from torch import Tensor, nn

from resona_ext import augment

from .config import Cell
from .model import Wanted


class PretrainedModel(nn.Module):
    """Called as model.RecallModel is. branch.options are the keywords of `augment`.

    Raises:
        ValueError: the model cannot be loaded, is of another vocabulary than the task, or `augment`
            does not know it.
    """

    def __init__(self, cell: Cell) -> None:
        super().__init__()
        place = cell.task["model"]
        library = importlib.import_module("transformers")
        try:
            self.model = library.AutoModelForCausalLM.from_pretrained(place).float()
        except Exception as error:  # a missing folder, file or connection: many kinds
            reason = (str(error).splitlines() or ["no reason given"])[0]
            raise ValueError(f"model: cannot load {place}: {reason}") from error
        size = self.model.get_output_embeddings().weight.shape[0]
        if cell.make_task().vocabulary != size:
            got = cell.make_task().vocabulary
            raise ValueError(f"task.vocabulary: expected {size}, that of {place}, got {got}")
        self.branches: list[nn.Module] = []
        if cell.branch.kind == "resona":
            spread = cell.branch.layer == "spread"
            layers = "ends+middle" if spread else list(cell.branch_layers)
            made = augment(self.model, layers, **cell.branch.options)
            self.branches = list(made.layers.values())

    def forward(self, tokens: Tensor, wanted: Wanted) -> Tensor:
        return self.model(input_ids=tokens, use_cache=False).logits[wanted]
