"""The Resona branch as a module: search the past of each token, attend to the finds, mix them in.

Algorithms 1 to 3 of "Improving Context Copying in Linear Recurrence Models with Retrieval"
(arXiv 2503.22913). What the paper leaves open is a keyword argument here, never a second class.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ._layer_cache import cached_branch, check_cache, make_cache, make_sharded_cache
from ._layer_parts import (
    DEFAULT_ALPHA,
    Encoders,
    SwiGLU,
    causal_taps,
    check_inputs,
    check_switches,
    first_real_token,
    local_positions,
    require,
    rms_norm,
    roll_rows,
    rotate,
    shift_for_inclusive,
)
from ._layer_search import check_indices, roll_indices, search_and_attend
from .cache import ChunkCache

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from .distributed import Layout, ShardedChunkCache

MAX_HEAD_DIM = 256
DEFAULT_RETRIEVAL_DIM = 128
INITIAL_SCORE_SCALE = 10.0  # a cosine is small: at 1 or 2 the scores weigh too little to train


class Resona(nn.Module):
    """Retrieval branch beside one layer of a linear recurrent model.

    Letters: B batch, T tokens, d = d_model, H and Hkv query and key/value heads, D head dim,
    R retrieval heads, E retrieval dim, S chunk size, k chunks per query.

    With x the input of the augmented layer, e the token embeddings right after the embedding matrix
    and y the output of the layer's mixer (section 3.1 of the paper):

        query W_q x, keys W_k e, values W_v e                                   Algorithm 3
        the k chunks whose embedding is most similar to that of x               Algorithm 2
        c = W_o attention(query, the keys and values of those chunks' tokens)   Algorithm 3
        out = mix(y, c)                                                         Algorithm 1

    W_q, W_k, W_v, W_o have no bias; with H * D = Hkv * D = d they are the 4 d^2 weights that the
    paper's parameter counts imply for one insertion (a gate adds d^2 + d, which they exclude).

    Args:
        d_model: width d of x, e and y.
        num_heads: query heads H.
        num_kv_heads: key/value heads Hkv, a divisor of H. Default H.
        head_dim: D, 1 to 256. Default d // H.
        chunk_size: tokens per chunk, S. An attribute; may be changed between calls.
        top_k: chunks per query, k. An attribute; the knob between accuracy and time at test time.
        retrieval_heads: selections per token, R. 1 is the paper's (one for all heads), else a
            divisor of Hkv: key/value head h follows retrieval head h // (Hkv // R).
        retrieval_dim: E, per retrieval head. Default min(d, 128). The more tokens a chunk averages
            and the longer the context, the more dimensions it takes to find one of them. With R > 1
            choose E < d: at E >= d all heads start, and if frozen stay, with one selection, since
            tied isometries keep every cosine.
        encoder: how e becomes chunk embeddings.
            "tied": one linear map for x and e, then the mean of the chunk. Starts as the identity
            where R * E == d or E >= d, with orthonormal rows below, jointly over the heads while
            R * E <= d, else head by head. Retrieves from the first step even if frozen.
            "identity": the same map, never trained.
            "separate": one map each, random orthonormal rows: retrieves by chance until trained.
            A callable or module: gets the tokens of each chunk [B, L // S, S, d] and returns one
            vector per chunk [B, L // S, R, E], or [B, L // S, E] if R == 1. It sees one chunk at a
            time, so it cannot break causality. The result is normalised to unit length; what the
            module holds at first is left alone; x goes through the map of "tied".
        query_encoder: "hidden" maps x by the encoder; "query" takes the attention query W_q x
            itself (before rotation): E = H * D // R, and "tied" then maps e by W_q.
        eligibility: "strict" searches chunks whose last token lies before the query (the paper);
            "inclusive" also the chunk that the query itself closes.
        search, superchunk_size, probes: as in `resona_ext.retrieve`: "two_level" trades recall for time
            in long contexts. Attributes, turned at any time (the sizes wait while search is "exact"); of a
            cache made before, only probes may be. Over a mesh the search is exact, and so must a cache's be.
        trainable_retrieval: False is the paper's hard mask: no gradient reaches the encoders, so
            they are frozen (`requires_grad=False`, those of a given module too). True adds
            score_scale [R], from 10, by which scores weigh their chunks, and sink [H], from 0, by
            which a token may attend to nothing: the encoders learn through both. Train at k >= 4,
            lower k later.
        normalize_embeddings: root-mean-square norm on e, per token, before the context encoder.
            Without it, long embeddings outweigh the rest of their chunk, and retrieval decays as
            tied token embeddings train.
        normalize_key_value: the same norm on e before W_k and W_v. Off: raw embeddings.
        rope_base: base of rotary positions on query and key, half-split, counted from the start of
            each sequence. None, the default: no positions, as e carries none.
        key_conv: width n of a causal depthwise convolution over the embeddings before W_k. 0 is
            the paper; 2 lets a key know its left neighbour, which S > 2 needs where the answer
            follows its key. Starts as the unit impulse, that is without effect.
        mlp_dim: hidden width of a SwiGLU MLP behind the attention, c + mlp(norm(c)), as in the
            paper's counts (d 600, mlp_dim 1792: 3.226M). None: no MLP.
        mix: "gate" (1 - a) * y + a * c with a = sigmoid(W x + b) per element, "fixed" the same
            with the scalar a = alpha, "additive" y + alpha * c.
        alpha: coefficient of "fixed" (in [0, 1], default 0.5) and "additive" (default 1.0). An
            attribute; may be changed at test time.
        gate_bias: initial b of "gate"; W starts at zero. 0 suits training from scratch.
        zero_init_output: start with c = 0: W_o, and the last matrix of the MLP, at zero. With
            mix="additive" the model around it is then unchanged, which suits pretrained ones.
        keep_empty_rows: tokens for which no chunk is eligible return y. Otherwise c = 0 is mixed.
        device, dtype: of the parameters.

    Raises:
        ValueError: an argument is out of range; the message names it.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        chunk_size: int = 64,
        top_k: int = 8,
        retrieval_heads: int = 1,
        retrieval_dim: int | None = None,
        encoder: str | Callable[[Tensor], Tensor] = "tied",
        query_encoder: str = "hidden",
        eligibility: str = "strict",
        trainable_retrieval: bool = False,
        normalize_embeddings: bool = True,
        normalize_key_value: bool = False,
        rope_base: float | None = None,
        key_conv: int = 0,
        mlp_dim: int | None = None,
        search: str = "exact",
        superchunk_size: int | None = None,
        probes: int | None = None,
        mix: str = "gate",
        alpha: float | None = None,
        gate_bias: float = 0.0,
        zero_init_output: bool = False,
        keep_empty_rows: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.d_model = d_model
        self.num_heads = num_heads
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.head_dim = self._checked_head_dim(head_dim)
        self.chunk_size = chunk_size
        self.top_k = top_k
        self.retrieval_heads = retrieval_heads
        self.retrieval_dim = self._checked_retrieval_dim(retrieval_dim, query_encoder)
        self.eligibility = eligibility
        self.trainable_retrieval = trainable_retrieval
        self.search, self.superchunk_size, self.probes = search, superchunk_size, probes
        self.normalize_embeddings = normalize_embeddings
        self.normalize_key_value = normalize_key_value
        self.rope_base = rope_base
        self.key_conv = key_conv
        self.mix = mix
        self.alpha = DEFAULT_ALPHA.get(mix) if alpha is None else alpha
        self.gate_bias = gate_bias
        self.zero_init_output = zero_init_output
        self.keep_empty_rows = keep_empty_rows
        check_switches(self)

        factory_kwargs = {"device": device, "dtype": dtype}
        query_width, key_width = num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.q_proj = nn.Linear(d_model, query_width, bias=False, **factory_kwargs)
        self.k_proj = nn.Linear(d_model, key_width, bias=False, **factory_kwargs)
        self.v_proj = nn.Linear(d_model, key_width, bias=False, **factory_kwargs)
        self.o_proj = nn.Linear(query_width, d_model, bias=False, **factory_kwargs)
        self.encoders = Encoders(
            d_model,
            retrieval_heads,
            self.retrieval_dim,
            encoder,
            query_encoder,
            trainable_retrieval,
            **factory_kwargs,
        )
        require(mlp_dim is None or mlp_dim >= 1, "mlp_dim", "None or at least 1", mlp_dim)
        self.mlp = None if mlp_dim is None else SwiGLU(d_model, mlp_dim, **factory_kwargs)
        self.gate = nn.Linear(d_model, d_model, **factory_kwargs) if mix == "gate" else None

        def parameter(wanted: bool, *shape: int) -> nn.Parameter | None:
            return nn.Parameter(torch.empty(shape, **factory_kwargs)) if wanted else None

        self.key_conv_weight = parameter(key_conv > 0, key_conv, d_model)
        self.score_scale = parameter(trainable_retrieval, retrieval_heads)
        self.sink = parameter(trainable_retrieval, num_heads)
        self.reset_parameters()

    def _checked_head_dim(self, head_dim: int | None) -> int:
        for argument in ("d_model", "num_heads", "num_kv_heads"):
            got = getattr(self, argument)
            require(got >= 1, argument, "at least 1", got)
        heads, kv_heads = self.num_heads, self.num_kv_heads
        require(heads % kv_heads == 0, "num_kv_heads", f"a divisor of num_heads {heads}", kv_heads)
        if head_dim is None:
            expected = f"a divisor of d_model {self.d_model} unless head_dim is given"
            require(self.d_model % heads == 0, "num_heads", expected, heads)
            head_dim = self.d_model // heads
        require(1 <= head_dim <= MAX_HEAD_DIM, "head_dim", f"from 1 to {MAX_HEAD_DIM}", head_dim)
        return head_dim

    def _checked_retrieval_dim(self, dim: int | None, query_encoder: str) -> int:
        heads, kv_heads = self.retrieval_heads, self.num_kv_heads
        expected = f"1 or a divisor of the {kv_heads} key/value heads"
        require(heads >= 1 and kv_heads % heads == 0, "retrieval_heads", expected, heads)
        if query_encoder != "query":
            require(dim is None or dim >= 1, "retrieval_dim", "None or at least 1", dim)
            return min(self.d_model, DEFAULT_RETRIEVAL_DIM) if dim is None else dim
        only = self.num_heads * self.head_dim // heads
        expected = f'num_heads * head_dim // retrieval_heads = {only} with query_encoder="query"'
        require(dim in (None, only), "retrieval_dim", expected, dim)
        return only

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw every parameter anew, except those of a context encoder given as a module."""
        for module in (self.q_proj, self.k_proj, self.v_proj, self.o_proj, self.encoders, self.mlp):
            if module is not None:
                module.reset_parameters()
        if self.zero_init_output:
            self.o_proj.weight.zero_()
            if self.mlp is not None:
                # Its norm would lift the tiny c of the first steps to size 1.
                self.mlp.down.weight.zero_()
        if self.gate is not None:
            self.gate.weight.zero_()
            self.gate.bias.fill_(self.gate_bias)
        if self.key_conv_weight is not None:
            self.key_conv_weight.zero_()
            self.key_conv_weight[0] = 1
        if self.trainable_retrieval:
            self.score_scale.fill_(INITIAL_SCORE_SCALE)
            self.sink.zero_()

    def make_cache(
        self,
        batch: int,
        max_length: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        history: int | None = None,
        mesh: DeviceMesh | None = None,
    ) -> ChunkCache | ShardedChunkCache:
        """A cache for `forward`: `batch` sequences of at most max_length tokens each.

        dtype and device: default those of the weights, or autocast's dtype inside of it. history: as
        in `ChunkCache`. mesh: the ranks that share the tokens; then a
        `resona_ext.distributed.ShardedChunkCache`, which has no history. A change of chunk_size, search
        or superchunk_size (by default a full forward's over max_length tokens) needs another cache.
        """
        if mesh is not None:
            require(history is None, "history", "None with a mesh", history)
            return make_sharded_cache(self, batch, max_length, dtype, device, mesh)
        return make_cache(self, batch, max_length, dtype, device, history)

    def forward(
        self,
        hidden_states: Tensor,
        embeddings: Tensor,
        mixer_output: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: ChunkCache | ShardedChunkCache | None = None,
        indices: Tensor | None = None,
        mesh: DeviceMesh | None = None,
        layout: Layout | None = None,
    ) -> Tensor:
        """Run the branch over whole sequences and mix it into the output of the layer's mixer.

        Args:
            hidden_states: x [B, T, d], the input of the augmented layer.
            embeddings: e [B, T, d], the token embeddings right after the embedding matrix.
            mixer_output: y [B, T, d]. None: no mix.
            cu_seqlens: int32 [n + 1], borders of packed sequences (B = 1), which nothing crosses.
            attention_mask: [B, T], 1 at tokens and 0 at padding, which stands left or right of
                them in each row. Outputs at padding are finite and mean nothing.
            cache: from `make_cache`. The T tokens follow those in the cache and are appended to it:
                a prompt in any pieces, then token by token. Without gradients.
            indices: int32 [B, T, R, k], the chunks that each token attends to, -1 unused, instead of
                a search: from `PrecomputedRetrieval`. Any k. Rows at padding are ignored.
            mesh: of one dimension, whose ranks share the sequence: T are the tokens of this rank, and
                every rank calls. cu_seqlens are then the borders in the whole; a cache of
                `make_cache(mesh=...)` is filled by one such call, and gets further tokens, the same on
                every rank, without mesh. Not with attention_mask or indices.
            layout: which rank holds what, as in `resona_ext.distributed.retrieve_attend`.

        Returns:
            [B, T, d]: mix(y, c) in the dtype of y, or c if mixer_output is None.

        Raises:
            ValueError: a shape does not fit, the cache is not of this layer or is full, or two
                arguments or settings are given that exclude each other.
        """
        tensors = (hidden_states, embeddings, mixer_output)
        if mesh is not None:
            from .distributed.layer import sharded_branch

            rest = (cu_seqlens, attention_mask, cache, indices)
            retrieved, is_empty = sharded_branch(self, mesh, layout, *tensors, *rest)
            if mixer_output is None:
                return retrieved
            return self._mix(hidden_states, mixer_output, retrieved, is_empty)
        require(layout is None, "layout", "None without a mesh", "one")
        check_inputs(self.d_model, *tensors, cu_seqlens, attention_mask)
        if indices is not None:
            check_indices(self, indices, hidden_states, cu_seqlens, cache)
        if cache is not None:
            check_cache(self, cache, hidden_states, cu_seqlens)
            retrieved, is_empty = cached_branch(
                self, hidden_states, embeddings, cache, attention_mask
            )
        elif attention_mask is None:
            retrieved, is_empty = self._branch(hidden_states, embeddings, cu_seqlens, indices)
        else:
            padding = first_real_token(attention_mask)
            x, e = roll_rows(hidden_states, padding), roll_rows(embeddings, padding)
            if indices is not None:
                indices = roll_indices(indices, padding, attention_mask)
            retrieved, is_empty = self._branch(x, e, None, indices)
            retrieved, is_empty = roll_rows(retrieved, -padding), roll_rows(is_empty, -padding)
        if mixer_output is None:
            return retrieved
        return self._mix(hidden_states, mixer_output, retrieved, is_empty)

    def _branch(
        self, x: Tensor, e: Tensor, cu_seqlens: Tensor | None, indices: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Everything up to the mix: c [B, T, d], and which rows had nothing eligible [B, T]."""
        inclusive = self.eligibility == "inclusive"
        query_row = None
        if inclusive:
            x, e, cu_seqlens, query_row = shift_for_inclusive(x, e, cu_seqlens)
        rows, length = x.shape[1], e.shape[1]
        key_position = local_positions(length, cu_seqlens, e.device)
        query_position = key_position[length - rows :] - int(inclusive)

        source = rms_norm(e) if self.normalize_key_value else e
        key_source = source
        if self.key_conv_weight is not None:
            key_source = causal_taps(source, self.key_conv_weight, key_position)
        query, key, value, query_embedding = self._project(
            x, key_source, source, query_position, key_position
        )
        projected = (query, key, value, query_embedding)
        out, is_empty = search_and_attend(self, *projected, e, cu_seqlens, indices)
        if query_row is not None:
            out, is_empty = out.index_select(1, query_row), is_empty.index_select(1, query_row)
        return self._output(out), is_empty

    def _project(
        self,
        x: Tensor,
        key_source: Tensor,
        value_source: Tensor,
        query_position: Tensor,
        key_position: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries, keys and values [B, T, heads, D], query embeddings [B, T, R, E]."""
        query = self.q_proj(x)
        query_embedding = self.encoders.query_embedding(x, query)
        query = query.unflatten(-1, (self.num_heads, self.head_dim))
        key = self.k_proj(key_source).unflatten(-1, (self.num_kv_heads, self.head_dim))
        value = self.v_proj(value_source).unflatten(-1, (self.num_kv_heads, self.head_dim))
        if self.rope_base is not None:
            query = rotate(query, query_position, self.rope_base)
            key = rotate(key, key_position, self.rope_base)
        return query, key, value, query_embedding

    def _output(self, attended: Tensor) -> Tensor:
        """c [B, T, d] from what was attended to, [B, T, H, D]."""
        retrieved = self.o_proj(attended.flatten(2))
        return retrieved if self.mlp is None else retrieved + self.mlp(rms_norm(retrieved))

    def _mix(self, x: Tensor, y: Tensor, retrieved: Tensor, is_empty: Tensor) -> Tensor:
        if self.mix == "additive":
            mixed = y + self.alpha * retrieved
        else:
            a = torch.sigmoid(self.gate(x)) if self.gate is not None else self.alpha
            mixed = (1 - a) * y + a * retrieved
        if self.keep_empty_rows:
            mixed = torch.where(is_empty.unsqueeze(-1), y, mixed)
        return mixed.to(y.dtype)

    def extra_repr(self) -> str:
        names = ["d_model", "num_heads", "num_kv_heads", "head_dim", "chunk_size", "top_k"]
        names += ["eligibility", "trainable_retrieval", "rope_base", "mix", "alpha"]
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)
