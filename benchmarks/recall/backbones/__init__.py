"""The backbones by name.

On a CPU, and on a GPU where the package is missing, the plain PyTorch form runs; `source` says whose
code a result came from. The GPU packages have not been run yet.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import nn

from . import attention, convolution, linear, state_space
from .base import Backbone, Spec, absent, no_mixer

OWN = "resona_ext benchmarks"
TRANSFORMERS = "transformers"


def _accelerated(
    name: str, summary: str, plain: Callable, package: str, fast: Callable
) -> Backbone:
    """The package's layer on a GPU where it is installed, else our plain form."""

    def is_fast(device: str) -> bool:
        return device == "cuda" and absent(package) is None

    def build(spec: Spec) -> nn.Module:
        return fast(spec) if is_fast(spec.device) else plain(spec)

    return Backbone(name, summary, build, source=lambda device: package if is_fast(device) else OWN)


def _maintained(backbone: Backbone, module: str) -> Backbone:
    """The plain form is that of transformers, so without it the backbone is missing."""
    source = backbone.source

    def missing(device: str) -> str | None:
        return None if source(device) != OWN else state_space.no_transformers(module)

    def named(device: str) -> str:
        return TRANSFORMERS if source(device) == OWN else source(device)

    return replace(backbone, missing=missing, source=named)


_fla, _mamba = state_space.fla_layer, state_space.mamba_ssm_layer
_ALL = (
    _maintained(
        _accelerated(
            "mamba2",
            "state-space duality",
            state_space.transformers_mamba2,
            "mamba_ssm",
            _mamba("Mamba2", d_state=state_space.SSD_STATES),
        ),
        "mamba2.modeling_mamba2",
    ),
    _accelerated(
        "gla",
        "gated linear attention",
        linear.Gla,
        "fla",
        _fla("GatedLinearAttention", expand_k=0.5),
    ),
    _accelerated("deltanet", "delta rule", linear.DeltaNet, "fla", _fla("DeltaNet")),
    Backbone("baseconv", "gated convolution of Zoology", convolution.BaseConv),
    Backbone("attention", "causal softmax attention", attention.Attention),
    Backbone(
        "window-attention",
        "softmax attention in a sliding window",
        lambda spec: attention.Attention(spec, window=spec.window),
    ),
    _accelerated(
        "mamba",
        "selective state space",
        state_space.Mamba,
        "mamba_ssm",
        _mamba("Mamba", d_state=state_space.STATES),
    ),
    _maintained(
        _accelerated(
            "gated-deltanet",
            "delta rule with decay",
            state_space.transformers_gated_deltanet,
            "fla",
            lambda spec: _fla("GatedDeltaNet", head_dim=spec.width // spec.heads, expand_v=1.0)(
                spec
            ),
        ),
        "qwen3_next.modeling_qwen3_next",
    ),
    _accelerated(
        "retnet", "retention", linear.RetNet, "fla", _fla("MultiScaleRetention", expand_v=1.0)
    ),
    _accelerated(
        "gsa",
        "gated slot attention",
        linear.Gsa,
        "fla",
        _fla("GatedSlotAttention", num_slots=32, gate_logit_normalizer=16),
    ),
    Backbone("rwkv5", "RWKV-5 time mixing", linear.Rwkv5),
    Backbone("hyena", "implicit long convolutions", convolution.Hyena),
    Backbone("h3", "shift and diagonal state spaces", convolution.H3),
    Backbone("mambaformer", "Mamba and attention in turns", attention.mambaformer),
    Backbone("hymba", "windowed attention beside Mamba", attention.Hymba),
    Backbone("hymba-retrieval", "the same under the retrieval mask", attention.HymbaRetrieval),
)
BACKBONES: dict[str, Backbone] = {backbone.name: backbone for backbone in _ALL}
# Not a mixer but a whole model, which ../pretrained.py makes.
PRETRAINED = Backbone(
    "pretrained",
    "the Hugging Face model task.model of a qa task",
    no_mixer,
    missing=lambda device: absent("transformers"),
    source=lambda device: TRANSFORMERS,
)


def find(name: str) -> Backbone:
    return PRETRAINED if name == PRETRAINED.name else BACKBONES[name]


__all__ = ["BACKBONES", "PRETRAINED", "Backbone", "Spec", "find"]
