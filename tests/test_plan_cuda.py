"""Plans for a CUDA device given by description: pure functions, checked where there is no GPU."""

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
    dtype="bfloat16",
    device="cuda",
    sm=90,
    sms=132,
)
WORKSPACE = 512 << 20
MILLION = dict(queries=2**20, context=2**20, retrieval_dim=128)


def plan(**changes):
    return _C.plan(**{**PROBLEM, **changes})


def parameters(stage, **changes):
    return {s.name: s.parameters for s in plan(**changes).stages}[stage]


def test_stages_in_order():
    names = [stage.name for stage in plan().stages]
    assert names == [
        "fused",
        "pool",
        "search",
        "two_level",
        "attend",
        "attend_backward",
        "pool_backward",
        "index",
        "retrieve_backward",
        "decode",
        "decode_two_level",
    ]


# E, dtype -> lanes per row, 16-byte loads: the fewest lanes whose eight elements each hold the row
POOL = {
    (8, "bfloat16"): (8, 1),
    (64, "bfloat16"): (8, 1),
    (64, "float32"): (8, 1),
    (72, "float16"): (16, 1),
    (128, "bfloat16"): (16, 1),
    (136, "bfloat16"): (32, 1),
    (600, "float32"): (32, 1),
    (4, "float32"): (8, 1),
    (4, "float16"): (32, 0),
    (37, "float32"): (32, 0),
    (257, "bfloat16"): (32, 0),
}


@pytest.mark.parametrize("dim, dtype", POOL)
def test_pool_instance(dim, dtype):
    for stage in ("pool", "pool_backward"):
        p = parameters(stage, retrieval_dim=dim, dtype=dtype)
        assert (p["lanes"], p["vector"]) == POOL[dim, dtype]


# shape, blocks: 16 rows each, and no more than 40 per multiprocessor
BLOCKS = [
    (dict(), 16),
    (dict(batch=3, retrieval_heads=2), 96),
    (dict(context=16384 + 63), 16),
    (dict(queries=0, context=63), 0),
    (dict(batch=0), 0),
    (dict(chunk_size=1), 1024),
    (dict(chunk_size=1, sms=20), 800),
    (dict(**MILLION, chunk_size=1), 132 * 40),
]


@pytest.mark.parametrize("changes, blocks", BLOCKS)
def test_pool_blocks(changes, blocks):
    assert parameters("pool", **changes)["blocks"] == blocks


def test_pool_backward_also_clears_tokens_in_no_chunk():
    assert parameters("pool_backward", queries=0, context=63)["blocks"] == 1
    assert parameters("pool_backward", queries=0, context=2**20, chunk_size=2**21)["blocks"] == 5280


# B R C -> passes of the sort, bits of a digit: the unused slots have a key of their own
SORTS = [
    (0, 1, 1),
    (1, 1, 1),
    (2047, 1, 11),
    (2048, 2, 6),
    (2**22 - 1, 2, 11),
    (2**22, 3, 8),
]


@pytest.mark.parametrize("keys, passes, bits", SORTS)
def test_index_digits(keys, passes, bits):
    p = parameters("index", queries=0, context=keys, chunk_size=1, top_k=512)
    assert (p["passes"], p["digit_bits"]) == (passes, bits)


# B, T, L, R, S, k -> tiles of a block, blocks
QUICK = {
    (1, 4096, 4096, 1, 64, 8): (1, 32),
    (1, 16384, 16384, 1, 16, 4): (1, 128),
    (1, 65536, 65536, 1, 64, 8): (8, 64),  # each block reads all counts: 1 MiB
    (1, 32768, 32768, 1, 8, 4): (4, 64),  # 4096 chunks: shared memory holds four tiles of them
    (4, 8192, 8192, 1, 64, 8): (2, 128),
    (2, 1000, 1000, 4, 64, 511): (1, 64),
    (1, 0, 64, 1, 64, 8): (1, 1),  # offsets are written all the same
    (0, 64, 64, 1, 64, 8): (1, 1),
}
TOO_MUCH = [
    (1, 4096, 4104, 1, 1, 8),  # keys
    (0, 4096, 2**20, 1, 1, 8),
    (1, 65536, 65536, 1, 16, 8),  # bytes of counts
    (1, 2**21, 2**21, 1, 2**18, 8),  # what all blocks would read of them
    (1, 4096, 4096, 1, 64, 512),  # 128 x 512 repeats of one chunk do not fit 16 bits
]
INDEX = ("batch", "queries", "context", "retrieval_heads", "chunk_size", "top_k")


@pytest.mark.parametrize("shape, expected", QUICK.items())
def test_quick_index(shape, expected):
    p = parameters("index", **dict(zip(INDEX, shape, strict=True)))
    assert (p["block_tiles"], p["blocks"]) == expected
    assert p["shared_bytes"] <= 99 << 10


@pytest.mark.parametrize("shape", TOO_MUCH)
def test_larger_indices_are_sorted(shape):
    assert "passes" in parameters("index", **dict(zip(INDEX, shape, strict=True)))


@pytest.mark.parametrize(
    "queries, segment", [(1, 64), (4096, 64), (4097, 128), (16385, 256), (2**20, 1024)]
)
def test_segments_grow_with_the_root_of_the_queries(queries, segment):
    assert parameters("retrieve_backward", queries=queries, context=2**20)["segment"] == segment


# chunk_size, top_k, changes -> how candidates are found: slots per lane, passes, splits, queries in registers
SEARCHES = [
    (64, 2, {}, (1, 1, 1, 1)),  # 256 chunks: four steps, which is as few as a block should have
    (64, 8, {}, (3, 1, 1, 1)),
    (64, 16, {}, (5, 1, 1, 1)),
    (64, 17, {}, (5, 2, 1, 0)),
    (64, 100, {}, (5, 6, 1, 0)),
    (16, 8, {}, (3, 1, 2, 1)),  # 128 tiles of queries for 264 blocks
    (1, 8, {"queries": 256}, (3, 1, 8, 1)),
    (1, 100, {"queries": 256}, (5, 6, 2, 0)),  # what a row's candidates leave room for
    (16, 8, {"batch": 8}, (3, 1, 1, 1)),
    (64, 8, {"retrieval_dim": 129}, (3, 1, 1, 0)),
    (64, 8, {"dtype": "float32"}, (3, 1, 1, 0)),
    (8192, 100, {}, (1, 1, 1, 1)),  # two chunks: k can be no more
]


@pytest.mark.parametrize("chunk_size, top_k, changes, expected", SEARCHES)
def test_search(chunk_size, top_k, changes, expected):
    p = parameters("search", chunk_size=chunk_size, top_k=top_k, **changes)
    assert (p["bag_per_lane"], p["passes"], p["splits"], p["pinned"]) == expected


def kernel_of(stage, **changes):
    return {s.name: s.kernel for s in plan(**changes).stages}[stage]


def test_many_slots_are_searched_exactly():
    assert kernel_of("search", chunk_size=1, top_k=236) == "register_bag"
    assert kernel_of("search", chunk_size=1, top_k=237) == "exact"


# What attention does, by shape: see docs/kernels-retrieval.md for the rules.
PATHS = [
    (dict(), "chunk_stationary"),
    (dict(dtype="float32"), "chunk_stationary"),
    (dict(heads=16, kv_heads=2), "chunk_stationary"),
    (dict(heads=16, kv_heads=1, chunk_size=16, top_k=4), "query_mma"),
    (dict(heads=16, kv_heads=1, chunk_size=16, top_k=4, dtype="float32"), "query_lanes"),
    (dict(chunk_size=16, top_k=4), "chunk_stationary"),
    (dict(chunk_size=8, top_k=1), "query_lanes"),  # eight rows per chunk
    (dict(chunk_size=8, top_k=8), "chunk_stationary"),
    (dict(chunk_size=2, top_k=1), "query_lanes"),
    (dict(chunk_size=4, top_k=8), "query_mma"),
    (dict(chunk_size=4, top_k=8, heads=32, kv_heads=4), "query_mma"),
    (dict(chunk_size=4, top_k=8, head_dim=60), "query_lanes"),  # rows off 16-byte borders
    (dict(queries=4096, context=4096), "dense_masked"),
    (dict(queries=4096, context=4096, dtype="float32"), "chunk_stationary"),
    (dict(queries=8192, context=8192), "chunk_stationary"),
    (dict(queries=1), "query_mma"),
    (dict(queries=0), "query_mma"),
    (dict(queries=100, context=100, chunk_size=128), "dense_masked"),
]


@pytest.mark.parametrize("changes, kernel", PATHS)
def test_attention_takes_the_path_of_fewest_bytes(changes, kernel):
    assert kernel_of("attend", **changes) == kernel


def test_few_queries_share_their_keys():
    assert parameters("attend", queries=1)["splits"] == 4
    assert parameters("attend", queries=16384, chunk_size=4, top_k=8)["splits"] == 1


SPLITS_AND_PASSES = dict(queries=2048, context=65536, chunk_size=16, top_k=32)
SORTED = dict(queries=131072, context=131072, chunk_size=16, top_k=1)  # 8192 chunks: two passes

TINY = dict(queries=65536, context=65536, chunk_size=2, top_k=2)

# Launches of a fused call: pool, search, attend; chunk by chunk also two for the index, and a merge.
LAUNCHES = [
    (dict(), 5),
    (dict(dtype="float32"), 5),
    (dict(top_k=1), 4),
    (SPLITS_AND_PASSES, 5),
    (dict(queries=65536, context=65536), 5),
    (dict(chunk_size=2, top_k=1), 3),
    (TINY, 2),
    (dict(chunk_size=4, top_k=8), 3),
    (dict(queries=4096, context=4096), 3),
    (dict(queries=1), 3),
    (dict(chunk_size=1, top_k=300), 3),  # every row canonically
    (dict(queries=0), 2),
    (dict(batch=0), 0),
    (SORTED, 16),
]


@pytest.mark.parametrize("changes, launches", LAUNCHES)
def test_launches_of_a_call(changes, launches):
    assert parameters("fused", **changes)["launches"] == launches


# Changes to it -> does the search attend to what it finds, in its own launch?
ATTENDS = [
    (dict(), 1),
    (dict(dtype="float32"), 1),
    (dict(chunk_size=4, top_k=1), 1),
    (dict(chunk_size=1), 1),
    (dict(head_dim=128, retrieval_dim=128, dtype="float16"), 1),
    (dict(heads=6, kv_heads=2), 1),
    (dict(retrieval_heads=2), 1),
    (dict(queries=264 * 128), 1),  # two blocks per multiprocessor, as many as run at once
    (dict(queries=263 * 128), 0),
    (dict(batch=66, queries=512, context=512), 1),
    (dict(chunk_size=3), 0),  # six keys a row
    (dict(chunk_size=5, top_k=1), 0),
    (dict(chunk_size=1, top_k=3), 0),  # more slots than are kept
    (dict(dtype="float32", embedding_dtype="bfloat16"), 0),
    (dict(retrieval_dim=136), 0),  # 16-bit queries that do not fit registers
    (dict(retrieval_dim=136, dtype="float32"), 1),
    (dict(head_dim=136), 0),  # 32 lanes a row
    (dict(head_dim=60), 0),  # rows off 16-byte borders
    (dict(heads=4, kv_heads=1), 0),  # several heads at once
    (dict(heads=4, kv_heads=1, dtype="float32"), 0),
    (dict(batch=0), 0),
]


@pytest.mark.parametrize("changes, attends", ATTENDS)
def test_who_attends_to_tiny_chunks(changes, attends):
    fused = plan(**{**TINY, **changes}).stages[0]
    assert fused.parameters["attends"] == attends
    assert ("the search attends" in fused.reason) == bool(attends)


# L, chunk_size, top_k -> ranges of queries, of these heads at a time, launches: 16 heads of 128 elements
RANGES = [
    (2**14, 64, 8, 1, 8, 7),
    (2**16, 64, 8, 1, 3, 15),
    (2**18, 64, 8, 2, 1, 92),
    (2**20, 64, 8, 5, 1, 227),
    (2**20, 16, 4, 3, 1, 137),
    (2**20, 64, 1, 1, 16, 16),
]


@pytest.mark.parametrize("length, chunk_size, top_k, ranges, heads, launches", RANGES)
def test_ranges_bound_the_workspace(length, chunk_size, top_k, ranges, heads, launches):
    """Ranges of queries read keys and values again, heads do not: so they are cut first."""
    changes = dict(heads=16, kv_heads=16, head_dim=128, chunk_size=chunk_size, top_k=top_k)
    changes |= dict(queries=length, context=length)
    p = parameters("attend", **changes)
    assert (-(-length // p["range_queries"]), p["range_heads"]) == (ranges, heads)
    assert parameters("fused", **changes)["launches"] == launches
    assert plan(**changes).workspace_bytes <= WORKSPACE


def test_every_legal_shape_has_a_plan():
    huge = 2**63 - 1
    batches, contexts, chunk_sizes = (0, 1, 70), (0, 1, 100, 2**31 - 1), (1, 37, 10**6, huge)
    grid = itertools.product(
        batches, contexts, chunk_sizes, (1, 8, huge), (1, 256, 2**24), (80, 90, 120)
    )
    for batch, context, chunk_size, top_k, dim, sm in grid:
        for queries in {0, min(1, context), context}:
            p = plan(batch=batch, queries=queries, context=context, chunk_size=chunk_size,
                     top_k=top_k, retrieval_dim=dim, sm=sm)  # fmt: skip
            assert p.workspace_bytes >= 0
            for stage in p.stages:
                assert stage.reason and all(value >= 0 for value in stage.parameters.values())
                assert stage.parameters.get("lanes", 8) in (8, 16, 32)
                blocks = [v for name, v in stage.parameters.items() if name.endswith("blocks")]
                assert all(count < 2**31 for count in blocks)


@pytest.mark.parametrize("chunk_size, top_k", [(64, 8), (16, 4), (2, 1), (64, 16)])
def test_workspace_stays_bounded_at_a_million_tokens(chunk_size, top_k):
    assert plan(**MILLION, chunk_size=chunk_size, top_k=top_k).workspace_bytes <= WORKSPACE


# Gradients of keys and values are carried in float32 from one range of queries to the next, which costs
# 8 L D bytes per key/value head: the one part of the workspace that a range cannot shorten.
@pytest.mark.parametrize("length, mebibytes", [(2**14, 512), (2**16, 512), (2**20, 1536)])
def test_workspace_of_the_gradients(length, mebibytes):
    changes = dict(heads=16, kv_heads=16, head_dim=128, queries=length, context=length)
    assert parameters("attend_backward", **changes)["workspace_bytes"] <= mebibytes << 20
    assert parameters("retrieve_backward", **changes)["workspace_bytes"] <= WORKSPACE


@pytest.mark.parametrize("heads", [1, 16])
@pytest.mark.parametrize("batch", [1, 7, 64, 1000, 2**16])
def test_workspace_does_not_grow_with_the_batch(batch, heads):
    """A large batch runs in parts, the largest that fit."""
    changes = dict(batch=batch, heads=heads, kv_heads=heads, retrieval_heads=heads)
    assert plan(**changes).workspace_bytes <= WORKSPACE
    backward = parameters("retrieve_backward", **changes)
    assert backward["workspace_bytes"] <= WORKSPACE
    part = backward["batch"]
    assert 1 <= part <= batch
    if part < batch:
        assert parameters("retrieve_backward", **{**changes, "batch": part})["batch"] == part


def test_empty_problems_launch_nothing():
    for changes in (dict(batch=0), dict(queries=0, context=0)):
        p = {stage.name: stage.parameters for stage in plan(**changes).stages}
        assert p["pool"]["blocks"] == p["pool_backward"]["blocks"] == 0


@pytest.mark.parametrize(
    "changes, text",
    [
        (dict(sm=75), "plan: sm: expected at least 80, got 75"),
        (dict(sms=0), "plan: sms: expected 1 to 65536, got 0"),
        (dict(sms=2**40), "plan: sms: expected 1 to 65536, got 1099511627776"),
        (dict(chunk_size=0), "plan: chunk_size: expected at least 1, got 0"),
        (
            dict(dtype="float64"),
            "plan: dtype: expected float32, float16 or bfloat16 on CUDA, got float64",
        ),
        (
            dict(embedding_dtype="float64"),
            "plan: embedding_dtype: expected float32, float16 or bfloat16 on CUDA, got float64",
        ),
    ],
)
def test_illegal_problems_say_why(changes, text):
    with pytest.raises(ValueError) as error:
        plan(**changes)
    assert str(error.value) == text


# D, S, k, changes -> keys that a warp holds of a list, 0: tiles
LANES = [
    (64, 8, 4, {}, 8),
    (128, 8, 4, {}, 8),
    (128, 4, 4, {}, 4),
    (128, 2, 1, {"dtype": "float32"}, 4),
    (128, 9, 1, {}, 0),
    (200, 4, 4, {}, 4),
    (200, 5, 4, {}, 0),
    (128, 8, 8, {}, 8),  # 64 rows a list
    (128, 8, 9, {}, 0),
    (128, 2, 8, {"kv_heads": 1}, 4),
    (128, 2, 16, {"kv_heads": 1}, 0),
]


@pytest.mark.parametrize("head_dim, chunk_size, top_k, changes, keys", LANES)
def test_gradients_of_small_chunks_with_short_lists(head_dim, chunk_size, top_k, changes, keys):
    changes = {"head_dim": head_dim, "chunk_size": chunk_size, "top_k": top_k, **changes}
    p = parameters("attend_backward", **changes)
    assert p["lane_keys"] == keys
    assert p["segment"] == 128 or not keys


def test_explain_for_a_device_that_is_not_here(capsys):
    from resona_ext import cli

    command = "explain --device cuda --sm 80 --sms 108 --dtype bfloat16 --retrieval-dim 128"
    assert cli.main(command.split()) == 0
    printed = capsys.readouterr().out
    for part in ("sm 80", "sms 108", "warp_rows", "lanes 16", "counted_tiles"):
        assert part in printed
    assert cli.main(["explain", "--device", "cuda", "--dtype", "float64"]) == 2
    assert "float16 or bfloat16 on CUDA" in capsys.readouterr().err
