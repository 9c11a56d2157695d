"""Bad input: one error each that names operator, argument, what was expected and what came.

Every row runs twice, on CPU tensors (the checks in C++) and on fake tensors (the checks in Python), and
the two texts must be the same; checks of values run on CPU tensors alone.
"""

import math

import pytest
import torch
from support import Problem, selection
from torch._subclasses.fake_tensor import FakeTensorMode

ops = torch.ops.resona


def fused(**changes):
    return ops.fused_retrieve_attend, Problem(kv_heads=2, retrieval_heads=2).arguments(**changes)


def attend(**changes):
    p = Problem(kv_heads=2, retrieval_heads=2)
    names = ("query", "key", "value", "sink", "cu_seqlens")
    arguments = {name: p.tensors[name] for name in names}
    return ops.attend, {**arguments, "indices": selection(p), "chunk_size": 4, **changes}


def retrieve(**changes):
    arguments = dict(
        query_embedding=torch.randn(2, 50, 2, 12),
        chunk_embedding=torch.randn(2, 15, 2, 12),
        chunk_size=4,
        top_k=3,
        context_length=61,
    )
    return ops.retrieve, {**arguments, **changes}


def retrieve_two_level(**changes):
    return ops.retrieve_two_level, {**retrieve()[1], **changes}


def pool_chunks(**changes):
    return ops.pool_chunks, {
        "context_embedding": torch.randn(2, 61, 2, 12),
        "chunk_size": 4,
        **changes,
    }


def decode(**changes):
    p = Problem(kv_heads=2, retrieval_heads=2, queries=1, context=1)
    arguments = {name: t for name, t in p.tensors.items() if name != "cu_seqlens"}
    cache = dict(
        key_cache=zeros(2, 9, 2, 16),
        value_cache=zeros(2, 9, 2, 16),
        chunk_embedding=zeros(2, 2, 2, 12),
        open_sum=zeros(2, 2, 12),
        history=zeros(2, 8, 2, 12),
        lengths=zeros(2, dtype=I32),
    )
    return ops.decode_step, {**arguments, **cache, "chunk_size": 4, "top_k": 3, **changes}


def decode_two_level(**changes):
    upper = dict(superchunk_embedding=zeros(2, 1, 2, 12), superchunk_sum=zeros(2, 2, 12))
    arguments = {**decode()[1], **upper, "superchunk_size": 2}
    return ops.decode_step_two_level, {**arguments, **changes}


def packed(**changes):
    return ops.fused_retrieve_attend, Problem(lengths=[10, 20]).arguments(**changes)


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(*shape, dtype=dtype)


def cu(*borders, dtype=torch.int32):
    return torch.tensor(borders, dtype=dtype)


F16, F32, F64, I32 = torch.float16, torch.float32, torch.float64, torch.int32

# maker, changes, argument, expected, got
SHAPES_AND_TYPES = [
    # rank
    (fused, dict(query=zeros(50, 4, 16)), "query", "rank 4 [B, T, H, D]", "shape [50, 4, 16]"),
    (fused, dict(key=zeros(2, 61, 16)), "key", "rank 4 [B, L, Hkv, D]", "shape [2, 61, 16]"),
    (fused, dict(value=zeros(2, 61)), "value", "shape [B, L, Hkv, D] = [2, 61, 2, 16]", "[2, 61]"),
    (fused, dict(query_embedding=zeros(2, 50, 12)), "query_embedding", "rank 4 [B, T, R, E]", "shape [2, 50, 12]"),
    (fused, dict(context_embedding=zeros(12)), "context_embedding", "shape [B, L, R, E] = [2, 61, 2, 12]", "[12]"),
    (attend, dict(indices=zeros(2, 50, 3, dtype=I32)), "indices", "rank 4 [B, T, R, k]", "shape [2, 50, 3]"),
    (retrieve, dict(query_embedding=zeros(5)), "query_embedding", "rank 4 [B, T, R, E]", "shape [5]"),
    (pool_chunks, dict(context_embedding=zeros(5, 2)), "context_embedding", "rank 4 [B, L, R, E]", "shape [5, 2]"),
    # sizes that do not fit
    (fused, dict(key=zeros(3, 61, 2, 16)), "key", "B = 2 like query", "shape [3, 61, 2, 16]"),
    (fused, dict(key=zeros(2, 61, 2, 8)), "key", "D = 16 like query", "shape [2, 61, 2, 8]"),
    (fused, dict(value=zeros(2, 60, 2, 16)), "value", "shape [B, L, Hkv, D] = [2, 61, 2, 16]", "[2, 60, 2, 16]"),
    (fused, dict(query_embedding=zeros(1, 50, 2, 12)), "query_embedding", "B = 2 like query", "shape [1, 50, 2, 12]"),
    (fused, dict(query_embedding=zeros(2, 49, 2, 12)), "query_embedding", "T = 50 like query", "shape [2, 49, 2, 12]"),
    (
        fused,
        dict(context_embedding=zeros(2, 61, 2, 13)),
        "context_embedding",
        "shape [B, L, R, E] = [2, 61, 2, 12]",
        "[2, 61, 2, 13]",
    ),
    (fused, dict(query_embedding=zeros(2, 50, 2, 0)), "query_embedding", "retrieval dim E of at least 1", "E = 0"),
    (pool_chunks, dict(context_embedding=zeros(2, 9, 1, 0)), "context_embedding", "retrieval dim E of at least 1", "E = 0"),
    (attend, dict(indices=zeros(1, 50, 2, 3, dtype=I32)), "indices", "B = 2 like query", "shape [1, 50, 2, 3]"),
    (attend, dict(indices=zeros(2, 51, 2, 3, dtype=I32)), "indices", "T = 50 like query", "shape [2, 51, 2, 3]"),
    (attend, dict(indices=zeros(2, 50, 2, 0, dtype=I32)), "indices", "k of at least 1", "k = 0"),
    (
        retrieve,
        dict(chunk_embedding=zeros(2, 14, 2, 12)),
        "chunk_embedding",
        "shape [B, L // S, R, E] = [2, 15, 2, 12]",
        "[2, 14, 2, 12]",
    ),
    (retrieve, dict(query_embedding=zeros(2, 50, 0, 12)), "query_embedding", "R of at least 1", "R = 0"),
    # heads
    (fused, dict(query=zeros(2, 50, 3, 16)), "query", "H a multiple of Hkv = 2", "H = 3"),
    (fused, dict(query=zeros(2, 50, 0, 16)), "query", "H a multiple of Hkv = 2", "H = 0"),
    (fused, dict(key=zeros(2, 61, 0, 16), value=zeros(2, 61, 0, 16)), "key", "Hkv of at least 1", "Hkv = 0"),
    (fused, dict(query_embedding=zeros(2, 50, 3, 12)), "query_embedding", "R = 1 or a divisor of Hkv = 2", "R = 3"),
    (fused, dict(query_embedding=zeros(2, 50, 0, 12)), "query_embedding", "R = 1 or a divisor of Hkv = 2", "R = 0"),
    (attend, dict(indices=zeros(2, 50, 4, 3, dtype=I32)), "indices", "R = 1 or a divisor of Hkv = 2", "R = 4"),
    (
        fused,
        dict(query=zeros(2, 50, 4, 257), key=zeros(2, 61, 2, 257), value=zeros(2, 61, 2, 257)),
        "query",
        "head dim D from 1 to 256",
        "D = 257",
    ),
    (
        fused,
        dict(query=zeros(2, 50, 4, 0), key=zeros(2, 61, 2, 0), value=zeros(2, 61, 2, 0)),
        "query",
        "head dim D from 1 to 256",
        "D = 0",
    ),
    # lengths and counts
    (
        fused,
        dict(query=zeros(2, 62, 4, 16), query_embedding=zeros(2, 62, 2, 12)),
        "query",
        "T <= L = 61",
        "T = 62",
    ),
    (retrieve, dict(context_length=49), "query_embedding", "T <= L = 49", "T = 50"),
    (retrieve, dict(context_length=2**31), "query_embedding", "L < 2^31", "L = 2147483648"),
    (fused, dict(chunk_size=0), "chunk_size", "at least 1", "0"),
    (attend, dict(chunk_size=-3), "chunk_size", "at least 1", "-3"),
    (retrieve, dict(chunk_size=0), "chunk_size", "at least 1", "0"),
    (pool_chunks, dict(chunk_size=0), "chunk_size", "at least 1", "0"),
    (fused, dict(top_k=0), "top_k", "at least 1", "0"),
    (retrieve, dict(top_k=-1), "top_k", "at least 1", "-1"),
    (retrieve_two_level, dict(top_k=-1), "top_k", "at least 1", "-1"),
    (retrieve_two_level, dict(superchunk_size=0), "superchunk_size", "at least 1", "0"),
    (retrieve_two_level, dict(probes=-2), "probes", "at least 1", "-2"),
    (decode_two_level, dict(top_k=0), "top_k", "at least 1", "0"),
    (decode_two_level, dict(superchunk_size=0), "superchunk_size", "at least 1", "0"),
    (decode_two_level, dict(probes=0), "probes", "at least 1", "0"),
    (
        decode_two_level,
        dict(superchunk_size=3),
        "superchunk_embedding",
        "shape [B, M // S // P, R, E] = [2, 0, 2, 12]",
        "[2, 1, 2, 12]",
    ),
    (
        decode_two_level,
        dict(superchunk_embedding=zeros(2, 1, 2, 12, dtype=F16)),
        "superchunk_embedding",
        "dtype float32 like query_embedding",
        "float16",
    ),
    (
        decode_two_level,
        dict(superchunk_sum=zeros(2, 1, 12)),
        "superchunk_sum",
        "shape [B, R, E] = [2, 2, 12]",
        "[2, 1, 12]",
    ),
    (
        decode_two_level,
        dict(superchunk_sum=zeros(2, 2, 12, dtype=F64)),
        "superchunk_sum",
        "dtype float32",
        "float64",
    ),
    (
        decode_two_level,
        dict(superchunk_sum=zeros(2, 12, 2).mT),
        "superchunk_sum",
        "a contiguous tensor, as it is written in place",
        "strides [24, 1, 2]",
    ),
    # dtypes
    (fused, dict(key=zeros(2, 61, 2, 16, dtype=F16)), "key", "dtype float32 like query", "float16"),
    (fused, dict(value=zeros(2, 61, 2, 16, dtype=F64)), "value", "dtype float32 like query", "float64"),
    (
        fused,
        dict(context_embedding=zeros(2, 61, 2, 12, dtype=F16)),
        "context_embedding",
        "dtype float32 like query_embedding",
        "float16",
    ),
    (
        retrieve,
        dict(chunk_embedding=zeros(2, 15, 2, 12, dtype=F64)),
        "chunk_embedding",
        "dtype float32 like query_embedding",
        "float64",
    ),
    *(
        (fused, dict(query=zeros(2, 50, 4, 16, dtype=dtype)), "query", "dtype float32, float16, bfloat16 or float64", name)
        for dtype, name in ((torch.int64, "int64"), (torch.bool, "bool"), (torch.int8, "int8"))
    ),
    *(
        (make, {argument: zeros(2, 50, 2, 12, dtype=dtype)}, argument, "dtype float32, float16, bfloat16 or float64", name)
        for make, argument in ((fused, "query_embedding"), (retrieve, "query_embedding"), (pool_chunks, "context_embedding"))
        for dtype, name in ((torch.int32, "int32"), (torch.bool, "bool"))
    ),
    (attend, dict(indices=zeros(2, 50, 2, 3, dtype=torch.int64)), "indices", "dtype int32", "int64"),
    (attend, dict(indices=zeros(2, 50, 2, 3)), "indices", "dtype int32", "float32"),
    # bias, sink, score_scale, scale
    (attend, dict(bias=zeros(2, 50, 2, 2)), "bias", "shape [B, T, R, k] = [2, 50, 2, 3]", "[2, 50, 2, 2]"),
    (attend, dict(bias=zeros(2, 50, 2, 3, dtype=F16)), "bias", "dtype float32", "float16"),
    (attend, dict(bias=zeros(2, 50, 2, 3, dtype=F64)), "bias", "dtype float32", "float64"),
    (fused, dict(sink=zeros(5)), "sink", "shape [H] = [4]", "[5]"),
    (fused, dict(sink=zeros(4, dtype=torch.bfloat16)), "sink", "dtype float32", "bfloat16"),
    (attend, dict(sink=zeros(2, 2)), "sink", "shape [H] = [4]", "[2, 2]"),
    (fused, dict(score_scale=zeros(1)), "score_scale", "shape [R] = [2]", "[1]"),
    (fused, dict(score_scale=zeros(2, dtype=torch.int32)), "score_scale", "dtype float32", "int32"),
    (fused, dict(scale=math.nan), "scale", "a finite number", "nan"),
    (attend, dict(scale=math.inf), "scale", "a finite number", "inf"),
    # packed sequences
    (packed, dict(cu_seqlens=cu(0, 10, 30, dtype=torch.int64)), "cu_seqlens", "dtype int32", "int64"),
    (packed, dict(cu_seqlens=cu(0, 10, 30).view(1, 3)), "cu_seqlens", "rank 1 [n + 1]", "shape [1, 3]"),
    (packed, dict(cu_seqlens=cu()), "cu_seqlens", "at least one value", "none"),
    (fused, dict(cu_seqlens=cu(0, 61)), "cu_seqlens", "B = 1 for packed sequences", "B = 2"),
    (
        packed,
        dict(query=zeros(1, 29, 4, 16), query_embedding=zeros(1, 29, 1, 12)),
        "cu_seqlens",
        "T = L = 30 for packed sequences",
        "T = 29",
    ),
    (pool_chunks, dict(cu_seqlens=cu(0, 61)), "cu_seqlens", "B = 1 for packed sequences", "B = 2"),
    (retrieve, dict(cu_seqlens=cu(0, 61, dtype=torch.int16)), "cu_seqlens", "dtype int32", "int16"),
    # the decode step and its cache
    (decode, dict(query=zeros(2, 0, 4, 16), query_embedding=zeros(2, 0, 2, 12)), "query", "T = 1, one new token per sequence", "shape [2, 0, 4, 16]"),
    (
        decode,
        dict(key=zeros(2, 2, 2, 16), value=zeros(2, 2, 2, 16), context_embedding=zeros(2, 2, 2, 12)),
        "key",
        "L = 1, one new token per sequence",
        "shape [2, 2, 2, 16]",
    ),
    (decode, dict(context_embedding=zeros(2, 1, 2, 11)), "context_embedding", "shape [B, L, R, E] = [2, 1, 2, 12]", "[2, 1, 2, 11]"),
    (decode, dict(top_k=0), "top_k", "at least 1", "0"),
    (decode, dict(chunk_size=0), "chunk_size", "at least 1", "0"),
    (decode, dict(sink=zeros(5)), "sink", "shape [H] = [4]", "[5]"),
    (decode, dict(scale=math.inf), "scale", "a finite number", "inf"),
    (decode, dict(key_cache=zeros(9, 2, 16)), "key_cache", "rank 4 [B, M, Hkv, D]", "shape [9, 2, 16]"),
    (decode, dict(key_cache=zeros(1, 9, 2, 16)), "key_cache", "shape [B, M, Hkv, D] = [2, 9, 2, 16]", "[1, 9, 2, 16]"),
    (decode, dict(key_cache=zeros(2, 0, 2, 16)), "key_cache", "T <= L = 0", "T = 1"),
    (decode, dict(value_cache=zeros(2, 8, 2, 16)), "value_cache", "shape [B, M, Hkv, D] = [2, 9, 2, 16]", "[2, 8, 2, 16]"),
    (decode, dict(chunk_embedding=zeros(2, 3, 2, 12)), "chunk_embedding", "shape [B, M // S, R, E] = [2, 2, 2, 12]", "[2, 3, 2, 12]"),
    (decode, dict(open_sum=zeros(2, 1, 2, 12)), "open_sum", "shape [B, R, E] = [2, 2, 12]", "[2, 1, 2, 12]"),
    (decode, dict(history=zeros(2, 8, 12)), "history", "rank 4 [B, W, R, E]", "shape [2, 8, 12]"),
    (decode, dict(history=zeros(2, 8, 2, 13)), "history", "shape [B, W, R, E] = [2, 8, 2, 12]", "[2, 8, 2, 13]"),
    (decode, dict(lengths=zeros(3, dtype=I32)), "lengths", "shape [B] = [2]", "[3]"),
    (decode, dict(key_cache=zeros(2, 9, 2, 16, dtype=F16)), "key_cache", "dtype float32 like query", "float16"),
    (decode, dict(value_cache=zeros(2, 9, 2, 16, dtype=F64)), "value_cache", "dtype float32 like query", "float64"),
    (
        decode,
        dict(chunk_embedding=zeros(2, 2, 2, 12, dtype=F16)),
        "chunk_embedding",
        "dtype float32 like query_embedding",
        "float16",
    ),
    (decode, dict(open_sum=zeros(2, 2, 12, dtype=F64)), "open_sum", "dtype float32", "float64"),
    (decode, dict(history=zeros(2, 8, 2, 12, dtype=F16)), "history", "dtype float32 like query_embedding", "float16"),
    (decode, dict(lengths=zeros(2, dtype=torch.int64)), "lengths", "dtype int32", "int64"),
]  # fmt: skip

VALUES = [
    (packed, dict(cu_seqlens=cu(1, 10, 30)), "cu_seqlens", "a first value of 0", "1"),
    (packed, dict(cu_seqlens=cu(0, 10, 29)), "cu_seqlens", "a last value of L = 30", "29"),
    (
        packed,
        dict(cu_seqlens=cu(0, 20, 10, 30)),
        "cu_seqlens",
        "values that never decrease",
        "20 before 10",
    ),
    (
        packed,
        dict(cu_seqlens=cu(0, -5, 30)),
        "cu_seqlens",
        "values that never decrease",
        "0 before -5",
    ),
    (
        packed,
        dict(cu_seqlens=cu(0, 99, 30)),
        "cu_seqlens",
        "values that never decrease",
        "99 before 30",
    ),
    (
        decode,
        dict(lengths=cu(8, 9)),
        "lengths",
        "0 to M - 1 = 8, room for one more token",
        "9 at [1]",
    ),
    (
        decode,
        dict(lengths=cu(-3, 0)),
        "lengths",
        "0 to M - 1 = 8, room for one more token",
        "-3 at [0]",
    ),
]


def error_of(op, arguments) -> str:
    with pytest.raises(RuntimeError) as error:
        op(**arguments)
    return str(error.value)


def case_id(case) -> str:
    make, _, argument, expected, _ = case
    return f"{make.__name__}-{argument}-{expected}"


@pytest.mark.parametrize("case", SHAPES_AND_TYPES, ids=case_id)
def test_shapes_and_types(case):
    make, changes, argument, expected, got = case
    op, arguments = make(**changes)
    text = f"resona::{op.__name__}: {argument}: expected {expected}, got {got}"
    assert error_of(op, arguments) == text
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        faked = {
            k: mode.from_tensor(t) if isinstance(t, torch.Tensor) else t
            for k, t in arguments.items()
        }
        assert error_of(op, faked) == text


STRIDED = [
    ("key_cache", zeros(2, 9, 1, 16).expand(2, 9, 2, 16), "[144, 16, 0, 1]"),
    ("history", zeros(2, 16, 2, 12)[:, ::2], "[384, 48, 12, 1]"),
]


@pytest.mark.parametrize(("argument", "tensor", "strides"), STRIDED)
def test_what_is_written_in_place_is_contiguous(argument, tensor, strides):
    op, arguments = decode(**{argument: tensor})
    expected = "a contiguous tensor, as it is written in place"
    text = f"resona::decode_step: {argument}: expected {expected}, got strides {strides}"
    assert error_of(op, arguments) == text
    with FakeTensorMode() as mode:
        faked = {
            k: mode.from_tensor(t) if isinstance(t, torch.Tensor) else t
            for k, t in arguments.items()
        }
        assert error_of(op, faked) == text


@pytest.mark.parametrize("case", VALUES, ids=case_id)
def test_values(case):
    make, changes, argument, expected, got = case
    op, arguments = make(**changes)
    assert (
        error_of(op, arguments)
        == f"resona::{op.__name__}: {argument}: expected {expected}, got {got}"
    )


@pytest.mark.parametrize("dtype", [torch.complex64, torch.uint8, torch.float8_e4m3fn])
def test_other_dtypes(dtype):
    op, arguments = fused(query=torch.zeros(2, 50, 4, 16).to(dtype))
    text = error_of(op, arguments)
    assert text.startswith("resona::fused_retrieve_attend: query: expected dtype float32, float16")


# position p = 11 of a row with T = 50, L = 61, S = 4: chunks 0 ... 1 are eligible (position 22: 0 ... 4)
@pytest.mark.parametrize("bad", [-2, -(2**31), 2, 15, 2**31 - 1])
def test_index_out_of_range_or_not_eligible(bad):
    op, arguments = attend()
    arguments["indices"][1, 0, 1, 2] = bad
    expected = "indices: expected -1 or a chunk that lies wholly before its query"
    assert error_of(op, arguments) == f"resona::attend: {expected}, got {bad} at [1, 0, 1, 2]"


def test_the_last_eligible_index_is_accepted():
    op, arguments = attend()
    arguments["indices"][:] = -1
    arguments["indices"][0, 0, 0, 0] = 1
    op(**arguments)


def test_packed_indices_are_checked_within_their_own_sequence():
    p = Problem(lengths=[10, 20])
    indices = torch.full((1, 30, 1, 1), -1, dtype=torch.int32)
    indices[0, 10 + 4] = 0
    a = p.tensors
    ops.attend(a["query"], a["key"], a["value"], indices, 4, cu_seqlens=a["cu_seqlens"])
    indices[0, 10 + 3] = 0  # would be eligible if the grid did not restart
    with pytest.raises(
        RuntimeError, match=r"indices: expected -1 or a chunk .* got 0 at \[0, 13, 0, 0\]"
    ):
        ops.attend(a["query"], a["key"], a["value"], indices, 4, cu_seqlens=a["cu_seqlens"])


@pytest.mark.parametrize(
    "argument", ["query", "key", "value", "query_embedding", "context_embedding"]
)
def test_mixed_devices(argument):
    op, arguments = fused()
    arguments[argument] = arguments[argument].to("meta")
    text = error_of(op, arguments)
    assert text.startswith("resona::fused_retrieve_attend: ") and "device" in text


def test_double_backward():
    p = Problem(score_scale=True)
    a = p.arguments()
    a["query"].requires_grad_()
    out = ops.fused_retrieve_attend(**a)[0]
    (grad,) = torch.autograd.grad(out.sum(), a["query"], create_graph=True)
    with pytest.raises(RuntimeError, match="resona::_attend_backward: double backward: expected"):
        grad.sum().backward()


def test_forward_mode():
    p = Problem()
    a = p.arguments()
    with torch.autograd.forward_ad.dual_level():
        a["query"] = torch.autograd.forward_ad.make_dual(a["query"], torch.randn_like(a["query"]))
        with pytest.raises(RuntimeError, match="resona::fused_retrieve_attend: forward-mode"):
            ops.fused_retrieve_attend(**a)


def test_forward_mode_through_torch_func():
    a = Problem().arguments()
    query = a.pop("query")
    with pytest.raises(RuntimeError, match="resona::fused_retrieve_attend: forward-mode"):
        torch.func.jvp(lambda q: ops.fused_retrieve_attend(q, **a)[0], (query,), (query,))


def test_a_failed_call_leaves_its_inputs_alone():
    op, arguments = attend()
    before = {k: t.clone() for k, t in arguments.items() if isinstance(t, torch.Tensor)}
    arguments["indices"][0, 0, 0, 0] = 99
    before["indices"] = arguments["indices"].clone()
    error_of(op, arguments)
    assert all(torch.equal(before[k], arguments[k]) for k in before)
