"""What the decode cache asks of its arguments. `cache` is the ChunkCache throughout."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NoReturn

import torch
from torch import Tensor

from ._checks import MAX_CONTEXT, MAX_HEAD_DIM, SUPPORTED

if TYPE_CHECKING:
    from ._cache_parts import Piece
    from .cache import ChunkCache


def complain(method: str, argument: str, expected: object, got: object) -> NoReturn:
    raise ValueError(f"{method}: {argument}: expected {expected}, got {got}")


def require(ok: bool, method: str, argument: str, expected: object, got: object) -> None:
    """The one form of every complaint about an argument of the cache."""
    if not ok:
        complain(method, argument, expected, got)


def refuse_gradients(method: str, *tensors: Tensor | None) -> None:
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        complain(
            method,
            "inputs",
            "no gradient, as a cache has no backward",
            "requires_grad=True. Call it under torch.no_grad()",
        )


def check_settings(cache: ChunkCache) -> None:
    method = "ChunkCache"
    least = dict.fromkeys(
        ("num_kv_heads", "head_dim", "retrieval_heads", "retrieval_dim", "chunk_size"), 1
    )
    least |= dict.fromkeys(("batch", "max_length", "carry_rows", "carry_dim"), 0)
    least["history_rows"] = cache.carry_rows
    for name, value in least.items():
        got = getattr(cache, name)
        is_int = isinstance(got, int) and not isinstance(got, bool)
        argument = "history" if name == "history_rows" else name
        require(is_int and got >= value, method, argument, f"an int of at least {value}", got)
    expected = f"at most {MAX_CONTEXT}"
    require(cache.max_length <= MAX_CONTEXT, method, "max_length", expected, cache.max_length)
    expected = f"from 1 to {MAX_HEAD_DIM}"
    require(1 <= cache.head_dim <= MAX_HEAD_DIM, method, "head_dim", expected, cache.head_dim)
    expected = f"1 or a divisor of num_kv_heads = {cache.num_kv_heads}"
    divides = cache.num_kv_heads % cache.retrieval_heads == 0
    require(divides, method, "retrieval_heads", expected, cache.retrieval_heads)
    for name in ("dtype", "embedding_dtype"):
        got = getattr(cache, name)
        require(got in SUPPORTED, method, name, f"one of {SUPPORTED}", got)


def check_two_level(cache: ChunkCache) -> None:
    for name in ("superchunk_size", "probes"):
        got = getattr(cache, name)
        is_int = isinstance(got, int) and not isinstance(got, bool)
        expected = "None or an int of at least 1"
        require(got is None or (is_int and got >= 1), "ChunkCache", name, expected, got)


def checked_probes(cache: ChunkCache, method: str, probes: int | None) -> int | None:
    """Those of one call, else those of the cache."""
    expected = 'None with search="exact"'
    require(probes is None or cache.search == "two_level", method, "probes", expected, probes)
    require(probes is None or probes >= 1, method, "probes", "None or at least 1", probes)
    return cache.probes if probes is None else probes


def check_room(cache: ChunkCache, method: str, wanted: int) -> None:
    expected = f"at most max_length = {cache.max_length} tokens per sequence"
    require(wanted <= cache.max_length, method, "lengths", expected, wanted)


def check_carry(cache: ChunkCache, method: str, carry: Tensor | None, rows: int) -> None:
    if not cache.carry_rows:
        require(carry is None, method, "carry", "None without carry_rows", "a tensor")
        return
    require(carry is not None, method, "carry", "a tensor with carry_rows", "None")
    check_tensor(cache, method, "carry", carry, (cache.batch, rows, cache.carry_dim), cache.dtype)


def check_tensor(
    cache: ChunkCache, method: str, argument: str, t: Tensor, shape, dtype: torch.dtype
) -> None:
    require(list(t.shape) == list(shape), method, argument, f"shape {list(shape)}", list(t.shape))
    require(t.dtype == dtype, method, argument, f"dtype {dtype}", t.dtype)
    require(t.device == cache.device, method, argument, f"device {cache.device}", t.device)


def check_piece(
    cache: ChunkCache, method: str, piece: Piece, top_k, score_scale, sink, scale
) -> None:
    query = piece.query
    require(query.dim() == 4, method, "query", "rank 4 [B, T, H, D]", list(query.shape))
    rows, heads = query.shape[1:3]
    expected = f"H a multiple of num_kv_heads = {cache.num_kv_heads}"
    require(heads >= 1 and heads % cache.num_kv_heads == 0, method, "query", expected, heads)
    tokens = (cache.batch, rows)
    shapes = {
        "query": ((*tokens, heads, cache.head_dim), cache.dtype),
        "key": ((*tokens, cache.num_kv_heads, cache.head_dim), cache.dtype),
    }
    shapes["value"] = shapes["key"]
    embedding = (*tokens, cache.retrieval_heads, cache.retrieval_dim)
    for argument in ("query_embedding", "context_embedding"):
        shapes[argument] = (embedding, cache.embedding_dtype)
    for argument, (shape, dtype) in shapes.items():
        check_tensor(cache, method, argument, getattr(piece, argument), shape, dtype)
    check_carry(cache, method, piece.carry, rows)
    require(top_k >= 1, method, "top_k", "at least 1", top_k)
    valid = scale is None or math.isfinite(scale)
    require(valid, method, "scale", "a finite number", scale)
    wide = torch.float64 if cache.dtype == torch.float64 else torch.float32
    if score_scale is not None:
        shape = (cache.retrieval_heads,)
        check_tensor(cache, method, "score_scale", score_scale, shape, wide)
    if sink is not None:
        check_tensor(cache, method, "sink", sink, (heads,), wide)


def checked_index(cache: ChunkCache, method: str, index: Tensor) -> Tensor:
    name, argument = f"ChunkCache.{method}", "beam_idx" if method == "reorder" else "indices"
    is_integer = index.dtype in (torch.int32, torch.int64)
    require(is_integer, name, argument, "dtype int32 or int64", index.dtype)
    require(index.dim() == 1, name, argument, "rank 1", list(index.shape))
    if index.device.type == "cpu":
        bad = [i for i in index.tolist() if not 0 <= i < cache.batch]
        require(not bad, name, argument, f"from 0 to {cache.batch - 1}", bad)
    return index.to(cache.device)


def check_state(cache: ChunkCache, state: dict, settings: dict[str, int]) -> None:
    """Whether a saved state is whole and of a cache like this one."""
    method = "ChunkCache.load_state_dict"
    keys = {*settings, "longest", *dict(cache._used())}
    got = set(state) if isinstance(state, dict) else type(state).__name__
    require(got == keys, method, "state", f"a dict of {sorted(keys)}", got)
    for name, wanted in settings.items():
        got = state[name]
        require(type(got) is int and got == wanted, method, name, wanted, got)
    longest, most = state["longest"], cache.max_length
    valid = type(longest) is int and 0 <= longest <= most
    require(valid, method, "longest", f"0 to max_length = {most}", longest)
    for name, target in cache._used(longest):
        got = state[name]
        require(isinstance(got, Tensor), method, name, "a tensor", type(got).__name__)
        expected = f"shape {list(target.shape)}"
        require(got.shape == target.shape, method, name, expected, list(got.shape))
        require(got.dtype == target.dtype, method, name, f"dtype {target.dtype}", got.dtype)
    for name in ("lengths", "history_start"):
        got = state[name].tolist()
        require(all(0 <= n <= longest for n in got), method, name, f"0 to {longest}", got)
