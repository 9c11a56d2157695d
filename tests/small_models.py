"""Small models of real architectures, with random weights, for the tests of the integrations."""

from __future__ import annotations

import pytest
import torch

transformers = pytest.importorskip(
    "transformers", reason="transformers 5.23 wants Python >= 3.11", exc_type=ImportError
)

VOCABULARY, WIDTH, LAYERS = 61, 32, 4
BASE = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": LAYERS}
BASE |= {"state_size": 8, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
KINDS = {
    "mamba2": ("Mamba2", {"num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 16}),
    "mamba": ("Mamba", {"time_step_rank": 4}),
    "falcon_mamba": ("FalconMamba", {"time_step_rank": 4}),
}
SETTINGS = {"chunk_size": 4, "top_k": 2}  # of Resona


def make_model(kind: str = "mamba2", **changes):
    """A causal language model in eval mode."""
    name, settings = KINDS[kind]
    config = getattr(transformers, f"{name}Config")(**(BASE | settings | changes))
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


def tokens(batch: int = 2, length: int = 30) -> torch.Tensor:
    return torch.randint(1, VOCABULARY, (batch, length))


@torch.no_grad()
def wake(augmentation, std: float = 0.3) -> None:
    """Give the new layers a voice: they start by adding zero."""
    for layer in augmentation.layers.values():
        layer.o_proj.weight.normal_(std=std)


def logits(model, ids, **arguments) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False, **arguments).logits
