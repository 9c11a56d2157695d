"""The operators as citizens of torch: opcheck, gradcheck, compile, export, AOTInductor, autocast, vmap."""

import math

import pytest
import torch
from support import Problem, selection
from torch.utils.flop_counter import FlopCounterMode

import resona_ext

ops = torch.ops.resona

inductor = pytest.mark.skipif(
    " " in torch.__file__,
    reason="torch is installed in a path with spaces: Inductor cannot link there (2.13)",
)

VARIANTS = {
    "plain": {},
    "grouped": dict(heads=4, kv_heads=2, retrieval_heads=2),
    "all extras": dict(heads=4, kv_heads=2, score_scale=True, sink=True),
    "packed": dict(lengths=[7, 0, 12, 4], score_scale=True, sink=True),
    "no queries": dict(queries=0),
}


def small(dtype=torch.float32, **options) -> Problem:
    defaults = dict(queries=17, context=21, head_dim=4, retrieval_dim=5, chunk_size=3, top_k=2)
    return Problem(dtype=dtype, **{**defaults, **options})


def requiring_grad(arguments: dict) -> dict:
    return {
        k: t.detach().clone().requires_grad_()
        if isinstance(t, torch.Tensor) and t.is_floating_point()
        else t
        for k, t in arguments.items()
    }


@pytest.mark.parametrize("variant", VARIANTS)
def test_opcheck(variant):
    p = small(**VARIANTS[variant])
    a = requiring_grad(p.arguments())
    indices = selection(p)
    cu_seqlens = a["cu_seqlens"]
    bias = torch.randn(indices.shape).requires_grad_()
    chunks = ops.pool_chunks(
        p.tensors["context_embedding"], p.chunk_size, cu_seqlens
    ).requires_grad_()
    attention = (a["query"], a["key"], a["value"])
    torch.library.opcheck(ops.fused_retrieve_attend.default, (), a)
    torch.library.opcheck(
        ops.pool_chunks.default, (a["context_embedding"], p.chunk_size, cu_seqlens)
    )
    search = (p.chunk_size, p.top_k, p.context, cu_seqlens)
    torch.library.opcheck(
        ops.retrieve.default, (a["query_embedding"].detach(), chunks.detach(), *search)
    )
    # With gradients opcheck's own loss adds a float to the sum of the integer output and fails (2.13);
    # test_compile_of_retrieve_with_gradients stands in for that one of its four tests.
    torch.library.opcheck(
        ops.retrieve.default,
        (a["query_embedding"], chunks, *search),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )
    torch.library.opcheck(
        ops.attend.default, (*attention, indices, p.chunk_size, bias, a["sink"], cu_seqlens)
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_opcheck_of_the_backward_operators(variant):
    """They refuse a second differentiation, so only schema and fakes are checked."""
    p = small(**VARIANTS[variant])
    a, indices = p.tensors, selection(p)
    tests = ("test_schema", "test_faketensor")
    cu_seqlens, bias = a["cu_seqlens"], torch.randn(selection(p).shape)
    chunks = ops.pool_chunks(a["context_embedding"], p.chunk_size, cu_seqlens)
    out, lse = ops.attend(
        a["query"], a["key"], a["value"], indices, p.chunk_size, bias, a["sink"], cu_seqlens
    )
    torch.library.opcheck(
        ops._pool_chunks_backward.default,
        (torch.randn_like(chunks), a["context_embedding"], p.chunk_size, cu_seqlens),
        test_utils=tests,
    )
    torch.library.opcheck(
        ops._retrieve_backward.default,
        (bias, indices, a["query_embedding"], chunks, p.chunk_size, p.context, cu_seqlens),
        test_utils=tests,
    )
    saved = (
        a["query"],
        a["key"],
        a["value"],
        indices,
        out,
        lse,
        p.chunk_size,
        bias,
        a["sink"],
        cu_seqlens,
    )
    for lse_gradient in (None, torch.randn_like(lse)):
        torch.library.opcheck(
            ops._attend_backward.default,
            (torch.randn_like(out), lse_gradient, *saved),
            test_utils=tests,
        )


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize(
    "heads", [(1, 1, 1), (4, 2, 2), (4, 2, 1)], ids=["one", "grouped", "shared"]
)
@pytest.mark.parametrize("score_scale", [False, True], ids=["hard", "score scale"])
@pytest.mark.parametrize("sink", [False, True], ids=["no sink", "sink"])
def test_gradcheck_fused(packed, heads, score_scale, sink):
    heads = dict(zip(("heads", "kv_heads", "retrieval_heads"), heads, strict=True))
    size = dict(lengths=[6, 0, 5]) if packed else dict(batch=1, queries=8, context=9)
    p = small(torch.float64, head_dim=3, score_scale=score_scale, sink=sink, **heads, **size)
    a = requiring_grad(p.arguments())
    leaves = {k: t for k, t in a.items() if isinstance(t, torch.Tensor) and t.requires_grad}

    def function(*values):
        out, lse, _, scores = ops.fused_retrieve_attend(
            **{**a, **dict(zip(leaves, values, strict=True))}
        )
        return out, lse.clamp_min(-9), torch.where(scores.isfinite(), scores, 0.0)

    assert torch.autograd.gradcheck(function, tuple(leaves.values()))


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("sink", [False, True], ids=["no sink", "sink"])
@pytest.mark.parametrize(
    "heads", [(1, 1, 1), (4, 2, 2), (4, 2, 1)], ids=["one", "grouped", "shared"]
)
def test_gradcheck_attend_with_bias(packed, sink, heads):
    size = dict(lengths=[6, 0, 5]) if packed else dict(batch=1, queries=8, context=9)
    heads = dict(zip(("heads", "kv_heads", "retrieval_heads"), heads, strict=True))
    p = small(torch.float64, head_dim=3, sink=sink, **heads, **size)
    a, indices = requiring_grad(p.tensors), selection(p)
    bias = torch.randn(indices.shape, dtype=torch.float64, requires_grad=True)
    leaves = [a["query"], a["key"], a["value"], bias] + ([a["sink"]] if sink else [])

    def function(query, key, value, bias, *sink):
        sink = sink[0] if sink else None
        out, lse = ops.attend(query, key, value, indices, p.chunk_size, bias, sink, a["cu_seqlens"])
        return out, lse.clamp_min(-9)

    assert torch.autograd.gradcheck(function, leaves)


class Model(torch.nn.Module):
    """A few linear maps around the operator."""

    def __init__(self, dim: int = 16, heads: int = 2):
        super().__init__()
        self.heads = heads
        self.maps = torch.nn.ModuleList([torch.nn.Linear(dim, dim, bias=False) for _ in range(4)])
        self.score_scale = torch.nn.Parameter(torch.ones(1))
        self.sink = torch.nn.Parameter(torch.zeros(heads))

    def forward(self, x):
        query, key, value, embedding = (m(x) for m in self.maps)
        query, key, value = (t.unflatten(-1, (self.heads, -1)) for t in (query, key, value))
        embedding = embedding.unsqueeze(2)
        out, lse, _, _ = ops.fused_retrieve_attend(
            query, key, value, embedding, embedding, 4, 2, self.score_scale, self.sink
        )
        return x + out.flatten(2), lse


def gradients_of(model, x):
    model.zero_grad()
    out, lse = model(x)
    (out.square().sum() + lse.sum()).backward()
    return [out.detach(), *(p.grad.clone() for p in model.parameters())]


def test_compile_fullgraph_dynamic():
    model = Model()
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    for length in (24, 37, 50):
        x = torch.randn(2, length, 16)
        torch.testing.assert_close(gradients_of(compiled, x), gradients_of(model, x))
    assert counter.frame_count == 1, "a new length must not recompile"


@inductor
def test_compile_with_inductor():
    model, x = Model(), torch.randn(2, 30, 16)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(
        gradients_of(compiled, x), gradients_of(model, x), rtol=1e-4, atol=1e-5
    )


def test_compile_of_retrieve_with_gradients():
    def function(query, chunks):
        _, scores = ops.retrieve(query, chunks, 3, 2, 3 * chunks.shape[1])
        return torch.where(scores.isfinite(), scores, 0.0).square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=True)
    for chunks in (4, 9):
        leaves = [torch.randn(2, n, 1, 5, requires_grad=True) for n in (3 * chunks, chunks)]
        expected = torch.autograd.grad(function(*leaves), leaves)
        torch.testing.assert_close(torch.autograd.grad(compiled(*leaves), leaves), expected)


def test_compile_of_the_layer():
    layer = resona_ext.Resona(16, num_heads=2, chunk_size=4, top_k=2, trainable_retrieval=True)
    x, e, y = (torch.randn(2, 30, 16) for _ in range(3))
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, e, y), layer(x, e, y))


def exported(model):
    length = torch.export.Dim("length", min=8, max=4096)
    return torch.export.export(model, (torch.randn(2, 30, 16),), dynamic_shapes=({1: length},))


def test_export():
    model = Model().eval()
    program = exported(model)
    assert any("fused_retrieve_attend" in str(n.target) for n in program.graph.nodes)
    for length in (9, 64):
        x = torch.randn(2, length, 16)
        torch.testing.assert_close(program.module()(x), model(x))


@inductor
@pytest.mark.slow
def test_aot_inductor(tmp_path):
    model = Model().eval().requires_grad_(False)
    package = torch._inductor.aoti_compile_and_package(
        exported(model), package_path=str(tmp_path / "m.pt2")
    )
    runner = torch._inductor.aoti_load_package(package)
    x = torch.randn(2, 45, 16)
    torch.testing.assert_close(list(runner(x)), list(model(x)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["fused", "attend", "retrieve", "pool_chunks"])
def test_autocast_casts_rows_and_nothing_else(name):
    p = small(score_scale=True, sink=True)
    a, indices = p.tensors, selection(p)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        if name == "fused":
            out, lse, indices, scores = ops.fused_retrieve_attend(**p.arguments())
            assert (out.dtype, lse.dtype, scores.dtype) == (
                torch.bfloat16,
                torch.float32,
                torch.float32,
            )
        elif name == "attend":
            bias = torch.zeros(indices.shape)
            out, lse = ops.attend(a["query"], a["key"], a["value"], indices, 3, bias, a["sink"])
            assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
        elif name == "retrieve":
            chunks = ops.pool_chunks(a["context_embedding"], 3)
            _, scores = ops.retrieve(a["query_embedding"], chunks.float(), 3, 2, p.context)
            assert scores.dtype == torch.float32
        else:
            assert ops.pool_chunks(a["context_embedding"], 3).dtype == torch.bfloat16
    assert ops.fused_retrieve_attend(**p.arguments())[0].dtype == torch.float32


def test_autocast_gradients_return_in_the_callers_dtype():
    a = requiring_grad(small(score_scale=True).arguments())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = ops.fused_retrieve_attend(**a)[0]
    out.float().square().sum().backward()
    for name in ("query", "key", "value", "query_embedding", "context_embedding", "score_scale"):
        assert a[name].grad.dtype == torch.float32 and a[name].grad.abs().sum() > 0


def test_autocast_leaves_float64_alone():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (
            ops.fused_retrieve_attend(**small(torch.float64).arguments())[0].dtype == torch.float64
        )


ROWS = ("query", "key", "value", "query_embedding", "context_embedding")


def stacked(problems, names):
    first = problems[0].arguments()
    return {
        k: torch.stack([p.arguments()[k] for p in problems]) if k in names else v
        for k, v in first.items()
    }


@pytest.mark.parametrize(
    "mapped",
    [ROWS, ("query", "query_embedding"), ("key",), (*ROWS, "score_scale"), ("sink",)],
    ids="+".join,
)
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_vmap_equals_a_loop(mapped, packed):
    size = dict(lengths=[8, 9]) if packed else dict(context=17)
    problems = [small(score_scale=True, sink=True, **size) for _ in range(3)]
    arguments = stacked(problems, mapped)
    fixed = {k: v for k, v in arguments.items() if k not in mapped}

    def function(*values):
        return ops.fused_retrieve_attend(**fixed, **dict(zip(mapped, values, strict=True)))

    got = torch.vmap(function)(*(arguments[k] for k in mapped))
    for i in range(3):
        expected = function(*(arguments[k][i] for k in mapped))
        for g, e in zip(got, expected, strict=True):
            torch.testing.assert_close(g[i], e)


def test_vmap_over_another_dimension_and_the_smaller_operators():
    p = small()
    context = (
        torch.stack([p.tensors["context_embedding"]] * 2, dim=3)
        * torch.tensor([1.0, -2.0])[:, None]
    )
    got = torch.vmap(lambda c: ops.pool_chunks(c, 3), in_dims=3)(context)
    assert torch.equal(got[1], ops.pool_chunks(context[..., 1, :], 3))
    queries = torch.randn(4, *p.tensors["query_embedding"].shape)
    indices, _ = torch.vmap(lambda q: ops.retrieve(q, got[0], 3, 2, p.context))(queries)
    assert torch.equal(indices[2], ops.retrieve(queries[2], got[0], 3, 2, p.context)[0])
    query = torch.randn(4, *p.tensors["query"].shape)
    out, _ = torch.vmap(
        lambda q, i: ops.attend(q, p.tensors["key"], p.tensors["value"], i, 3), in_dims=(0, 0)
    )(query, indices)
    expected = ops.attend(query[1], p.tensors["key"], p.tensors["value"], indices[1], 3)[0]
    torch.testing.assert_close(out[1], expected)


def test_flops_match_a_count_of_pairs():
    p = small(batch=1, queries=40, context=50, heads=4, kv_heads=2, retrieval_heads=2)
    with FlopCounterMode(display=False) as counter:
        ops.fused_retrieve_attend(**p.arguments())
    pairs = sum(position // p.chunk_size for position in range(10, 50))
    search = 2 * pairs * p.retrieval_heads * p.retrieval_dim
    pool = 48 * p.retrieval_heads * p.retrieval_dim
    attention = 4 * p.queries * p.heads * p.head_dim * p.top_k * p.chunk_size
    assert counter.get_total_flops() == search + pool + attention


def test_flops_of_the_backward_pass_are_counted():
    a = requiring_grad(small().arguments())
    with FlopCounterMode(display=False) as counter:
        ops.fused_retrieve_attend(**a)[0].sum().backward()
    assert counter.get_flop_counts()["Global"][ops._attend_backward] > 0


class TestFunctional:
    """The Python functions: named results, rank-3 embeddings, the global deterministic switch."""

    def test_retrieve_attend(self):
        p = small(score_scale=True, sink=True)
        out, aux = resona_ext.retrieve_attend(**p.arguments(), return_aux=True)
        raw = ops.fused_retrieve_attend(**p.arguments())
        assert all(map(torch.equal, (out, aux.lse, aux.indices, aux.scores), raw))
        assert torch.equal(resona_ext.retrieve_attend(**p.arguments()), out)

    def test_embeddings_without_heads(self):
        p = small()
        flat = {k: p.tensors[k].squeeze(2) for k in ("query_embedding", "context_embedding")}
        expected = resona_ext.retrieve_attend(**p.arguments())
        assert torch.equal(resona_ext.retrieve_attend(**p.arguments(**flat)), expected)
        chunks = resona_ext.pool_chunks(flat["context_embedding"], 3)
        found = resona_ext.retrieve(
            flat["query_embedding"], chunks.squeeze(2), chunk_size=3, top_k=2, context_length=21
        )
        assert found.indices.shape == (2, 17, 1, 2) and found.scores.dtype == torch.float32

    def test_attend_returns_lse_on_request(self):
        p = small()
        a, indices = p.tensors, selection(p)
        out = resona_ext.attend(a["query"], a["key"], a["value"], indices, chunk_size=3)
        both = resona_ext.attend(
            a["query"], a["key"], a["value"], indices, chunk_size=3, return_lse=True
        )
        assert torch.equal(out, both[0]) and both[1].shape == out.shape[:3]

    def test_scale_reaches_the_kernel(self):
        p = small()
        half = resona_ext.retrieve_attend(**p.arguments(), scale=0.25)
        default = resona_ext.retrieve_attend(**p.arguments())  # D = 4, so D ** -0.5 = 0.5
        doubled = resona_ext.retrieve_attend(
            **p.arguments(query=p.tensors["query"] * 2), scale=0.25
        )
        torch.testing.assert_close(doubled, default)
        assert not math.isclose(half.sum().item(), default.sum().item(), rel_tol=1e-3)

    def test_deterministic_algorithms_are_accepted(self):
        torch.use_deterministic_algorithms(True)
        try:
            a = requiring_grad(small(score_scale=True).arguments())
            resona_ext.retrieve_attend(**a).sum().backward()
        finally:
            torch.use_deterministic_algorithms(False)
        assert a["key"].grad is not None
