"""Models of fla and mamba_ssm for a machine that cannot run their kernels.

`fla_standin` and `mamba_ssm_standin` are our own modules with the attributes, signatures and caches of the
published ones (fla 0.6.0, mamba_ssm 2.3.2.post1). `fla_package` and `mamba_ssm_package` are the published
models where those packages can be imported, with their mixers replaced, since these need a GPU.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

WIDTH, VOCABULARY, LAYERS = 32, 61, 4
DECAY = 0.8


def decay(x: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """The simplest recurrence: s_t = DECAY * s_{t-1} + x_t, y = tanh(s)."""
    state = torch.zeros_like(x[:, 0]) if state is None else state
    out = []
    for row in x.unbind(1):
        state = DECAY * state + row
        out.append(torch.tanh(state))
    return torch.stack(out, dim=1), state


# --- fla ------------------------------------------------------------------------------------------


class FlaDecay(nn.Module):
    """As fla.layers: everything by keyword, a tuple back, state kept under the layer's number."""

    def __init__(self, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.scale = nn.Parameter(torch.ones(WIDTH))

    def forward(
        self, hidden_states, attention_mask=None, past_key_values=None, use_cache=False, **kwargs
    ):
        assert set(kwargs) <= {"output_attentions", "cu_seqlens"}, kwargs
        state = None
        if past_key_values is not None and len(past_key_values) > self.layer_idx:
            kept = past_key_values[self.layer_idx]  # None after a reset
            state = None if kept is None else kept["recurrent_state"]
        x = hidden_states * self.scale
        if attention_mask is not None:
            x = x * attention_mask[:, -x.shape[1] :, None]
        borders = [0, x.shape[1]] if kwargs.get("cu_seqlens") is None else kwargs["cu_seqlens"]
        parts = []
        for begin, end in itertools.pairwise(borders):
            y, state = decay(x[:, begin:end], state if begin == 0 else None)
            parts.append(y)
        y = torch.cat(parts, dim=1)
        if past_key_values is not None:
            count = hidden_states.shape[1]
            past_key_values.update(recurrent_state=state, layer_idx=self.layer_idx, offset=count)
        return y, None, past_key_values


class FlaMlp(nn.Module):
    def forward(self, x, **kwargs):
        return x


class StandinLayer:
    """fla.models.cache_utils.FLALayer, as far as models use it."""

    def __init__(self):
        self.state, self.seen = None, 0

    def get_seq_length(self):
        return self.seen

    def _map_state(self, function):
        return {"recurrent_state": function(self.state["recurrent_state"])}

    def reset(self):
        self.state, self.seen = None, 0


class StandinCache:
    """fla.models.cache_utils.FLACache: its layers come with the first forward."""

    def __init__(self):
        self.layers = []

    def __len__(self):
        return len(self.layers)

    def __getitem__(self, i):
        return self.layers[i].state

    def update(self, recurrent_state, layer_idx, offset):
        while len(self.layers) <= layer_idx:
            self.layers.append(StandinLayer())
        layer = self.layers[layer_idx]
        layer.state, layer.seen = {"recurrent_state": recurrent_state}, layer.seen + offset

    def reorder_cache(self, index):
        states = [layer._map_state(lambda t: t.index_select(0, index)) for layer in self.layers]
        for layer, state in zip(self.layers, states, strict=True):
            layer.state = state

    def reset(self):
        for layer in self.layers:
            layer.reset()


def fla_standin():
    from transformers.modeling_layers import GradientCheckpointingLayer

    class Block(GradientCheckpointingLayer):
        def __init__(self, layer_idx):
            super().__init__()
            self.attn_norm, self.attn = nn.RMSNorm(WIDTH), FlaDecay(layer_idx)
            self.mlp_norm, self.mlp = nn.RMSNorm(WIDTH), FlaMlp()

        def forward(self, hidden_states, attention_mask=None, past_key_values=None, **kwargs):
            y, attentions, past_key_values = self.attn(
                hidden_states=self.attn_norm(hidden_states),
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                **kwargs,
            )
            hidden_states = hidden_states + y
            hidden_states = hidden_states + self.mlp(self.mlp_norm(hidden_states), **kwargs)
            return hidden_states, attentions, past_key_values

    class Backbone(nn.Module):
        __module__ = "fla.models.standin"

        def __init__(self):
            super().__init__()
            self.embeddings = nn.Embedding(VOCABULARY, WIDTH)
            self.layers = nn.ModuleList([Block(i) for i in range(LAYERS)])
            self.norm = nn.RMSNorm(WIDTH)

        def forward(
            self, ids, attention_mask=None, past_key_values=None, use_cache=False, **kwargs
        ):
            if use_cache and past_key_values is None:
                past_key_values = StandinCache()
            hidden = self.embeddings(ids)
            for layer in self.layers:
                hidden, _, past_key_values = layer(
                    hidden,
                    attention_mask=attention_mask,
                    past_key_values=past_key_values,
                    use_cache=use_cache,
                    **kwargs,
                )
            return self.norm(hidden), past_key_values

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.model, self.lm_head = Backbone(), nn.Linear(WIDTH, VOCABULARY)

        def forward(self, ids, **kwargs):
            hidden, cache = self.model(ids, **kwargs)
            return self.lm_head(hidden), cache

        def checkpoint(self):
            for layer in self.model.layers:
                layer.gradient_checkpointing = True
                layer._gradient_checkpointing_func = checkpoint_non_reentrant

    return Model()


def checkpoint_non_reentrant(function, *args):
    return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=False)


def fla_package():
    models = pytest.importorskip("fla.models", reason="fla is not installed", exc_type=ImportError)
    config = models.GLAConfig(
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_heads=2,
        vocab_size=VOCABULARY,
        fuse_norm=False,
        fuse_cross_entropy=False,
    )

    class Model(models.GLAForCausalLM):
        def forward(self, ids=None, **kwargs):
            output = super().forward(ids, **kwargs)
            return output.logits, output.past_key_values

        def checkpoint(self):
            self.activation_checkpointing_enable({"use_reentrant": False})

    model = Model(config)
    for i, block in enumerate(model.model.layers):
        block.attn, block.mlp = FlaDecay(i), FlaMlp()
    return model


# --- mamba_ssm ------------------------------------------------------------------------------------


class MambaSsmDecay(nn.Module):
    """As mamba_ssm.modules: state lies in inference_params under the layer's number."""

    def __init__(self, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.scale = nn.Parameter(torch.ones(WIDTH))

    def forward(self, hidden_states, inference_params=None):
        state = None
        if inference_params is not None and inference_params.seqlen_offset > 0:
            state = inference_params.key_value_memory_dict[self.layer_idx]
        y, state = decay(hidden_states * self.scale, state)
        if inference_params is not None:
            inference_params.key_value_memory_dict[self.layer_idx] = state
        return y


class StandinParams:
    """mamba_ssm.utils.generation.InferenceParams."""

    def __init__(self, max_seqlen, max_batch_size):
        self.max_seqlen, self.max_batch_size = max_seqlen, max_batch_size
        self.seqlen_offset, self.key_value_memory_dict = 0, {}

    def reset(self, max_seqlen, max_batch_size):
        self.max_seqlen, self.max_batch_size, self.seqlen_offset = max_seqlen, max_batch_size, 0


def mamba_ssm_standin():
    class Block(nn.Module):
        def __init__(self, layer_idx):
            super().__init__()
            self.norm, self.mixer = nn.LayerNorm(WIDTH), MambaSsmDecay(layer_idx)

        def forward(self, hidden_states, residual=None, inference_params=None, **mixer_kwargs):
            residual = hidden_states if residual is None else hidden_states + residual
            x = self.norm(residual)
            return self.mixer(x, inference_params=inference_params, **mixer_kwargs), residual

    class MixerModel(nn.Module):
        __module__ = "mamba_ssm.models.standin"

        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(VOCABULARY, WIDTH)
            self.layers = nn.ModuleList([Block(i) for i in range(LAYERS)])
            self.norm_f = nn.LayerNorm(WIDTH)

        def forward(self, ids, inference_params=None, **mixer_kwargs):
            hidden, residual = self.embedding(ids), None
            for layer in self.layers:
                hidden, residual = layer(hidden, residual, inference_params=inference_params)
            return self.norm_f(hidden + residual)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone, self.lm_head = MixerModel(), nn.Linear(WIDTH, VOCABULARY)

        def forward(self, ids, inference_params=None):
            return self.lm_head(self.backbone(ids, inference_params=inference_params))

    return Model(), StandinParams


def mamba_ssm_package():
    module = pytest.importorskip(
        "mamba_ssm.models.mixer_seq_simple",
        reason="mamba_ssm is not installed",
        exc_type=ImportError,
    )
    from mamba_ssm.models.config_mamba import MambaConfig
    from mamba_ssm.utils.generation import InferenceParams

    config = MambaConfig(d_model=WIDTH, n_layer=LAYERS, vocab_size=VOCABULARY, rms_norm=False)
    config.fused_add_norm, config.pad_vocab_size_multiple = False, 1

    class Model(module.MambaLMHeadModel):
        def forward(self, ids, inference_params=None):
            return super().forward(ids, inference_params=inference_params).logits

    model = Model(config)
    for i, block in enumerate(model.backbone.layers):
        block.mixer = MambaSsmDecay(i)
    return model, InferenceParams
