"""Bad CUDA tensors get the errors that bad CPU tensors get, on any machine.

Fake tensors carry CUDA's dispatch key. With torch's dispatch to Python switched off they reach the
C++ checks, which look at nothing but shapes, dtypes and devices; no memory is touched.
"""

import json

import pytest
import torch
from support import Problem
from test_errors import SHAPES_AND_TYPES, case_id, decode, error_of
from torch._subclasses.fake_tensor import FakeTensorMode

ops = torch.ops.resona
HAS_CUDA = json.loads(ops._build_info())["cuda"] != "none"
needs_cuda_build = pytest.mark.skipif(not HAS_CUDA, reason="built without CUDA kernels")
CPU_TYPES = "dtype float32, float16, bfloat16 or float64"
CUDA_TYPES = "dtype float32, float16 or bfloat16 on CUDA"
MODE = FakeTensorMode()


def on(device: str, arguments: dict) -> dict:
    """The same arguments as fake tensors on a device that need not exist."""

    def fake(t):
        with MODE:
            return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device)

    return {k: fake(t) if isinstance(t, torch.Tensor) else t for k, t in arguments.items()}


def errors_of(op, arguments) -> list[str]:
    """From the checks in Python and, where there are CUDA kernels, from those in C++."""
    texts = [error_of(op, arguments)]
    if HAS_CUDA:
        with torch._C._DisableTorchDispatch():
            texts.append(error_of(op, arguments))
    return texts


@pytest.mark.parametrize("case", SHAPES_AND_TYPES, ids=case_id)
def test_shapes_and_types(case):
    make, changes, argument, expected, got = case
    op, arguments = make(**changes)
    expected = expected.replace(CPU_TYPES, CUDA_TYPES)
    text = f"resona::{op.__name__}: {argument}: expected {expected}, got {got}"
    for error in errors_of(op, on("cuda", arguments)):
        assert error == text


def pool_chunks(**changes):
    context = torch.zeros(1, 61, 2, 12, dtype=changes.pop("dtype", torch.float32))
    return {"context_embedding": context, "chunk_size": 4, **changes}


@pytest.mark.parametrize("argument", ["query", "query_embedding"])
def test_float64_is_refused(argument):
    arguments = Problem().arguments()
    arguments[argument] = arguments[argument].double()
    for error in errors_of(ops.fused_retrieve_attend, on("cuda", arguments)):
        text = f"resona::fused_retrieve_attend: {argument}: expected {CUDA_TYPES}, got float64"
        assert error == text


@pytest.mark.parametrize("elsewhere", ["cpu", "cuda:1"])
@pytest.mark.parametrize("argument", ["key", "value", "query_embedding", "context_embedding"])
def test_tensors_on_two_devices(argument, elsewhere):
    arguments = on("cuda:0", Problem().arguments())
    arguments[argument] = on(elsewhere, Problem().arguments())[argument]
    for error in errors_of(ops.fused_retrieve_attend, arguments):
        assert error == (
            f"resona::fused_retrieve_attend: {argument}: expected device cuda:0 like query, "
            f"got {elsewhere}"
        )


@pytest.mark.parametrize("first, second", [("cuda:1", "cpu"), ("cpu", "cuda:0")])
def test_cu_seqlens_elsewhere(first, second):
    arguments = on(first, pool_chunks())
    arguments |= on(second, {"cu_seqlens": torch.tensor([0, 20, 61], dtype=torch.int32)})
    for error in errors_of(ops.pool_chunks, arguments):
        assert error == (
            f"resona::pool_chunks: cu_seqlens: expected device {first} like context_embedding, "
            f"got {second}"
        )


CALLS = [
    (ops.fused_retrieve_attend, Problem().arguments()),
    (ops.pool_chunks, pool_chunks()),
    decode(),
]


@pytest.mark.skipif(HAS_CUDA, reason="built with CUDA kernels")
@pytest.mark.parametrize("op, arguments", CALLS)
def test_a_build_without_kernels_says_so(op, arguments):
    arguments = on("cuda", arguments)
    with torch._C._DisableTorchDispatch():
        error = error_of(op, arguments)
    assert "expected device cpu (this build of resona_ext has no CUDA kernels; " in error
    assert "RESONA_USE_CUDA=1" in error and error.endswith("got cuda:0")


@needs_cuda_build
@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
@pytest.mark.parametrize("op, arguments", CALLS)
def test_a_torch_without_cuda_is_named(op, arguments):
    arguments = on("cuda", arguments)
    with torch._C._DisableTorchDispatch():
        error = error_of(op, arguments)
    assert error == (
        "resona: expected a torch with CUDA for a tensor on cuda:0, got one without libtorch_cuda"
    )


def test_fakes_have_the_shapes_of_results():
    """torch.compile and export see CUDA tensors before there is a GPU."""
    arguments = on("cuda", Problem().arguments())
    out, lse, indices, scores = ops.fused_retrieve_attend(**arguments)
    assert {t.device.type for t in (out, lse, indices, scores)} == {"cuda"}
    assert out.shape == arguments["query"].shape and indices.dtype == torch.int32
