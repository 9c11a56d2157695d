"""What one would write in PyTorch: matmul and topk for the search, gather and matmul for the rest.

Scores are float32 in every dtype, as bfloat16 scores would tie and pick other chunks. The [T, C] scores
and the gathered keys are made for a block of queries at a time, so that memory does not grow with T.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..data import Case
from . import Baseline, Checkouts, Forward

# Gathered or scored at a time: what a core's cache holds, or enough for a GPU to be busy with.
BLOCK_BYTES = {"cpu": 4 << 20, "cuda": 256 << 20}
SAVED_LIMIT = 6 << 30  # bytes that a backward may keep of what the forward gathered


def pool(context_embedding: Tensor, chunk_size: int) -> Tensor:
    chunks = context_embedding.shape[1] // chunk_size
    tokens = context_embedding[:, : chunks * chunk_size].unflatten(1, (chunks, chunk_size))
    total = tokens.sum(dim=2, dtype=torch.float32)
    return torch.nn.functional.normalize(total, dim=-1).to(context_embedding.dtype)


def search(
    query_embedding: Tensor, chunk_embedding: Tensor, chunk_size: int, top_k: int, length: int
) -> tuple[Tensor, Tensor]:
    """Indices and scores [B, T, R, k], -1 and -inf where nothing is eligible."""
    rows, chunks = query_embedding.shape[1], chunk_embedding.shape[1]
    kept = min(top_k, chunks)
    unit = torch.nn.functional.normalize(query_embedding.float(), dim=-1).transpose(1, 2)
    chunk = chunk_embedding.float().permute(0, 2, 3, 1)
    end = (torch.arange(chunks, device=chunk.device) + 1) * chunk_size
    found = []
    per_row = max(1, 4 * chunks * unit.shape[0] * unit.shape[1])
    block = max(1, BLOCK_BYTES[unit.device.type] // per_row)
    for begin in range(0, rows, block):
        part = unit[:, :, begin : begin + block]
        position = torch.arange(begin, begin + part.shape[2], device=end.device) + length - rows
        score = part @ chunk
        score = score.masked_fill(end > position[:, None], -torch.inf)
        found.append(score.topk(kept, dim=-1))
    scores = torch.cat([f.values for f in found], dim=2)
    indices = torch.cat([f.indices for f in found], dim=2)
    indices = indices.masked_fill(scores == -torch.inf, -1)
    missing = (0, top_k - kept)
    indices = torch.nn.functional.pad(indices, missing, value=-1)
    scores = torch.nn.functional.pad(scores, missing, value=-torch.inf)
    return indices.int().transpose(1, 2), scores.transpose(1, 2)


def gather_attention(
    query: Tensor, key: Tensor, value: Tensor, indices: Tensor, chunk_size: int
) -> Tensor:
    """Attention to the selected chunks of one retrieval head, [B, T, H, D].

    The quickest of a dozen ways tried on a CPU: whole chunks are gathered, head by head, and
    multiplied. SDPA with a single query row is up to four times slower there.
    """
    batch, rows, heads, dim = query.shape
    kv_heads, top_k = key.shape[2], indices.shape[-1]
    chunks = key.shape[1] // chunk_size
    key, value = (_chunk_rows(x, chunk_size) for x in (key, value))
    head = torch.arange(batch * kv_heads, device=query.device).view(batch, 1, kv_heads, 1)
    per_row = 2 * batch * kv_heads * top_k * key.shape[1] * key.element_size()
    block = max(1, BLOCK_BYTES[query.device.type] // per_row)
    out = []
    for begin in range(0, rows, block):
        chunk = indices[:, begin : begin + block, 0].long()
        count = chunk.shape[0] * chunk.shape[1]
        wanted = (head * chunks + chunk.clamp(min=0).unsqueeze(2)).flatten()
        gathered_key, gathered_value = (
            x.index_select(0, wanted).view(count, kv_heads, -1, dim) for x in (key, value)
        )
        unused = (chunk < 0).repeat_interleave(chunk_size, dim=2).view(count, 1, 1, -1)
        grouped = query[:, begin : begin + block].reshape(count, kv_heads, -1, dim)
        logit = (grouped * dim**-0.5) @ gathered_key.transpose(-1, -2)
        weight = logit.masked_fill(unused, -torch.inf).softmax(dim=-1)
        weight = weight.masked_fill(unused, 0)  # rows without any chunk: 0, not NaN
        out.append((weight @ gathered_value).view(batch, -1, heads, dim))
    return torch.cat(out, dim=1)


def _chunk_rows(x: Tensor, chunk_size: int) -> Tensor:
    """[B, L, Hkv, D] -> [B * Hkv * C, S * D]: one row per chunk and head."""
    chunks = x.shape[1] // chunk_size
    tokens = x[:, : chunks * chunk_size].unflatten(1, (chunks, chunk_size))
    return tokens.permute(0, 3, 1, 2, 4).reshape(-1, chunk_size * x.shape[3])


def _build_stage(case: Case, checkouts: Checkouts) -> Callable:
    s = case.shape
    if case.operator == "pool":
        return lambda: pool(case.context_embedding, s.chunk_size)
    return lambda: search(
        case.query_embedding, case.chunk_embedding, s.chunk_size, s.top_k, s.length
    )


def _build_gather(case: Case, checkouts: Checkouts) -> Forward:
    s = case.shape

    def selected(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return gather_attention(query, key, value, case.indices, s.chunk_size)

    def whole(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        chunk = pool(case.context_embedding, s.chunk_size)
        indices, _ = search(case.query_embedding, chunk, s.chunk_size, s.top_k, s.length)
        return gather_attention(query, key, value, indices, s.chunk_size)

    return Forward(selected if case.operator in ("attend", "backward") else whole)


def _unfit(case: Case) -> str | None:
    s = case.shape
    if s.retrieval_heads != 1:
        return "written for one retrieval head"
    gathered = 2 * s.batch * s.rows * s.top_k * s.chunk_size * s.kv_heads * s.head_dim
    saved = gathered * case.dtype.itemsize
    if case.operator == "backward" and saved > SAVED_LIMIT:
        return f"would save {saved / 2**30:,.0f} GiB of gathered keys and values"
    return None


BASELINES = (
    Baseline(
        "torch",
        "the stage in plain PyTorch (mean and norm; matmul and topk)",
        "stage",
        ("pool", "search"),
        lambda *_: None,
        lambda case: None,
        _build_stage,
    ),
    Baseline(
        "gather",
        "gather and matmul in PyTorch, by blocks of queries",
        "selected",
        ("attend", "backward"),
        lambda *_: None,
        _unfit,
        _build_gather,
    ),
    Baseline(
        "gather-whole",
        "the same after a search with matmul and topk",
        "whole",
        ("fused", "decode"),
        lambda *_: None,
        _unfit,
        _build_gather,
    ),
)
