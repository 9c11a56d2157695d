"""Parts of the layer: row rearrangement, rotary angles, taps, and the encoders of the retriever.

Nothing here asks the device for a value, so all of it works inside a captured graph. Letters as in
`functional.py`; d is the model width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORM_EPS = 1e-6
ENCODERS = ("tied", "identity", "separate")
QUERY_ENCODERS = ("hidden", "query")
ELIGIBILITY = ("strict", "inclusive")
SEARCH = ("exact", "two_level")
DEFAULT_ALPHA = {"gate": None, "fixed": 0.5, "additive": 1.0}  # by mix


def require(condition: bool, argument: str, expected: str, got: object) -> None:
    """The one form of every complaint about an argument of the layer."""
    if not condition:
        raise ValueError(f"Resona: {argument} must be {expected}, got {got}")


def check_switches(layer: nn.Module) -> None:
    require(layer.chunk_size >= 1, "chunk_size", "at least 1", layer.chunk_size)
    require(layer.top_k >= 1, "top_k", "at least 1", layer.top_k)
    got = repr(layer.eligibility)
    require(layer.eligibility in ELIGIBILITY, "eligibility", f"one of {ELIGIBILITY}", got)
    require(layer.search in SEARCH, "search", f"one of {SEARCH}", repr(layer.search))
    for argument in ("superchunk_size", "probes"):
        size = getattr(layer, argument)
        if layer.search == "exact":
            require(size is None, argument, 'None with search="exact"', size)
        require(size is None or size >= 1, argument, "None or at least 1", size)
    require(layer.key_conv >= 0, "key_conv", "at least 0", layer.key_conv)
    if layer.rope_base is not None:
        require(layer.rope_base > 0, "rope_base", "None or positive", layer.rope_base)
        require(layer.head_dim % 2 == 0, "head_dim", "even with rope_base", layer.head_dim)
    require(layer.mix in DEFAULT_ALPHA, "mix", f"one of {tuple(DEFAULT_ALPHA)}", repr(layer.mix))
    if layer.mix == "gate":
        expected = 'None with mix="gate", which computes its own'
        require(layer.alpha is None, "alpha", expected, layer.alpha)
    else:
        require(layer.gate_bias == 0, "gate_bias", f'0 with mix="{layer.mix}"', layer.gate_bias)
    if layer.mix == "fixed":
        require(0 <= layer.alpha <= 1, "alpha", 'in [0, 1] with mix="fixed"', layer.alpha)


def check_inputs(
    d_model: int,
    x: Tensor,
    e: Tensor,
    y: Tensor | None,
    cu_seqlens: Tensor | None,
    attention_mask: Tensor | None,
) -> None:
    valid = x.dim() == 3 and x.shape[-1] == d_model
    require(valid, "hidden_states", f"[B, T, {d_model}]", list(x.shape))
    for argument, got in (("embeddings", e), ("mixer_output", y)):
        if got is not None:
            expected = f"{list(x.shape)} like hidden_states"
            require(got.shape == x.shape, argument, expected, list(got.shape))
    if attention_mask is not None:
        expected = "None with cu_seqlens (packed sequences have no padding)"
        require(cu_seqlens is None, "attention_mask", expected, "both")
        got = list(attention_mask.shape)
        require(got == list(x.shape[:2]), "attention_mask", f"{list(x.shape[:2])}", got)
        # An additive float mask (0 at tokens) would be read upside down.
        dtype, expected = attention_mask.dtype, "bool or integer, 1 at tokens"
        require(not dtype.is_floating_point, "attention_mask", expected, dtype)
    if cu_seqlens is not None:
        valid = cu_seqlens.dim() == 1 and cu_seqlens.numel() >= 1
        valid = valid and cu_seqlens.dtype == torch.int32
        got = f"{cu_seqlens.dtype} {list(cu_seqlens.shape)}"
        require(valid, "cu_seqlens", "torch.int32 [n + 1]", got)
        require(x.shape[0] == 1, "hidden_states", "of batch 1 with cu_seqlens", list(x.shape))


def rms_norm(x: Tensor) -> Tensor:
    """Root-mean-square norm over the last dimension, without weights."""
    return F.rms_norm(x, x.shape[-1:], eps=NORM_EPS)


def unit_norm(x: Tensor) -> Tensor:
    """x / |x| over the last dimension, in at least float32; a zero vector stays zero."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    is_zero = norm == 0
    # Both guards are needed: the inner keeps the gradient finite, the outer makes it zero.
    return torch.where(is_zero, 0.0, wide / torch.where(is_zero, 1.0, norm))


@torch.no_grad()
def init_retrieval_map(weight: Tensor, heads: int, *, random: bool = False) -> None:
    """Fill weight [R * E, d], the map from model width to R retrieval heads of width E.

    Not random, so that query and context, both mapped by it, keep the geometry of the embeddings:
    the identity where R * E == d (head r searches coordinates [rE, (r+1)E)) or E >= d (each head
    searches all of them; zeros beyond d). Below that, orthonormal rows: of all heads together while
    R * E <= d, so that no two heads see the same direction, else of each head by itself.

    Random: the same with random orthonormal rows (columns where E > d) everywhere.
    """
    rows, d_model = weight.shape
    dim = rows // heads
    # QR exists in float32 and float64 only.
    wide = {"device": weight.device, "dtype": torch.promote_types(weight.dtype, torch.float32)}
    if not random and (rows == d_model or dim >= d_model):
        copies = 1 if rows == d_model else heads
        weight.copy_(torch.eye(rows // copies, d_model, **wide).repeat(copies, 1))
        return
    blocks = 1 if rows <= d_model else heads
    for block in weight.view(blocks, rows // blocks, d_model):
        block.copy_(nn.init.orthogonal_(torch.empty(block.shape, **wide)))


def first_real_token(attention_mask: Tensor) -> Tensor:
    """Padding tokens left of the first 1 in every row: [B, T] -> [B]; T where there is no 1."""
    return ((attention_mask != 0).cumsum(dim=1) == 0).sum(dim=1)


def roll_rows(x: Tensor, shift: Tensor) -> Tensor:
    """Cyclic move of the rows of every batch element: out[b, t] = x[b, (t + shift[b]) mod T].

    x is [B, T] or [B, T, d]. With the padding of the left moved behind the real tokens, causality
    keeps it away from them, and the chunk grid starts at the first real token. Undo with -shift.
    """
    length = x.shape[1]
    row = torch.arange(length, device=x.device) + shift.unsqueeze(1)
    row = row % max(length, 1)
    return x.gather(1, row if x.dim() == 2 else row.unsqueeze(-1).expand_as(x))


def sequence_of(cu_seqlens: Tensor, length: int) -> Tensor:
    """The sequence to which each of `length` packed tokens belongs, [L]."""
    token = torch.arange(length, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    sequence = torch.searchsorted(cu_seqlens, token, right=True) - 1
    return sequence.clamp(0, cu_seqlens.numel() - 2)  # wrong borders must not index out of bounds


def local_positions(length: int, cu_seqlens: Tensor | None, device: torch.device) -> Tensor:
    """Position of each token in its own sequence, [L]."""
    token = torch.arange(length, device=device)
    if cu_seqlens is None:
        return token
    return token - cu_seqlens.long()[sequence_of(cu_seqlens, length)]


def shift_for_inclusive(
    query_input: Tensor, context_input: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Move every query one position on, so that the strict rule at p + 1 is the inclusive one at p.

    (j + 1)S - 1 <= p is (j + 1)S <= p + 1. Dense: one dummy token at the end of the context does
    it, since queries are aligned at the end. Packed, where T = L, every sequence grows by one:
    a dummy query in front and a dummy token behind. A chunk that holds a dummy token ends one
    position after the last query, so nothing ever reads it.

    Returns both inputs, the new borders and, when packed, where the query of each token went [T].
    """
    if cu_seqlens is None:
        return query_input, F.pad(context_input, (0, 0, 0, 1)), None, None
    _, length, width = context_input.shape
    sequences = cu_seqlens.numel() - 1
    token = torch.arange(length, device=cu_seqlens.device)
    context_row = token + sequence_of(cu_seqlens, length)
    query_row = context_row + 1
    grown = context_input.new_zeros(1, length + sequences, width)
    context = grown.index_copy(1, context_row, context_input)
    query = torch.zeros_like(grown, dtype=query_input.dtype).index_copy(1, query_row, query_input)
    step = torch.arange(sequences + 1, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return query, context, cu_seqlens + step, query_row


def group_chunks(x: Tensor, chunk_size: int, cu_seqlens: Tensor | None) -> Tensor:
    """Tokens chunk by chunk: [B, L, d] -> [B, L // S, S, d].

    Packed: chunks of sequence 0, 1, ... one after another, as `pool_chunks` orders them; what
    stands behind the last of them is some token or other, and nothing reads it.
    """
    length = x.shape[1]
    chunks = length // chunk_size
    if cu_seqlens is None:
        return x[:, : chunks * chunk_size].unflatten(1, (chunks, chunk_size))
    own = cu_seqlens.diff().long() // chunk_size
    end = own.cumsum(0)
    chunk = torch.arange(chunks, device=x.device)
    sequence = torch.searchsorted(end, chunk, right=True).clamp(0, own.numel() - 1)
    first = cu_seqlens.long()[sequence] + (chunk - (end - own)[sequence]) * chunk_size
    token = first.unsqueeze(1) + torch.arange(chunk_size, device=x.device)
    return x[:, token.clamp(0, max(length - 1, 0))]


def causal_taps(x: Tensor, weight: Tensor, position: Tensor) -> Tensor:
    """Causal depthwise convolution inside each sequence: sum over s of weight[s] * x[t - s].

    x [B, L, d], weight [n, d] with weight[0] on the token itself, position [L] in its sequence.
    """
    out = x * weight[0]
    for distance in range(1, weight.shape[0]):
        before = F.pad(x, (0, 0, distance, 0))[:, : x.shape[1]]
        out = out + weight[distance] * before.masked_fill((position < distance).unsqueeze(-1), 0)
    return out


def rotate(x: Tensor, position: Tensor, base: float) -> Tensor:
    """Rotary embedding, halves paired (GPT-NeoX order): x [B, L, H, D], position [L] or [B, L]."""
    half = x.shape[-1] // 2
    wide = torch.promote_types(x.dtype, torch.float32)
    # In float32 an angle would be off by 0.06 at position 1,000,000.
    frequency = base ** (-torch.arange(half, device=x.device, dtype=torch.float64) / half)
    angle = position.unsqueeze(-1) * frequency
    cos, sin = (f(angle).to(wide).unsqueeze(-2) for f in (torch.cos, torch.sin))
    left, right = x.to(wide).split(half, dim=-1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1).to(x.dtype)


def score_scale_and_sink(
    layer: nn.Module, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """Both in the dtype that the operators want beside queries of `dtype`."""
    if not layer.trainable_retrieval:
        return None, None
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return layer.score_scale.to(wide), layer.sink.to(wide)


def search_settings(layer: nn.Module) -> dict[str, object]:
    """Keyword arguments of a search or a cache.

    Sizes wait while the search is exact, so that the attribute `search` can be turned alone.
    """
    is_exact = layer.search == "exact"
    sizes = {
        name: None if is_exact else getattr(layer, name) for name in ("superchunk_size", "probes")
    }
    return {"search": layer.search, **sizes}


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), no biases: 3 * d_model * hidden weights."""

    def __init__(self, d_model: int, hidden: int, device=None, dtype=None) -> None:
        super().__init__()
        factory_kwargs = {"bias": False, "device": device, "dtype": dtype}
        self.gate = nn.Linear(d_model, hidden, **factory_kwargs)
        self.up = nn.Linear(d_model, hidden, **factory_kwargs)
        self.down = nn.Linear(hidden, d_model, **factory_kwargs)

    def reset_parameters(self) -> None:
        for projection in (self.gate, self.up, self.down):
            projection.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Encoders(nn.Module):
    """What searches and what is searched: the query and context encoder of `Resona`.

    `Resona` documents the kinds. Unless trainable, nothing here enters the autograd graph: a hard
    mask would only send zeros back.
    """

    def __init__(
        self,
        d_model: int,
        heads: int,
        dim: int,
        encoder: str | Callable[[Tensor], Tensor],
        query_encoder: str,
        trainable: bool,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        expected = f"one of {ENCODERS} or a callable"
        require(encoder in ENCODERS or callable(encoder), "encoder", expected, repr(encoder))
        require(
            query_encoder in QUERY_ENCODERS,
            "query_encoder",
            f"one of {QUERY_ENCODERS}",
            repr(query_encoder),
        )
        self.heads = heads
        self.dim = dim
        self.encoder = encoder
        self.query_encoder = query_encoder
        self.trainable = trainable

        from_hidden = query_encoder == "hidden"
        own_context = encoder == "separate" or (encoder == "identity" and not from_hidden)

        def new_map(wanted: bool) -> nn.Linear | None:
            factory_kwargs = {"bias": False, "device": device, "dtype": dtype}
            return nn.Linear(d_model, heads * dim, **factory_kwargs) if wanted else None

        self.query_map = new_map(from_hidden)
        self.context_map = new_map(own_context)
        for module in self._maps():
            module.requires_grad_(trainable and encoder != "identity")
        if isinstance(encoder, nn.Module) and not trainable:
            encoder.requires_grad_(False)

    def _maps(self) -> list[nn.Linear]:
        return [module for module in (self.query_map, self.context_map) if module is not None]

    @property
    def is_pooled(self) -> bool:
        """Whether chunks are means of token embeddings, which the fused operator can do itself."""
        return isinstance(self.encoder, str)

    def reset_parameters(self) -> None:
        for module in self._maps():
            init_retrieval_map(module.weight, self.heads, random=self.encoder == "separate")

    def query_embedding(self, x: Tensor, query: Tensor) -> Tensor:
        """x [B, T, d], W_q x [B, T, H * D] -> [B, T, R, E]. No norm: cosine divides it out."""
        source = query if self.query_map is None else x
        source = source if self.trainable else source.detach()
        embedding = source if self.query_map is None else self.query_map(source)
        return embedding.unflatten(-1, (self.heads, self.dim))

    def context_embedding(self, e: Tensor, query_weight: Tensor) -> Tensor:
        """One vector per token, to be pooled: [B, L, d] -> [B, L, R, E]; map and mean commute.

        query_weight is W_q, the map that a "tied" context shares with query_encoder="query".
        """
        own = self.context_map if self.context_map is not None else self.query_map
        weight = query_weight if own is None else own.weight
        if not self.trainable:
            e, weight = e.detach(), weight.detach()
        return F.linear(e, weight).unflatten(-1, (self.heads, self.dim))

    def chunk_embedding(self, e: Tensor, chunk_size: int, cu_seqlens: Tensor | None) -> Tensor:
        """Unit vectors from the context encoder of the user: [B, L, d] -> [B, L // S, R, E]."""
        tokens = group_chunks(e if self.trainable else e.detach(), chunk_size, cu_seqlens)
        chunk = self.encoder(tokens)
        if chunk.dim() == 3 and self.heads == 1:
            chunk = chunk.unsqueeze(2)
        expected, got = [*tokens.shape[:2], self.heads, self.dim], list(chunk.shape)
        require(got == expected, "the result of encoder", f"[B, L // S, R, E] = {expected}", got)
        return unit_norm(chunk)

    def extra_repr(self) -> str:
        kind = self.encoder if self.is_pooled else "custom"
        size = f"heads={self.heads}, dim={self.dim}"
        return f"{size}, encoder={kind!r}, query_encoder={self.query_encoder!r}"
