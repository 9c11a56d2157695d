"""The decode steps as gpu_operators.py wants them: what they write in place counts as a result."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from support import assert_no_worse, embeddings
from torch import Tensor

from benchmarks.kernels.timer import capture
from resona_ext import ChunkCache, reference

if TYPE_CHECKING:
    from gpu_operators import Arguments, Case

ops = torch.ops.resona
OPERATORS = ("decode_step", "decode_step_two_level")
STATE = ("key_cache", "value_cache", "chunk_embedding", "open_sum", "history", "lengths")
OUTPUTS = ("out", "lse", "indices", "scores", *STATE)
UPPER = ("superchunk_embedding", "superchunk_sum")
SUPERCHUNK, PROBES = 5, 3
INT_MAX, INT_MIN = 2**31 - 1, -(2**31)
WRONG_LENGTHS: dict[str, Callable[[Tensor], Tensor]] = {
    "full": lambda n: torch.full_like(n, 1000),
    "marked as full": lambda n: -n - 1,
    "largest": lambda n: torch.full_like(n, INT_MAX),
    "smallest": lambda n: torch.full_like(n, INT_MIN),
}


def cases(case: type[Case]) -> Iterator[Case]:
    """L is the capacity of the cache."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        yield case("decode_step", "small", dtype, small=True)
        yield case("decode_step", "grouped", dtype, L=400, R=1, S=16, k=6, H=16, D=128)
        longer = dict(L=1024, R=1, S=64, k=8, D=64, small=dtype != torch.float16)
        yield case("decode_step", "chunks of 64", dtype, **longer)
        yield case("decode_step", "scored", dtype, L=300, S=3, k=70, contents="zipf")
        yield case("decode_step", "wide heads", dtype, L=120, S=5, D=200)
        yield case(
            "decode_step", "long rows", dtype, L=90, E=520, S=3, k=4, small=dtype != torch.float16
        )
    for layout in ("rows apart", "heads first", "last apart", "offset"):
        yield case(
            "decode_step", layout, torch.bfloat16, E=40, layout=layout, small=layout == "offset"
        )
    yield case("decode_step", "shorter than a chunk", L=5, S=8, small=True)
    yield case("decode_step", "no batch", B=0)
    yield case("decode_step", "tokens as chunks", L=3000, S=1, k=20, contents="four_letters")
    yield case("decode_step", "slots of its own", torch.bfloat16, B=1, L=1500, S=1, k=1400)
    for dtype in (torch.bfloat16, torch.float32):
        sizes = dict(B=2, L=65536, R=1, E=128, S=64, k=8, H=8, Hkv=2, D=128)
        yield case("decode_step", "64k tokens", dtype, large=True, **sizes)

    op = "decode_step_two_level"
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        yield case(op, "small", dtype, L=150, S=2, small=True)
        yield case(op, "scored", dtype, L=500, S=2, k=30, R=1, Hkv=4, contents="zipf")
    yield case(op, "few superchunks", L=90, S=8)
    yield case(op, "shorter than a chunk", L=5, S=8, small=True)
    yield case(op, "no batch", B=0)
    yield case(op, "ties", torch.bfloat16, L=3000, S=1, k=20, contents="four_letters")
    yield case(op, "rows of 33", torch.float16, L=300, S=1, E=33)
    yield case(op, "64k tokens", torch.bfloat16, large=True, **(sizes | {"S": 2}))


def make(case: Case, seed: int) -> Arguments:
    """A cache whose sequences differ in length; where there are two, the second one closes a chunk."""
    B, M, R, E, S = case.B, case.L, case.R, case.E, case.S
    lengths = torch.randint(max(1, 3 * M // 4), M, (B,), dtype=torch.int32)
    if B > 1 and M >= S:
        lengths[1] = M // S * S - 1
    context = embeddings(case.contents, B, M, R, E, case.dtype)
    open_sum = torch.zeros(B, R, E)
    for b, length in enumerate(lengths.tolist()):
        for token in range(length // S * S, length):
            open_sum[b] += context[b, token]
    rows, tokens = (B, 1), (B, M)
    scored = case.name == "scored"
    return {
        "query": torch.randn(*rows, case.H, case.D).to(case.dtype),
        "key": torch.randn(*rows, case.Hkv, case.D).to(case.dtype),
        "value": torch.randn(*rows, case.Hkv, case.D).to(case.dtype),
        "query_embedding": context[:, seed + 1 : seed + 2].clone(),
        "context_embedding": context[:, 3:4].clone(),
        "key_cache": torch.randn(*tokens, case.Hkv, case.D).to(case.dtype),
        "value_cache": torch.randn(*tokens, case.Hkv, case.D).to(case.dtype),
        "chunk_embedding": ops.pool_chunks(context, S),
        "open_sum": open_sum,
        "history": torch.randn(B, 4, R, E).to(case.dtype),
        "lengths": lengths,
        "chunk_size": S,
        "top_k": case.k,
        "score_scale": torch.rand(R) if scored else None,
        "sink": torch.randn(case.H) if scored else None,
    }


def make_two_level(case: Case, seed: int) -> Arguments:
    """The same cache, with what its chunks make of superchunks."""
    a = make(case, seed)
    chunks, sums = a["chunk_embedding"], torch.zeros_like(a["open_sum"])
    for b, length in enumerate(a["lengths"].tolist()):
        closed = length // case.S
        for chunk in range(closed // SUPERCHUNK * SUPERCHUNK, closed):
            sums[b] += chunks[b, chunk]
    upper = dict(zip(UPPER, (ops.pool_chunks(chunks, SUPERCHUNK), sums), strict=True))
    sizes = {name: a.pop(name) for name in ("chunk_size", "top_k")}
    extras = {name: a.pop(name) for name in ("score_scale", "sink")}
    return {**a, **upper, **sizes, "superchunk_size": SUPERCHUNK, **extras}


def _run(op, state_count: int, settings: dict, *values) -> tuple[Tensor, ...]:
    """Results, and the state behind the step; the arguments stay as they are."""
    new, state, rest = values[:5], values[5 : 5 + state_count], values[5 + state_count :]
    state = [t.clone(memory_format=torch.contiguous_format) for t in state]
    return (*op(*new, *state, *rest, **settings), *state)


def run(*values) -> tuple[Tensor, ...]:
    return _run(ops.decode_step, len(STATE), {}, *values)


def run_two_level(*values) -> tuple[Tensor, ...]:
    count, settings = len(STATE) + len(UPPER), {"probes": PROBES}
    return _run(ops.decode_step_two_level, count, settings, *values)


def attend(arguments: Arguments, indices: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Over what was retrieved, in the dtype of the arguments."""
    names = ("query", "key_cache", "value_cache", "chunk_size", "score_scale", "sink")
    query, key, value, chunk_size, score_scale, sink = (arguments[name] for name in names)
    bias = None
    if score_scale is not None:
        bias = scores.to(score_scale.dtype).masked_fill(indices < 0, 0) * score_scale[:, None]
    return reference.attend(query, key, value, indices, chunk_size, bias, sink)


def expect(*values) -> tuple[Tensor, ...]:
    """The step in terms of the reference, sequence by sequence."""
    return _expect(STATE, ("chunk_size", "top_k"), values)


def expect_two_level(*values) -> tuple[Tensor, ...]:
    return _expect((*STATE, *UPPER), ("chunk_size", "top_k", "superchunk_size"), values)


def _expect(state: tuple, sizes: tuple, values: tuple) -> tuple[Tensor, ...]:
    names = ("query", "key", "value", "query_embedding", "context_embedding", *state)
    names += (*sizes, "score_scale", "sink")
    arguments = dict(zip(names, values, strict=True))
    a = {n: t.clone() if isinstance(t, Tensor) else t for n, t in arguments.items()}
    size, top_k, superchunk = a["chunk_size"], a["top_k"], a.get("superchunk_size")
    batch, _, heads, _ = a["query_embedding"].shape
    indices = torch.full((batch, 1, heads, top_k), -1, dtype=torch.int32)
    scores = torch.full(indices.shape, -math.inf)
    for b, length in enumerate(a["lengths"].tolist()):
        chunks = a["chunk_embedding"][b : b + 1, : (length + 1) // size]
        where = (a["query_embedding"][b : b + 1], chunks, size, top_k, length + 1)
        if superchunk is None:
            found = reference.retrieve(*where)
        else:
            levels = {"superchunk_size": superchunk, "probes": PROBES}
            found = reference.retrieve_two_level(*where, **levels)
        indices[b], scores[b] = found[0][0], found[1][0]
    out, lse = attend(arguments, indices, scores)
    for b, length in enumerate(a["lengths"].tolist()):
        a["key_cache"][b, length], a["value_cache"][b, length] = a["key"][b, 0], a["value"][b, 0]
        token = a["context_embedding"][b, 0]
        a["history"][b, length % a["history"].shape[1]] = token
        total = a["open_sum"][b] + token
        a["open_sum"][b] = total
        if (length + 1) % size == 0:
            _close(a, b, length // size, superchunk)
    a["lengths"] += 1
    return (out, lse, indices, scores, *(a[name] for name in state))


def _unit(total: Tensor) -> Tensor:
    return reference.pool_chunks(total[None, None], 1)[0, 0]


def _close(a: Arguments, b: int, chunk: int, superchunk: int | None) -> None:
    """The chunk's sum becomes its embedding, and goes on to the superchunk."""
    a["chunk_embedding"][b, chunk] = _unit(a["open_sum"][b])
    a["open_sum"][b] = 0
    if superchunk is None:
        return
    a["superchunk_sum"][b] += a["chunk_embedding"][b, chunk]
    if (chunk + 1) % superchunk == 0:
        a["superchunk_embedding"][b, chunk // superchunk] = _unit(a["superchunk_sum"][b])
        a["superchunk_sum"][b] = 0


def truth(arguments: Arguments, expected: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    return attend(arguments, expected[2], expected[3])


# ---- a cache, token by token


def _cache(case: Case, device: str, dtype: torch.dtype) -> ChunkCache:
    sizes = (case.B, case.L, case.Hkv, case.D, case.R, case.E, case.S)
    search = {}
    if case.op == "decode_step_two_level":
        search = {"search": "two_level", "superchunk_size": 2, "probes": 1}
    return ChunkCache(*sizes, dtype=dtype, device=device, embedding_dtype=case.dtype, **search)


def _step(cache: ChunkCache, new: dict[str, Tensor], case: Case) -> tuple[Tensor, ...]:
    out, aux = cache.step(*new.values(), top_k=case.k, return_aux=True)
    return out, *aux


def run_replays(case: Case, device: str) -> None:
    """A step captured once and replayed until the cache is full, and once more; on a CPU, called."""
    torch.manual_seed(0)
    names = ("query", "key", "value", "query_embedding", "context_embedding")
    tokens = [dict(zip(names, make(case, 0).values(), strict=False)) for _ in range(case.L)]
    cache = _cache(case, device, case.dtype)
    plain, exact = (_cache(case, "cpu", dtype) for dtype in (case.dtype, torch.float64))
    buffers = {name: t.to(device, copy=True) for name, t in tokens[0].items()}
    replay = None
    if device != "cpu":
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            _step(cache, buffers, case)
        torch.cuda.current_stream().wait_stream(side)
        cache.reset()
        graph, results = capture(lambda: _step(cache, buffers, case))
        replay = graph.replay
    for token in tokens:
        for name, t in token.items():
            buffers[name].copy_(t)
        if replay:
            replay()
        else:
            results = _step(cache, buffers, case)
        near = _step(plain, token, case)
        wide = {n: t.double() if i < 3 else t for i, (n, t) in enumerate(token.items())}
        _check_step(results, near, _step(exact, wide, case))
    cache.check()
    assert cache.get_seq_length() == case.L
    for name in ("key", "value", "chunk_embedding", "open_sum", "history", "lengths"):
        assert torch.equal(getattr(cache, name).cpu(), getattr(plain, name)), name
    if replay:
        _check_refusal(cache, replay, results)


def _check_step(got: tuple, near: tuple, exact: tuple) -> None:
    for name, *values in zip(("out", "lse"), got, near, exact, strict=False):
        assert_no_worse(name, values[0].cpu(), *values[1:])
    for name, ours, theirs in zip(("indices", "scores"), got[2:], near[2:], strict=True):
        assert torch.equal(ours.cpu(), theirs), name


def _check_refusal(cache: ChunkCache, replay: Callable[[], None], results: tuple) -> None:
    before = {name: getattr(cache, name).clone() for name in ("key", "value", "history")}
    for _ in range(2):
        replay()
    assert (cache.lengths == -cache.max_length - 1).all()
    assert (results[2] == -1).all() and (results[0] == 0).all()
    for name, t in before.items():
        assert torch.equal(getattr(cache, name), t), name
    try:
        cache.check()
    except RuntimeError as error:
        assert "expected at most max_length" in str(error)
    else:
        raise AssertionError("cache.check: expected an error, got none")
