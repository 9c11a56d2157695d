"""Layers and inputs that the tests of the layer share, and the layer computed independently."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from resona_ext.layer import Resona

D_MODEL, HEADS, CHUNK, TOP_K = 12, 4, 3, 2
BASE = {"chunk_size": CHUNK, "top_k": TOP_K}


@pytest.fixture(autouse=True)
def one_thread_and_seed():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def last_token(chunks: torch.Tensor) -> torch.Tensor:
    return chunks[:, :, -1]


class TinyEncoder(nn.Module):
    """A context encoder that is neither linear nor blind to order."""

    def __init__(self, heads: int, dim: int, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.heads = heads
        self.map = nn.Linear(CHUNK * D_MODEL, heads * dim, dtype=dtype)

    def forward(self, chunks: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.map(chunks.flatten(2))).unflatten(-1, (self.heads, -1))


def make(dtype: torch.dtype = torch.float64, **settings) -> Resona:
    """A layer in which no parameter that starts at a special value still has it."""
    layer = Resona(D_MODEL, HEADS, dtype=dtype, **(BASE | settings))
    with torch.no_grad():
        parameters = [layer.key_conv_weight, layer.score_scale, layer.sink]
        if layer.gate is not None:
            parameters += layer.gate.parameters()
        for parameter in parameters:
            if parameter is not None:
                parameter.normal_()
    return layer


def inputs(batch: int = 2, length: int = 14, dtype: torch.dtype = torch.float64):
    """Hidden states, embeddings and mixer output."""
    return [torch.randn(batch, length, D_MODEL, dtype=dtype) for _ in range(3)]


def dense_norm(x):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def dense_rotate(x, base):
    """x [T, heads, D] as complex numbers turned by position * base^(-i / (D / 2))."""
    half = x.shape[-1] // 2
    turn = torch.arange(len(x))[:, None] * base ** (-torch.arange(half) / half).double()
    pairs = torch.complex(x[..., :half], x[..., half:])
    pairs = pairs * torch.polar(torch.ones_like(turn), turn)[:, None]
    return torch.cat([pairs.real, pairs.imag], dim=-1)


def dense_selection(layer, p, x, e, settings):
    """Which chunks each token retrieves, bool [R, T, C], and all similarities [R, T, C]."""
    heads = settings.get("retrieval_heads", 1)
    encoder = settings.get("encoder", "tied")
    from_query = settings.get("query_encoder") == "query"
    context = dense_norm(e) if settings.get("normalize_embeddings", True) else e
    query_map = p["q_proj.weight" if from_query else "encoders.query_map.weight"]
    has_own_map = encoder == "separate" or (encoder == "identity" and from_query)
    context_map = p["encoders.context_map.weight"] if has_own_map else query_map
    query = (x @ query_map.T).unflatten(-1, (heads, -1))
    chunks = [context[j * CHUNK : (j + 1) * CHUNK] for j in range(len(e) // CHUNK)]
    if isinstance(encoder, str):
        chunk = [(tokens.mean(0) @ context_map.T).unflatten(-1, (heads, -1)) for tokens in chunks]
    else:
        chunk = [encoder(tokens[None, None])[0, 0].reshape(heads, -1) for tokens in chunks]
    chunk = torch.stack(chunk) if chunk else query[:0]
    similarity = F.cosine_similarity(query[:, None], chunk[None], dim=-1).permute(2, 0, 1)

    slack = 1 if settings.get("eligibility") == "inclusive" else 0
    selected = torch.zeros_like(similarity, dtype=torch.bool)
    for r, t in itertools.product(range(heads), range(len(x))):
        count = min((t + slack) // CHUNK, len(chunks))
        best = similarity[r, t, :count].topk(min(settings["top_k"], count)).indices
        selected[r, t, best] = True
    return selected, similarity


def dense_branch(layer, x, e, settings):
    """c and the rows with something eligible, for one sequence: x and e are [T, d]."""
    p = dict(layer.named_parameters())
    heads, kv_heads = HEADS, settings.get("num_kv_heads", HEADS)
    group = kv_heads // settings.get("retrieval_heads", 1)
    source = dense_norm(e) if settings.get("normalize_key_value") else e
    query = (x @ p["q_proj.weight"].T).unflatten(-1, (heads, -1))
    value = (source @ p["v_proj.weight"].T).unflatten(-1, (kv_heads, -1))
    if width := settings.get("key_conv", 0):
        taps = p["key_conv_weight"]
        rows = [
            sum(taps[s] * source[t - s] for s in range(min(width, t + 1))) for t in range(len(e))
        ]
        source = torch.stack(rows)
    key = (source @ p["k_proj.weight"].T).unflatten(-1, (kv_heads, -1))
    if base := settings.get("rope_base"):
        query, key = dense_rotate(query, base), dense_rotate(key, base)

    selected, similarity = dense_selection(layer, p, x, e, settings)
    tail = (0, len(e) % CHUNK)
    mask = F.pad(selected.repeat_interleave(CHUNK, dim=2), tail)
    logit_bias = torch.zeros(mask.shape, dtype=x.dtype)
    sink = torch.full((heads,), -torch.inf, dtype=x.dtype)
    if settings.get("trainable_retrieval"):
        weighed = p["score_scale"][:, None, None] * similarity
        logit_bias, sink = F.pad(weighed.repeat_interleave(CHUNK, dim=2), tail), p["sink"]

    out = []
    for h in range(heads):
        kv = h // (heads // kv_heads)
        r = kv // group
        row_has = mask[r].any(-1, keepdim=True)
        # The sink is one more key, of zeros, whose logit is the bias. Empty rows see all: no NaN.
        bias = logit_bias[r].masked_fill(~mask[r] & row_has, -torch.inf)
        bias = torch.cat([bias, sink[h].expand(len(x), 1)], dim=1)
        k, v = (F.pad(tensor[:, kv], (0, 0, 0, 1))[None] for tensor in (key, value))
        attended = F.scaled_dot_product_attention(query[None, :, h], k, v, attn_mask=bias[None])[0]
        out.append(torch.where(row_has, attended, 0.0))
    c = torch.cat(out, dim=-1) @ p["o_proj.weight"].T
    if settings.get("mlp_dim"):
        normed = dense_norm(c)
        hidden = F.silu(normed @ p["mlp.gate.weight"].T) * (normed @ p["mlp.up.weight"].T)
        c = c + hidden @ p["mlp.down.weight"].T
    return c, selected[0].any(-1)


def dense_layer(layer, x, e, y, settings):
    settings = BASE | settings
    branches = [dense_branch(layer, x[b], e[b], settings) for b in range(len(x))]
    c = torch.stack([branch[0] for branch in branches])
    has = torch.stack([branch[1] for branch in branches]).unsqueeze(-1)
    mix = settings.get("mix", "gate")
    if mix == "additive":
        mixed = y + settings.get("alpha", 1.0) * c
    elif mix == "fixed":
        alpha = settings.get("alpha", 0.5)
        mixed = (1 - alpha) * y + alpha * c
    else:
        a = 1 / (1 + torch.exp(-(x @ layer.gate.weight.T + layer.gate.bias)))
        mixed = (1 - a) * y + a * c
    return torch.where(has, mixed, y) if settings.get("keep_empty_rows", True) else mixed


CASES = {
    "default": {},
    "grouped heads": {"num_kv_heads": 2},
    "head dim": {"head_dim": 5, "num_kv_heads": 1},
    "projected": {"retrieval_dim": 5},
    "wider than the model": {"retrieval_dim": 20},
    "retrieval heads": {"retrieval_heads": 2, "retrieval_dim": 6, "num_kv_heads": 2},
    "identity": {"encoder": "identity", "retrieval_dim": 4},
    "separate": {"encoder": "separate"},
    "last token": {"encoder": last_token, "retrieval_dim": D_MODEL},
    "module": {"encoder": TinyEncoder(2, 5), "retrieval_heads": 2, "retrieval_dim": 5},
    "attention query": {"query_encoder": "query"},
    "attention query per head": {"query_encoder": "query", "retrieval_heads": 4},
    "attention query, identity": {"query_encoder": "query", "encoder": "identity"},
    "inclusive": {"eligibility": "inclusive"},
    "inclusive module": {"eligibility": "inclusive", "encoder": TinyEncoder(1, D_MODEL)},
    "inclusive rotary": {"eligibility": "inclusive", "rope_base": 100.0, "head_dim": 4},
    "rotary": {"rope_base": 100.0, "head_dim": 4},
    "raw retriever": {"normalize_embeddings": False},
    "normed values": {"normalize_key_value": True, "key_conv": 2},
    "key convolution": {"key_conv": 3},
    "trainable": {"trainable_retrieval": True, "retrieval_dim": 7},
    "trainable heads": {"trainable_retrieval": True, "retrieval_heads": 4, "retrieval_dim": 5},
    "trainable identity": {"trainable_retrieval": True, "encoder": "identity"},
    "trainable separate": {"trainable_retrieval": True, "encoder": "separate", "top_k": 4},
    "trainable query": {"trainable_retrieval": True, "query_encoder": "query"},
    "trainable module": {
        "trainable_retrieval": True,
        "encoder": TinyEncoder(2, 5),
        "retrieval_heads": 2,
        "retrieval_dim": 5,
        "eligibility": "inclusive",
    },
    "mlp": {"mlp_dim": 9},
    "fixed": {"mix": "fixed"},
    "fixed alpha": {"mix": "fixed", "alpha": 0.2},
    "additive": {"mix": "additive", "alpha": 0.7},
    "empty rows mixed": {"keep_empty_rows": False},
}
# Per-sequence layouts must agree with single runs whatever reads neighbours or positions.
LAYOUT_CASES = [
    "default",
    "inclusive",
    "inclusive module",
    "inclusive rotary",
    "key convolution",
    "rotary",
    "module",
    "trainable heads",
    "trainable module",
    "empty rows mixed",
]
