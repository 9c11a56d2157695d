"""The plan of a decode step on CUDA: ranges of chunks, splits of keys, and what they may cost."""

import itertools

import pytest

_C = pytest.importorskip("resona_ext._C", reason="built without pybind11 (RESONA_PYBIND=0)")

PROBLEM = dict(
    batch=1,
    queries=1,
    context=262144,
    heads=16,
    kv_heads=8,
    head_dim=128,
    retrieval_heads=1,
    retrieval_dim=128,
    chunk_size=64,
    top_k=8,
    dtype="bfloat16",
    device="cuda",
    sm=90,
    sms=132,
)


def decode(name="decode", **changes):
    stages = _C.plan(**{**PROBLEM, **changes}).stages
    return next(stage for stage in stages if stage.name == name)


def parameters(**changes):
    return decode(**changes).parameters


# changes -> chunks per block, ranges, keys that a range passes on: the fewest that a block stages at once,
# until there are two blocks per multiprocessor; the best k, or all for large k
SEARCHES = [
    ({}, (128, 32, 8)),
    (dict(context=64), (128, 1, 8)),
    (dict(context=63), (128, 0, 8)),
    (dict(chunk_size=16), (128, 128, 8)),
    (dict(context=2**20, chunk_size=16), (256, 256, 8)),
    (dict(context=2**20, chunk_size=1), (1024, 1024, 8)),
    (dict(batch=16), (256, 16, 8)),
    (dict(batch=64, kv_heads=8, retrieval_heads=8), (1024, 4, 8)),
    (dict(sms=16), (128, 32, 8)),
    (dict(dtype="float32"), (64, 64, 8)),
    (dict(embedding_dtype="float32"), (64, 64, 8)),
    (dict(top_k=32), (128, 32, 32)),
    (dict(top_k=33), (128, 32, 128)),
    (dict(context=2**20, chunk_size=1, top_k=256), (1024, 1024, 256)),
]


@pytest.mark.parametrize("changes, expected", SEARCHES)
def test_ranges(changes, expected):
    p = parameters(**changes)
    assert (p["range"], p["lists"], p["kept"]) == expected
    shape = {**PROBLEM, **changes}
    groups = shape["batch"] * shape["retrieval_heads"]
    assert p["search_blocks"] == shape["batch"] + groups * p["lists"]


# changes -> centroids per block, ranges, keys passed on; the same for chunks of m superchunks and an open one
TWO_LEVEL = [
    (dict(), (128, 2, 16), (128, 3, 8)),  # 256 centroids of 16; 17 * 16 - 1 chunks
    (dict(chunk_size=2), (128, 8, 16), (128, 17, 8)),  # 1,024 of 128
    (dict(chunk_size=2, context=2**20), (128, 16, 16), (128, 34, 8)),  # 2,048 of 256
    (dict(chunk_size=2, batch=16), (128, 8, 16), (256, 9, 8)),
    (dict(chunk_size=2, dtype="float32"), (64, 16, 16), (64, 34, 8)),
    (dict(chunk_size=2, top_k=64), (128, 32, 128), (128, 33, 128)),
    (dict(batch=64, kv_heads=8, retrieval_heads=8), (256, 1, 16), (384, 1, 8)),
]


@pytest.mark.parametrize("changes, centroids, chunks", TWO_LEVEL)
def test_ranges_in_two_levels(changes, centroids, chunks):
    stage = decode("decode_two_level", **changes)
    p = stage.parameters
    assert stage.kernel == decode(**changes).kernel and stage.reason.startswith("centroids first")
    names = ("centroid_range", "centroid_lists", "centroids_kept")
    assert tuple(p[name] for name in names) == centroids
    assert (p["range"], p["lists"], p["kept"]) == chunks
    shape = {**PROBLEM, **changes}
    groups = shape["batch"] * shape["retrieval_heads"]
    assert p["search_blocks"] == shape["batch"] + groups * p["centroid_lists"]
    assert p["refine_blocks"] == groups * p["lists"]


def test_few_superchunks_are_the_exact_search():
    """One launch less: a full cache has no more of them than a query may search."""
    changes = dict(context=2**14)
    exact, two_level = (decode(name, **changes) for name in ("decode", "decode_two_level"))
    assert two_level.parameters == exact.parameters and two_level.reason == exact.reason


# changes -> kernel, elements that a row is filled up to, heads at once, blocks that share the keys of a row
ATTENTIONS = [
    ({}, ("decode_mma", 128, 8, 8)),  # 8 rows; 512 keys are 8 blocks of 64
    (dict(batch=16), ("decode_mma", 128, 8, 3)),  # 128 rows, 264 blocks
    (dict(batch=264), ("decode_mma", 128, 8, 1)),
    (dict(top_k=64), ("decode_mma", 128, 8, 33)),
    (dict(top_k=1, chunk_size=2), ("decode_mma", 128, 8, 1)),
    (dict(context=63), ("decode_mma", 128, 8, 1)),
    (dict(heads=128), ("decode_mma", 128, 16, 8)),
    (dict(head_dim=64), ("decode_mma", 64, 8, 8)),
    (dict(head_dim=200), ("decode_mma", 256, 8, 8)),
    (dict(head_dim=100), ("decode_lanes", 256, 1, 17)),  # rows off 16-byte borders: 16 rows
    (dict(dtype="float32"), ("decode_lanes", 128, 1, 16)),
    (dict(dtype="float32", heads=64), ("decode_lanes", 128, 4, 16)),
    (dict(dtype="float32", head_dim=64, heads=64), ("decode_lanes", 128, 4, 16)),
    (dict(dtype="float32", head_dim=40), ("decode_lanes", 64, 1, 8)),
]


@pytest.mark.parametrize("changes, expected", ATTENTIONS)
def test_splits(changes, expected):
    stage = decode(**changes)
    p = stage.parameters
    assert (stage.kernel, p["dim"], p["heads"], p["splits"]) == expected


def test_the_workspace_is_next_to_nothing():
    """Keys of the ranges and partial results: below a hundredth of what the step reads."""
    assert parameters()["workspace_bytes"] == 256 + 256 + 32 * 8 * 8 + 64 * 2 * 18 * 32 * 4
    for batch, context in itertools.product((1, 64), (4096, 2**20)):
        assert parameters(batch=batch, context=context)["workspace_bytes"] < 4 << 20


def test_slots_beyond_shared_memory_are_bounded():
    """A block has its own; further splits stop where they would take more than 64 MiB."""
    few, many = (parameters(chunk_size=16, top_k=k) for k in (512, 513))
    assert few["splits"] == many["splits"] == 33
    extra = many["workspace_bytes"] - few["workspace_bytes"]
    keys = 128 * (128 - 128) * 8  # both pass all keys on
    assert extra == keys + 264 * 2 * 513 * 4 + (-264 * 2 * 513 * 4) % 256
    p = parameters(context=2**20, chunk_size=1, top_k=2**20)
    assert p["splits"] == 1 and p["workspace_bytes"] < 128 << 20


SIZES = dict(
    batch=(0, 1, 3, 1 << 24),
    context=(1, 100, 2**31 - 1),
    heads=(8, 96),
    head_dim=(1, 64, 256),
    retrieval_heads=(1, 8),
    retrieval_dim=(1, 300),
    chunk_size=(1, 64, 2**40),
    top_k=(1, 300, 2**40),
    dtype=("float32", "bfloat16"),
    sms=(1, 148),
)


def test_every_legal_problem_has_a_plan():
    for values in itertools.product(*SIZES.values()):
        stages = _C.plan(**{**PROBLEM, **dict(zip(SIZES, values, strict=True))}).stages
        for p in (stage.parameters for stage in stages if stage.name.startswith("decode")):
            assert p["splits"] >= 1 and p["workspace_bytes"] >= 0
            assert p["range"] % 64 == 0 and 1 <= p["kept"] <= p["range"]
