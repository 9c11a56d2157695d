"""Plans: pure functions of the shape, checked on any machine."""

import itertools

import pytest

_C = pytest.importorskip("resona_ext._C", reason="built without pybind11 (RESONA_PYBIND=0)")

PROBLEM = dict(
    batch=1,
    queries=16384,
    context=16384,
    heads=4,
    kv_heads=4,
    head_dim=64,
    retrieval_heads=1,
    retrieval_dim=64,
    chunk_size=64,
    top_k=8,
)


def plan(**changes):
    return _C.plan(**{**PROBLEM, **changes})


def stages(**changes):
    return {stage.name: stage for stage in plan(**changes).stages}


def test_stages_in_order():
    assert [s.name for s in plan().stages] == ["pool", "search", "two_level", "attend"]


SEARCH = {
    "float32": "filter_refine",
    "bfloat16": "filter_refine",
    "float16": "filter_refine",
    "float64": "exhaustive",
}


@pytest.mark.parametrize("dtype, kernel", SEARCH.items())
def test_search_follows_the_embedding_dtype(dtype, kernel):
    assert stages(embedding_dtype=dtype)["search"].kernel == kernel
    assert stages(dtype=dtype)["search"].kernel == kernel


@pytest.mark.parametrize("isa", ["amx", "avx512_bf16"])
def test_bfloat16_is_multiplied_as_such_where_the_processor_does(isa):
    tiles = stages(dtype="bfloat16", isa=isa)
    assert tiles["search"].kernel == "filter_refine_tiles"
    assert tiles["attend"].kernel == "chunk_stationary_tiles"
    assert stages(dtype="float32", isa=isa)["attend"].kernel == "chunk_stationary"


def test_bfloat16_is_multiplied_in_float32_elsewhere():
    assert stages(dtype="bfloat16", isa="avx512")["attend"].kernel == "chunk_stationary"
    names = "amx, avx512_bf16, avx512, avx2 or portable"
    with pytest.raises(ValueError, match=f"plan: isa: expected {names}, got"):
        plan(isa="mmx")


BY_QUERY = [
    (dict(chunk_size=2, top_k=1), True),
    (dict(chunk_size=1, top_k=8), True),
    (dict(chunk_size=2, top_k=8), True),
    (dict(chunk_size=2, top_k=9), False),  # a chunk meets 18 rows
    (dict(chunk_size=2, top_k=9, queries=1024), True),  # of which only the last are there
    (dict(chunk_size=4, top_k=1), False),
    (dict(chunk_size=4, top_k=1, dtype="bfloat16"), True),
    (dict(chunk_size=8, top_k=1, dtype="bfloat16"), False),
    (dict(chunk_size=64, top_k=8, queries=1), False),
    (dict(chunk_size=1, top_k=1, dtype="float64"), True),
    (dict(chunk_size=2, top_k=1, queries=1, context=1), False),  # no chunk
]


@pytest.mark.parametrize("isa", ["portable", "amx"])
@pytest.mark.parametrize("shape, by_query", BY_QUERY)
def test_chunks_of_a_few_tokens_are_attended_to_query_by_query(shape, by_query, isa):
    attend = stages(isa=isa, **shape)["attend"]
    assert (attend.kernel == "query_stationary") == by_query
    assert ("query_block" in attend.parameters) == by_query


@pytest.mark.parametrize("threads", [1, 2, 16])
@pytest.mark.parametrize("queries, heads_per_task", [(16384, 16), (1, 1)])
def test_query_by_query_there_is_work_for_every_thread(queries, heads_per_task, threads):
    """Heads that share a selection go together, unless that leaves threads without work."""
    attend = stages(queries=queries, context=16384, chunk_size=2, top_k=1, threads=threads,
                    heads=32, kv_heads=32, retrieval_heads=2)["attend"]  # fmt: skip
    assert attend.parameters["heads_per_task"] == heads_per_task
    blocks = -(-queries // attend.parameters["query_block"])
    assert blocks * 32 / heads_per_task >= threads


def test_query_by_query_takes_little_scratch():
    tiny = dict(dtype="float32", chunk_size=2, queries=2**20, context=2**20)
    by_query, by_chunk = plan(**tiny, top_k=1), plan(**tiny, top_k=32)
    assert by_query.stages[-1].kernel == "query_stationary"
    assert by_chunk.stages[-1].kernel == "chunk_stationary"
    assert by_query.workspace_bytes < by_chunk.workspace_bytes


def test_packed_keys_and_values_stay_where_heads_balance_and_there_is_room():
    amx = dict(dtype="bfloat16", isa="amx", head_dim=128, heads=16, kv_heads=16)

    def kept(**more):
        return stages(**amx, **more)["attend"].parameters.get("kept_tiles", 0)

    assert kept(threads=2) == 16384 // 64
    assert kept(threads=3) == 0  # 16 heads for 3 threads
    assert kept(queries=1024, context=1024) == 0  # one range of queries
    assert kept(chunk_size=16) == 0
    assert kept(queries=2**20, context=2**20) == 0


def test_two_level_of_a_short_context_is_the_exact_search():
    short, long = (stages(queries=n, context=n)["two_level"] for n in (2**14, 2**18))
    assert (short.kernel, long.kernel) == ("exact", "superchunk_stationary")
    assert "same as the exact search" in short.reason
    assert (long.parameters["superchunk_size"], long.parameters["probes"]) == (16, 16)


def test_every_legal_shape_has_a_plan():
    huge = 2**63 - 1
    batches, contexts, chunk_sizes = (0, 1, 70), (0, 1, 100, 2**31 - 1), (1, 37, 10**6, huge)
    grid = itertools.product(batches, contexts, chunk_sizes, (1, 8, huge), (1, 256), (1, 64))
    for batch, context, chunk_size, top_k, dim, threads in grid:
        for queries in {0, min(1, context), context}:
            p = plan(batch=batch, queries=queries, context=context, chunk_size=chunk_size, top_k=top_k,
                     head_dim=dim, retrieval_dim=dim, threads=threads)  # fmt: skip
            for stage in p.stages:
                assert stage.reason and all(value >= 1 for value in stage.parameters.values()), (
                    stage.name
                )
            assert p.workspace_bytes >= 0


@pytest.mark.parametrize("threads", [1, 2, 16, 128])
def test_every_thread_gets_work(threads):
    s = stages(threads=threads)
    assert 16384 / s["search"].parameters["query_block"] >= threads
    assert 4 * 16384 / s["attend"].parameters["query_range"] >= threads


def test_short_contexts_are_pooled_by_one_thread():
    short = stages(queries=1024, context=1024, retrieval_dim=128, threads=16)["pool"]
    assert short.parameters["chunks_per_task"] == 1024 // 64
    assert stages(threads=16)["pool"].parameters["chunks_per_task"] < 16384 // 64


@pytest.mark.parametrize("threads", [1, 2, 16, 64, 128])
@pytest.mark.parametrize("chunk_size, top_k", [(64, 8), (16, 4), (2, 1), (64, 1000)])
def test_workspace_stays_bounded_at_a_million_tokens(threads, chunk_size, top_k):
    million = dict(
        queries=2**20, context=2**20, heads=16, kv_heads=16, head_dim=128, retrieval_dim=128
    )
    chunks = 2**20 // chunk_size * 128 * 2
    for isa in ("portable", "avx512_bf16", "amx"):
        p = plan(**million, chunk_size=chunk_size, top_k=top_k, threads=threads,
                 dtype="bfloat16", isa=isa)  # fmt: skip
        assert p.workspace_bytes - chunks < 400 << 20


def test_workspace_of_the_kernels_does_not_grow_with_the_batch():
    """Beyond the pooled chunks, scratch belongs to threads."""
    small, large = (plan(batch=b, threads=2).workspace_bytes - b * 256 * 64 * 4 for b in (8, 800))
    assert large == small


@pytest.mark.parametrize(
    "changes, text",
    [
        (dict(queries=20000), "plan: queries: expected at most context = 16384, got 20000"),
        (dict(heads=3), "plan: heads: expected a multiple of kv_heads = 4, got 3"),
        (dict(head_dim=300), "plan: head_dim: expected 1 to 256, got 300"),
        (
            dict(retrieval_heads=3),
            "plan: retrieval_heads: expected 1 or a divisor of kv_heads = 4, got 3",
        ),
        (dict(chunk_size=0), "plan: chunk_size: expected at least 1, got 0"),
        (dict(top_k=-1), "plan: top_k: expected at least 1, got -1"),
        (dict(threads=0), "plan: threads: expected at least 1, got 0"),
        (
            dict(dtype="int8"),
            "plan: dtype: expected float32, float16, bfloat16 or float64, got int8",
        ),
        (dict(device="tpu"), "plan: device: expected cpu or cuda, got tpu"),
    ],
)
def test_illegal_problems_say_why(changes, text):
    with pytest.raises(ValueError) as error:
        plan(**changes)
    assert str(error.value) == text
