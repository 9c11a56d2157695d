"""The two-level search: the same bits as the reference, exact where it says so, a citizen of torch."""

import json
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import ALL_DTYPES, CONTENTS, Problem, embeddings, name_of
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import resona_ext
from resona_ext import reference

ops = torch.ops.resona


def both(query, context, chunk_size, top_k, superchunk_size, probes, cu_seqlens=None):
    chunks = ops.pool_chunks(context, chunk_size, cu_seqlens)
    arguments = (query, chunks, chunk_size, top_k, context.shape[1], cu_seqlens)
    sizes = {"superchunk_size": superchunk_size, "probes": probes}
    got = ops.retrieve_two_level(*arguments, **sizes)
    return got, reference.retrieve_two_level(*arguments, **sizes)


def assert_same_bits(got, expected):
    assert torch.equal(got[0], expected[0]), "indices differ"
    assert got[1].dtype == expected[1].dtype
    assert torch.equal(got[1].nan_to_num(7.0), expected[1].nan_to_num(7.0)), "scores differ"
    assert torch.equal(got[1].isnan(), expected[1].isnan())


@pytest.mark.parametrize("kind", ["random", "zipf", "two_letters"])
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=name_of)
@pytest.mark.parametrize(
    "chunk_size, top_k, superchunk_size, probes, dim",
    [(1, 1, 4, 1, 16), (2, 5, 7, 3, 40), (1, 8, 70, 1, 33)],
)
def test_equals_reference(kind, dtype, chunk_size, top_k, superchunk_size, probes, dim):
    context = embeddings(kind, 1, 150 * chunk_size + 1, 2, dim, dtype)
    query = context.roll(5, dims=1)  # queries that occur in the context
    assert_same_bits(*both(query, context, chunk_size, top_k, superchunk_size, probes))


@pytest.mark.parametrize("kind", ["random", "four_letters"])
def test_many_queries_of_one_superchunk(kind):
    """More than meet a tile of chunks at once, in several tasks."""
    context = embeddings(kind, 2, 1500, 1, 24, torch.float32)
    assert_same_bits(*both(context[:, -1400:], context, 2, 5, 90, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_packed_restarts_both_grids(dtype):
    lengths = [0, 37, 3, 0, 164, 1, 40]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    context = embeddings("zipf", 1, sum(lengths), 2, 20, dtype)
    got, expected = both(context, context, 4, 3, 5, 2, cu_seqlens)
    assert_same_bits(got, expected)
    own = context[:, int(cu_seqlens[4]) : int(cu_seqlens[5])]
    alone, _ = both(own, own, 4, 3, 5, 2)
    assert torch.equal(got[0][:, int(cu_seqlens[4]) : int(cu_seqlens[5])], alone[0])


@settings(
    max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
@given(st.data())
def test_any_sizes(data):
    draw = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    torch.manual_seed(draw(0, 2**20))
    kind = data.draw(st.sampled_from(sorted(CONTENTS)))
    dtype = data.draw(st.sampled_from(ALL_DTYPES))
    length, dim, heads = draw(0, 150), draw(1, 40), draw(1, 2)
    context = embeddings(kind, draw(0, 2), length, heads, dim, dtype)
    query = context[:, draw(0, length) :]
    sizes = (draw(1, 9), draw(1, 12), draw(1, 40), draw(1, 12))
    got, expected = both(query, context, *sizes)
    assert_same_bits(got, expected)
    chunk_size, top_k, superchunk_size, probes = sizes
    exact = ops.retrieve(query, ops.pool_chunks(context, chunk_size), chunk_size, top_k, length)
    position = torch.arange(length - query.shape[1], length)
    short = position // (chunk_size * superchunk_size) <= probes
    assert torch.equal(got[0][:, short], exact[0][:, short]), (
        "few superchunks are all of them searched"
    )
    assert (got[1] <= exact[1]).logical_or(exact[1].isnan()).all()


def test_the_superchunk_that_the_past_ends_in_is_always_searched():
    """A token that repeats the one S tokens ago finds it, whatever else looks alike from afar."""
    context = torch.randn(1, 200, 1, 64)
    query = context.roll(2, dims=1)  # row p is the context at p - 2: chunk p - 2, S = 1
    indices, _ = ops.retrieve_two_level(
        query, ops.pool_chunks(context, 1), 1, 1, 200, superchunk_size=16, probes=1
    )
    inside = [p for p in range(2, 200) if (p - 2) // 16 == p // 16]
    assert all(indices[0, p, 0, 0] == p - 2 for p in inside)


def test_fewer_slots_than_the_exact_search_where_fewer_chunks_are_searched():
    context = torch.randn(1, 64, 1, 8)
    got, expected = both(context, context, 1, 50, 4, 2)
    assert_same_bits(got, expected)
    assert (got[0][0, 63, 0] >= 0).sum() == 2 * 4 + 3


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["query", "chunks"])
def test_what_is_not_finite(bad, where):
    chunks, query = torch.randn(1, 90, 1, 6), torch.randn(1, 360, 1, 6)
    (query if where == "query" else chunks)[:, 30:60, :, 2] = bad
    arguments = (query, chunks, 4, 12, 360)
    sizes = {"superchunk_size": 5, "probes": 4}
    got = ops.retrieve_two_level(*arguments, **sizes)
    assert_same_bits(got, reference.retrieve_two_level(*arguments, **sizes))


def test_zero_norms():
    context = torch.randn(1, 120, 1, 8)
    context[:, 10:30] = 0
    query = torch.randn(1, 120, 1, 8)
    query[:, 60:] = 0
    got, expected = both(query, context, 2, 3, 4, 2)
    assert_same_bits(got, expected)
    assert got[0][0, -1, 0].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    "length, chunk_size, top_k, expected",
    [
        (262144, 2, 8, (128, 16)),
        (262144, 16, 8, (32, 16)),
        (1 << 20, 16, 8, (64, 16)),
        (262144, 2, 32, (64, 64)),
        (65536, 64, 8, (16, 16)),
        (10, 64, 8, (2, 1)),
        (0, 1, 1, (2, 1)),
        (2**31 - 1, 1, 2**63 - 1, (16, 2**31 - 1)),
    ],
)
def test_sizes_by_default(length, chunk_size, top_k, expected):
    assert ops._plan_two_level(length, chunk_size, top_k) == expected


MANY = [2**54, 2**62, 2**63 - 1]


@pytest.mark.timeout(60, method="thread")
@pytest.mark.parametrize("probes", MANY)
@pytest.mark.parametrize(
    "where", [(0, 1, 1), (1000, 2, 8), (2**31 - 1, 1, 8), (2**63 - 1, 1, 2**63 - 1)], ids=str
)
def test_more_probes_than_chunks(where, probes):
    most = max(1, where[0] // where[1])
    by_default = (min(16, most + 1), min(probes, most))
    assert ops._plan_two_level(*where, None, probes) == by_default
    assert ops._plan_two_level(*where, 7, probes) == (min(7, most + 1), min(probes, most))
    assert ops._plan_two_level(*where, probes, 7) == (min(probes, most + 1), min(7, most))


@pytest.mark.timeout(60, method="thread")
@pytest.mark.parametrize("probes", MANY)
@pytest.mark.parametrize("size", [None, 4, 2**62])
def test_a_search_with_more_probes_than_chunks(size, probes):
    query, chunks = torch.randn(2, 90, 1, 8), torch.randn(2, 45, 1, 8)
    sizes = {"superchunk_size": size, "probes": probes}
    got = ops.retrieve_two_level(query, chunks, 2, 3, 90, **sizes)
    assert_same_bits(got, ops.retrieve(query, chunks, 2, 3, 90))
    with FakeTensorMode(allow_non_fake_inputs=True), FlopCounterMode(display=False) as counter:
        ops.retrieve_two_level(query, chunks, 2, 3, 90, **sizes)
    assert counter.get_total_flops() > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context_length": -1}, "context_length: expected at least 0, got -1"),
        ({"chunk_size": 0}, "chunk_size: expected at least 1, got 0"),
        ({"superchunk_size": 0}, "superchunk_size: expected at least 1, got 0"),
        ({"probes": 0}, "probes: expected at least 1, got 0"),
    ],
)
def test_a_plan_of_impossible_sizes(changes, message):
    """The layer asks for one before the cache and the operators look at its attributes."""
    sizes = {"context_length": 100, "chunk_size": 2, "top_k": 3} | changes
    with pytest.raises(RuntimeError, match=f"resona::_plan_two_level: {message}"):
        ops._plan_two_level(**sizes)


def test_the_default_sizes_are_used():
    context = embeddings("zipf", 1, 3000, 1, 16, torch.bfloat16)
    sizes = ops._plan_two_level(3000, 1, 3)
    assert 3000 // sizes[0] > sizes[1], "else it is the exact search"
    got, expected = both(context[:, -200:], context, 1, 3, *sizes)
    assert_same_bits(got, expected)
    chunks = ops.pool_chunks(context, 1)
    assert torch.equal(ops.retrieve_two_level(context[:, -200:], chunks, 1, 3, 3000)[0], got[0])


SIZES = {"superchunk_size": 2, "probes": 2}


@pytest.mark.parametrize("lengths", [None, [9, 0, 11]], ids=["dense", "packed"])
def test_gradcheck(lengths):
    size = {"queries": 9, "context": 16, "retrieval_dim": 3, "lengths": lengths}
    p = Problem(batch=1, dtype=torch.float64, **size)
    a = p.tensors
    chunks = ops.pool_chunks(a["context_embedding"], 2, a["cu_seqlens"])
    leaves = [t.clone().requires_grad_() for t in (a["query_embedding"], chunks)]

    def function(query, chunks):
        search = (query, chunks, 2, 3, p.context, a["cu_seqlens"])
        _, scores = ops.retrieve_two_level(*search, **SIZES)
        return torch.where(scores.isfinite(), scores, 0.0)

    assert torch.autograd.gradcheck(function, leaves)


def test_opcheck():
    query, chunks = torch.randn(2, 30, 1, 5), torch.randn(2, 16, 1, 5)
    torch.library.opcheck(ops.retrieve_two_level.default, (query, chunks, 2, 3, 33), SIZES)
    torch.library.opcheck(ops.retrieve_two_level.default, (query, chunks, 2, 3, 33), {})
    # With gradients as in test_torch.py: opcheck's own loss fails on the integer output (2.13).
    torch.library.opcheck(
        ops.retrieve_two_level.default,
        (query.requires_grad_(), chunks, 2, 3, 33),
        SIZES,
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


def test_compile_with_gradients():
    def function(query, context):
        out = resona_ext.retrieve_attend(
            query, query, query, query, context, chunk_size=2, top_k=2, search="two_level",
            score_scale=torch.ones(1), **SIZES,
        )  # fmt: skip
        return out.square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=True)
    for length in (24, 41):
        leaves = [torch.randn(2, length, 1, 5, requires_grad=True) for _ in range(2)]
        expected = torch.autograd.grad(function(*leaves), leaves)
        torch.testing.assert_close(torch.autograd.grad(compiled(*leaves), leaves), expected)


def test_vmap_equals_a_loop():
    query, chunks = torch.randn(3, 1, 30, 1, 5), torch.randn(1, 15, 1, 5)
    search = lambda q: ops.retrieve_two_level(q, chunks, 2, 3, 30, **SIZES)  # noqa: E731
    indices, scores = torch.vmap(search)(query)
    for i in range(3):
        expected = search(query[i])
        assert torch.equal(indices[i], expected[0]) and torch.equal(scores[i], expected[1])


def test_autocast():
    query, chunks = torch.randn(1, 30, 1, 5), torch.randn(1, 15, 1, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = ops.retrieve_two_level(query, chunks, 2, 3, 30, **SIZES)
    expected = ops.retrieve_two_level(query.bfloat16(), chunks.bfloat16(), 2, 3, 30, **SIZES)
    assert torch.equal(got[0], expected[0]) and got[1].dtype == torch.float32


def test_flops():
    query, chunks = torch.randn(1, 20, 1, 5), torch.randn(1, 20, 1, 5)
    with FlopCounterMode(display=False) as counter:
        ops.retrieve_two_level(query, chunks, 1, 3, 20, superchunk_size=4, probes=2)
    centroids = 20 * 5 + 2 * 5 * sum(p // 4 for p in range(20))
    assert counter.get_total_flops() == centroids + 2 * 20 * 5 * (2 * 4 + 2)


class TestPython:
    def test_retrieve(self):
        query, chunks = torch.randn(1, 60, 5), torch.randn(1, 30, 5)
        got = resona_ext.retrieve(
            query, chunks, chunk_size=2, top_k=3, context_length=60, search="two_level", **SIZES
        )
        expected = ops.retrieve_two_level(query[:, :, None], chunks[:, :, None], 2, 3, 60, **SIZES)
        assert torch.equal(got.indices, expected[0]) and torch.equal(got.scores, expected[1])

    @pytest.mark.parametrize("lengths", [None, [30, 31]], ids=["dense", "packed"])
    def test_retrieve_attend_searched_in_full_is_the_fused_operator(self, lengths):
        p = Problem(score_scale=True, sink=True, lengths=lengths, batch=1)
        results = []
        for search in ({}, {"search": "two_level", "superchunk_size": 2, "probes": 99}):
            a = {
                k: t.clone().requires_grad_()
                if isinstance(t, torch.Tensor) and t.is_floating_point()
                else t
                for k, t in p.arguments().items()
            }
            out, aux = resona_ext.retrieve_attend(**a, **search, return_aux=True)
            (out.square().sum() + aux.lse.clamp_min(-9).sum()).backward()
            leaves = [t for t in a.values() if isinstance(t, torch.Tensor) and t.requires_grad]
            results.append([out, *aux, *(t.grad for t in leaves)])
        for exact, got in zip(*results, strict=True):
            torch.testing.assert_close(got, exact)

    def test_embeddings_of_another_dtype(self):
        """Scores of float64 embeddings weigh float32 rows."""
        p = Problem(score_scale=True, embedding_dtype=torch.float64)
        sizes = {"search": "two_level", "superchunk_size": 2, "probes": 99}
        out = resona_ext.retrieve_attend(**p.arguments(), **sizes)
        torch.testing.assert_close(out, resona_ext.retrieve_attend(**p.arguments()))

    def test_retrieve_attend_attends_to_what_was_found(self):
        p = Problem(batch=1, queries=90, context=90, score_scale=True, chunk_size=2)
        sizes = {"search": "two_level", "superchunk_size": 4, "probes": 2}
        out, aux = resona_ext.retrieve_attend(**p.arguments(), **sizes, return_aux=True)
        a = p.tensors
        bias = a["score_scale"][:, None] * torch.where(aux.indices >= 0, aux.scores, 0.0)
        expected, lse = reference.attend(a["query"], a["key"], a["value"], aux.indices, 2, bias)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(aux.lse, lse)
        exact = resona_ext.retrieve_attend(**p.arguments(), return_aux=True)[1]
        assert not torch.equal(aux.indices, exact.indices)

    @pytest.mark.parametrize(
        "changes, text",
        [
            ({"search": "fast"}, 'search: expected "exact" or "two_level", got \'fast\''),
            ({"probes": 3}, 'probes: expected None with search="exact", got 3'),
            (
                {"superchunk_size": 3},
                'superchunk_size: expected None with search="exact", got 3',
            ),
        ],
    )
    def test_errors(self, changes, text):
        p = Problem()
        with pytest.raises(ValueError) as error:
            resona_ext.retrieve_attend(**p.arguments(), **changes)
        assert str(error.value) == f"retrieve_attend: {text}"

    def test_recall(self):
        p = Problem(batch=2, queries=100, context=120, retrieval_heads=2, chunk_size=2, top_k=4)
        rows = p.tensors["query_embedding"], p.tensors["context_embedding"]
        chunks = ops.pool_chunks(rows[1], 2)
        exact, _ = ops.retrieve(rows[0], chunks, 2, 4, 120)
        found, _ = ops.retrieve_two_level(rows[0], chunks, 2, 4, 120, **SIZES)
        counted = exact >= 0
        hit = (exact.unsqueeze(-1) == found.unsqueeze(-2)).any(-1) & counted
        complete = (hit == counted).all(-1) & counted.any(-1)
        got = resona_ext.search_recall(*rows, chunk_size=2, top_k=4, **SIZES)
        assert got == (
            hit.sum().item() / counted.sum().item(),
            complete.sum().item() / counted.any(-1).sum().item(),
            2,
            2,
        )
        assert 0.1 < got.recall < 0.99

    def test_recall_of_ties_and_of_nothing(self):
        same = torch.ones(1, 200, 1, 4)
        got = resona_ext.search_recall(
            same, same, chunk_size=1, top_k=3, superchunk_size=5, probes=2
        )
        assert got == (1.0, 1.0, 5, 2)
        nothing = resona_ext.search_recall(same[:, :3], same[:, :3], chunk_size=4, top_k=3)
        assert nothing[:2] == (1.0, 1.0)


class TestLayer:
    def make(self, **options):
        torch.manual_seed(0)
        return resona_ext.Resona(
            16, num_heads=2, chunk_size=2, top_k=2, search="two_level", **options
        )

    @pytest.mark.parametrize("encoder", ["tied", lambda tokens: tokens[:, :, -1]])
    def test_the_switches_reach_the_search(self, encoder):
        layer = self.make(encoder=encoder, trainable_retrieval=True)
        x, e, y = torch.randn(3, 1, 90, 16).unbind()
        exact = layer(x, e, y)  # by default few superchunks: all of them are searched
        layer.superchunk_size, layer.probes = 3, 1
        assert not torch.allclose(layer(x, e, y), exact)
        layer.probes = 99
        torch.testing.assert_close(layer(x, e, y), exact)
        layer.search, layer.superchunk_size, layer.probes = "exact", None, None
        torch.testing.assert_close(layer(x, e, y), exact)

    @pytest.mark.parametrize(
        "options, text",
        [
            ({"search": "fast"}, "search must be one of ('exact', 'two_level'), got 'fast'"),
            ({"probes": 0}, "probes must be None or at least 1, got 0"),
            (
                {"search": "exact", "superchunk_size": 4},
                'superchunk_size must be None with search="exact", got 4',
            ),
        ],
    )
    def test_errors(self, options, text):
        with pytest.raises(ValueError) as error:
            resona_ext.Resona(16, num_heads=2, **{"search": "two_level", **options})
        assert str(error.value) == f"Resona: {text}"


def test_the_benchmark(tmp_path, threads, capsys):
    from benchmarks.kernels import two_level

    threads(1)
    command = ["--tokens", "3000", "--contents", "random,correlated-64", "--retrieval-dim", "16"]
    command += ["--threads", "1", "--processor-time", "--out", str(tmp_path / "r")]
    assert two_level.main(command) == 0
    rows = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert list(rows) == [f"{c}/3000/S{s}/bfloat16" for s in (2, 16) for c in command[3].split(",")]
    assert (
        rows["correlated-64/3000/S2/bfloat16"]["recall"] > rows["random/3000/S2/bfloat16"]["recall"]
    )
    assert rows["random/3000/S16/bfloat16"]["recall"] == 1, "few superchunks: the same search"
    assert all(row["speedup"] > 0 for row in rows.values())


@pytest.mark.parametrize("clock", [[], ["--threads", "1", "--processor-time"]], ids=["wall", "cpu"])
def test_the_benchmark_of_steps(tmp_path, threads, clock):
    from benchmarks.kernels import two_level

    threads(1)
    command = [
        "--decode",
        "--tokens",
        "2000,4001",
        "--retrieval-dim",
        "16",
        "--superchunk-size",
        "8",
    ]
    command += ["--probes", "4", *clock, "--out", str(tmp_path / "r")]
    assert two_level.main(command) == 0
    rows = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert list(rows) == [f"{n}/S{s}/bfloat16" for n in (2000, 4001) for s in (2, 16)]
    for row in rows.values():
        assert row["superchunk_size"] == 8 and row["probes"] == 4
        assert row["speedup"] > 0 and row["two_level_microseconds"] > 0
