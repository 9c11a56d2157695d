"""The layer with a selection made elsewhere."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from layer_support import TOP_K, inputs, make

import resona_ext
from resona_ext import Resona
from resona_ext._layer_parts import rms_norm


def selection_of(layer: Resona, x: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
    """What the layer itself would retrieve."""
    encoders, size = layer.encoders, layer.chunk_size
    context = encoders.context_embedding(rms_norm(e), layer.q_proj.weight)
    chunks = resona_ext.pool_chunks(context, chunk_size=size)
    query = encoders.query_embedding(x, layer.q_proj(x))
    settings = {"chunk_size": size, "top_k": layer.top_k, "context_length": e.shape[1]}
    return resona_ext.retrieve(query, chunks, **settings).indices


@pytest.mark.parametrize("settings", [{}, {"retrieval_heads": 2, "num_kv_heads": 2}], ids=str)
def test_given_indices_take_the_place_of_the_search(settings):
    layer = make(**settings)
    x, e, y = inputs()
    indices = selection_of(layer, x, e)
    torch.testing.assert_close(layer(x, e, y, indices=indices), layer(x, e, y))
    wider = F.pad(indices, (1, 2), value=-1)  # any k, unused slots anywhere
    torch.testing.assert_close(layer(x, e, y, indices=wider), layer(x, e, y))
    none = torch.full_like(indices, -1)
    assert torch.equal(layer(x, e, y, indices=none), y)


@pytest.mark.parametrize("side", ["left", "right"])
def test_given_indices_of_padded_rows(side):
    layer = make()
    x, e, y = inputs(batch=1, length=14)
    padded = [F.pad(t, (0, 0, 5, 0) if side == "left" else (0, 0, 0, 5)) for t in (x, e, y)]
    first = 5 if side == "left" else 0
    indices = torch.full((1, 19, 1, TOP_K), 10**6, dtype=torch.int32)
    indices[:, first : first + 14] = selection_of(layer, x, e)
    mask = torch.zeros(1, 19, dtype=torch.long)
    mask[:, first : first + 14] = 1
    out = layer(*padded, attention_mask=mask, indices=indices)
    torch.testing.assert_close(out[:, first : first + 14], layer(x, e, y))


def test_given_indices_that_do_not_fit():
    layer = make()
    x, e, y = inputs(length=6)
    good = torch.full((2, 6, 1, 3), -1, dtype=torch.int32)
    wanted = r"Resona: indices must be torch.int32 \[2, 6, 1, k >= 1\], got"
    for bad in (good.long(), good[:, :5], good[..., 0], good[..., :0], good.expand(2, 6, 2, 3)):
        with pytest.raises(ValueError, match=wanted):
            layer(x, e, y, indices=bad)
    with pytest.raises(RuntimeError, match="indices"):  # of the operator: not eligible
        layer(x, e, y, indices=torch.zeros_like(good))
    with torch.no_grad(), pytest.raises(ValueError, match="indices must be None with a cache"):
        layer(x, e, y, indices=good, cache=layer.make_cache(2, 8))
    with pytest.raises(ValueError, match="indices must be None with trainable_retrieval"):
        make(trainable_retrieval=True)(x, e, y, indices=good)
    packed = {"cu_seqlens": torch.tensor([0, 6], dtype=torch.int32), "indices": good[:1]}
    with pytest.raises(ValueError, match="indices must be None with cu_seqlens and eligibility"):
        make(eligibility="inclusive")(x[:1], e[:1], y[:1], **packed)
