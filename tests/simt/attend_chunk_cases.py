"""Problems of the chunk-stationary attention as cases for its runner, and what comes out of them."""

import numpy as np
import torch
from cases import Case, index_workspace
from harness import SCHEDULES
from support import Problem, assert_no_worse, name_of

from resona_ext import reference

ANY = SCHEDULES[0]
ITEM_ROWS = 512  # most


def storage(x: torch.Tensor) -> np.ndarray:
    """The same memory, strides included; numpy has no bfloat16."""
    return (x.view(torch.int16) if x.element_size() == 2 else x).numpy()


def tensor(x: np.ndarray, dtype) -> torch.Tensor:
    return torch.from_numpy(x).view(dtype)


def is_vector(*tensors) -> bool:
    return all(
        t.data_ptr() % 16 == 0
        and all(n * t.element_size() % 16 == 0 for n in (*t.stride()[:-1], t.shape[-1]))
        for t in tensors
    )


def keys_of_tile(dtype, dim) -> int:
    width = next(width for width in (64, 128, 256) if dim <= width)
    return min(64, 16384 // (width * dtype.itemsize))


def select(p: Problem, unused=0.1, seed=5) -> torch.Tensor:
    """Random eligible chunks, repeats among them, some slots unused."""
    token = torch.arange(p.queries)
    position, cu_seqlens = token + p.context - p.queries, p.tensors["cu_seqlens"]
    if cu_seqlens is not None:
        starts = cu_seqlens.long()
        position = token - starts[torch.searchsorted(starts, token, right=True) - 1]
    eligible = (position // p.chunk_size)[None, :, None, None]
    g = torch.Generator().manual_seed(seed)
    shape = (p.batch, p.queries, p.retrieval_heads, p.top_k)
    indices = (torch.rand(shape, generator=g) * eligible).long()
    used = (indices < eligible) & (torch.rand(shape, generator=g) >= unused)
    return torch.where(used, indices, -1).int()


def attend_case(
    p: Problem,
    indices,
    bias=None,
    bias_scale=None,
    scale=None,
    result="float",
    item_rows=ITEM_ROWS,
    key_slots=None,
    ahead=True,
    query_range=0,
    blocks=3,
    name="",
) -> Case:
    """result: "float" or "half" partials, or "final" without any (k = 1)."""
    t = p.tensors
    dtype, dim, top_k = p.dtype, p.head_dim, indices.shape[-1]
    if key_slots is None:
        key_slots = 1 if p.chunk_size <= keys_of_tile(dtype, dim) or not ahead else 2
    rows = query_range or p.batch * p.queries
    slots = rows * p.retrieval_heads * top_k
    keys = (1 if query_range else p.batch) * p.retrieval_heads * (p.context // p.chunk_size)
    inputs = {name: storage(t[name]) for name in ("query", "key", "value")}
    inputs["indices"] = indices.numpy()
    optional = {"bias": bias, "bias_scale": bias_scale, "sink": t["sink"]}
    inputs |= {name: x.float().numpy() for name, x in optional.items() if x is not None}

    def empty(count, of=np.int32):
        return np.empty(count, of)

    workspace = {"workspace": index_workspace(slots, keys)}
    if result != "final":
        pitch, of_list = -(-dim // 8) * 8, slots * p.heads // p.retrieval_heads
        workspace["partial"] = empty(of_list * pitch, np.int16 if result == "half" else np.float32)
        workspace["partial_lse"] = empty(of_list, np.float32)
    if result == "half":
        workspace["partial_scale"] = empty(of_list, np.float32)
    if t["cu_seqlens"] is not None:
        inputs["cu_seqlens"] = t["cu_seqlens"].numpy()
        workspace["chunk_begin"] = empty(len(t["cu_seqlens"]))
    out = torch.empty(p.batch, p.queries, p.heads, dim, dtype=dtype)
    strides = {
        f"{name}_{axis}_stride": t[name].stride(i)
        for name in ("query", "key", "value")
        for i, axis in enumerate(("batch", "token", "head"))
    }
    return Case(
        name=f"{name or 'attend'} {name_of(dtype)} B={p.batch} T={p.queries} L={p.context} "
        f"H={p.heads}/{p.kv_heads} R={p.retrieval_heads} D={dim} S={p.chunk_size} k={top_k} "
        f"{result} rows={item_rows} slots={key_slots} ahead={ahead}",
        kernel="attend_chunk",
        inputs=inputs,
        expected={},
        workspace={
            **workspace,
            "out": storage(out),
            "lse": np.empty((p.batch, p.queries, p.heads), np.float32),
        },
        dtypes={"out": name_of(dtype)},
        scalars={
            **strides,
            **{"batch": p.batch, "queries": p.queries, "context": p.context},
            **{"heads": p.heads, "kv_heads": p.kv_heads, "retrieval_heads": p.retrieval_heads},
            **{"head_dim": dim, "chunk_size": p.chunk_size, "top_k": top_k},
            **{"vector": int(is_vector(t["query"], t["key"], t["value"], out))},
            **{"sequences": 0 if t["cu_seqlens"] is None else len(t["cu_seqlens"]) - 1},
            "scale": str(dim**-0.5 if scale is None else scale),
            **{"dtype": name_of(dtype), "result": result, "item_rows": item_rows},
            "workspace_bytes": workspace["workspace"].size,
            **{"key_slots": key_slots, "ahead": int(ahead), "range": query_range, "blocks": blocks},
        },
    )


def run(sim, case: Case, schedule=ANY, **options) -> dict[str, np.ndarray]:
    fresh = {name: np.empty_like(array) for name, array in case.workspace.items()}
    sim.run(case.kernel, case.inputs, {}, fresh, schedule, **options, **case.scalars)
    return fresh


def with_expected(sim, case: Case) -> Case:
    """What this run writes is what every other one must write, bit for bit."""
    got = run(sim, case)
    case.expected = {name: got[name] for name in ("out", "lse")}
    case.workspace = {n: a for n, a in case.workspace.items() if n not in case.expected}
    return case


def errors(p: Problem, got, indices, bias=None, scale=None):
    """(got, in this dtype without upcasting, the truth) of out and lse."""
    t = p.tensors
    sink = t["sink"]

    def of(dtype):
        rows = [t[name].to(dtype) for name in ("query", "key", "value")]
        extra = [None if x is None else x.to(dtype) for x in (bias, sink)]
        return reference.attend(*rows, indices, p.chunk_size, *extra, t["cu_seqlens"], scale)

    found = (tensor(got["out"], p.dtype), torch.from_numpy(got["lse"]))
    return {
        name: (x, plain, truth)
        for name, x, plain, truth in zip(
            ("out", "lse"), found, of(p.dtype), of(torch.float64), strict=True
        )
    }


def check(sim, p: Problem, indices, bias=None, scale=None, effective=None, truncated=False, **how):
    """`effective`: the bias that the reference is given, where it differs."""
    case = attend_case(p, indices, bias, scale=scale, **how)
    got = run(sim, case, truncated_products=truncated)
    effective = bias if effective is None else effective
    for name, values in errors(p, got, indices, effective, scale).items():
        assert_no_worse(f"{case.name}: {name}", *values)
