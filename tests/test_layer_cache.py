"""The layer with a cache: a prompt in pieces, then token by token, equals one forward."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from layer_support import BASE, CASES, D_MODEL, HEADS, LAYOUT_CASES, inputs, last_token, make

import resona_ext._layer_search as search_module
from resona_ext import ChunkCache, Resona

POOLED = [name for name in CASES if not callable(CASES[name].get("encoder"))]
LENGTH = 17


@pytest.fixture(autouse=True)
def _one_thread_without_gradients(threads):
    threads(1)
    with torch.no_grad():
        yield


def in_pieces(layer, cache, cuts, *tensors):
    parts = [
        layer(*(t[:, begin:end] for t in tensors), cache=cache)
        for begin, end in itertools.pairwise(cuts)
    ]
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("name", POOLED)
def test_pieces_and_steps_equal_one_forward(name):
    layer = make(**copy.deepcopy(CASES[name]))
    x, e, y = inputs(length=LENGTH)
    full = layer(x, e, y)
    for split in range(LENGTH + 1):
        cache = layer.make_cache(2, LENGTH)
        cuts = [0, *range(split, LENGTH + 1)]
        out = in_pieces(layer, cache, cuts, x, e, y)
        torch.testing.assert_close(out, full, rtol=0, atol=1e-12)
    cache = layer.make_cache(2, LENGTH)
    c = in_pieces(layer, cache, [0, 2, 2, 9, 10, LENGTH], x, e)
    torch.testing.assert_close(c, layer(x, e), rtol=0, atol=1e-12)


TWO_LEVEL = {"search": "two_level", "superchunk_size": 2, "probes": 1}


@pytest.mark.parametrize("name", POOLED)
def test_two_level_pieces_and_steps_equal_one_forward(name):
    layer = make(**copy.deepcopy(CASES[name]), **TWO_LEVEL)
    x, e, y = inputs(length=40)
    full = layer(x, e, y)
    layer.probes = 99
    assert not torch.allclose(layer(x, e, y), full)
    layer.probes = 1
    for split in range(0, 41, 4):
        cache = layer.make_cache(2, 40)
        out = in_pieces(layer, cache, [0, *range(split, 41)], x, e, y)
        torch.testing.assert_close(out, full, rtol=0, atol=1e-12)
    cache = layer.make_cache(2, 40)
    c = in_pieces(layer, cache, [0, 2, 2, 19, 20, 40], x, e)
    torch.testing.assert_close(c, layer(x, e), rtol=0, atol=1e-12)


def test_two_level_sizes_of_a_cache():
    """Without a size, that of a full forward as long as the cache; probes are the layer's of now."""
    layer = make(top_k=40, chunk_size=1, search="two_level")
    expected, _ = torch.ops.resona._plan_two_level(60_000, 1, 40)
    assert expected != torch.ops.resona._plan_two_level(60_000, 1, 1)[0]
    assert layer.make_cache(1, 60_000).superchunk_size == expected
    layer.superchunk_size = 3
    x, e, y = inputs(length=60)
    cache = layer.make_cache(2, 60)
    layer.probes = 99
    in_pieces(layer, cache, [0, 50], x, e, y)
    layer.probes = 2
    out = in_pieces(layer, cache, [50, *range(50, 61)], *(t for t in (x, e, y)))
    torch.testing.assert_close(out, layer(x, e, y)[:, 50:], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("chunk_size", "superchunk_size", "length"),
    [(64, 16, 512), (64, 64, 2048), (3, 2, 40), (3, 99, 2), (1, 2**62, 40)],
)
def test_a_given_superchunk_size_is_the_caches(chunk_size, superchunk_size, length, monkeypatch):
    """Also one that the cache can never fill."""
    sizes = {"superchunk_size": superchunk_size, "probes": 1}
    layer = make(chunk_size=chunk_size, search="two_level", **sizes)
    x, e, y = inputs(length=length)
    found = []

    def spy(owner, name):
        original = getattr(owner, name)

        def recorded(*args, **settings):
            out, aux = original(*args, **settings)
            found.append(aux.indices)
            return out, aux

        monkeypatch.setattr(owner, name, recorded)

    spy(search_module, "retrieve_attend")
    spy(ChunkCache, "prefill")
    spy(ChunkCache, "step")
    full = layer(x, e, y)
    cache = layer.make_cache(2, length)
    assert cache.superchunk_size == cache.superchunks.size == superchunk_size
    cuts = [0, length // 2, *range(max(length - 9, length // 2), length + 1)]
    out = in_pieces(layer, cache, cuts, x, e, y)
    torch.testing.assert_close(out, full, rtol=0, atol=1e-12)
    assert torch.equal(torch.cat(found[1:], dim=1), found[0])


@pytest.mark.parametrize("sizes", [{"superchunk_size": 2}, {"probes": 1}, TWO_LEVEL], ids=str)
def test_the_search_can_be_turned_and_back(sizes):
    layer = make(**{"search": "two_level"} | sizes)
    exact = make()
    exact.load_state_dict(layer.state_dict())
    x, e, y = inputs(length=40)
    full = layer(x, e, y)
    layer.search = "exact"
    assert torch.equal(layer(x, e, y), exact(x, e, y))
    cache = layer.make_cache(2, 40)
    assert cache.superchunks is None
    out = in_pieces(layer, cache, [0, *range(30, 41)], x, e, y)
    torch.testing.assert_close(out, exact(x, e, y), rtol=0, atol=1e-12)
    layer.search = "two_level"
    with pytest.raises(ValueError, match="'search': 'two_level'"):
        layer(x[:, :1], e[:, :1], y[:, :1], cache=cache)
    assert torch.equal(layer(x, e, y), full)


def test_an_encoder_of_ones_own_follows_the_search():
    layer = make(encoder=last_token, **TWO_LEVEL)
    exact = make(encoder=last_token)
    exact.load_state_dict(layer.state_dict())
    x, e, y = inputs(length=40)
    layer.search = "exact"
    assert torch.equal(layer(x, e, y), exact(x, e, y))


@pytest.mark.parametrize("name", [name for name in LAYOUT_CASES if name in POOLED])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_prompt_then_steps_equal_single_runs(name, side):
    layer = make(**copy.deepcopy(CASES[name]))
    counts, rows, steps = [7, 3, 0, 5, 1], 7, 6
    x, e, y = inputs(batch=5, length=rows + steps)
    mask = torch.zeros(5, rows, dtype=torch.long)
    prompt = [torch.full((5, rows, D_MODEL), 1e3, dtype=x.dtype) for _ in range(3)]
    for b, count in enumerate(counts):
        first = rows - count if side == "left" else 0
        mask[b, first : first + count] = 1
        for padded, t in zip(prompt, (x, e, y), strict=True):
            padded[b, first : first + count] = t[b, :count]
    cache = layer.make_cache(5, rows + steps)
    out = layer(*prompt, attention_mask=mask, cache=cache)
    assert out.isfinite().all()
    later = []
    for i in range(steps):
        new = [torch.stack([t[b, n + i] for b, n in enumerate(counts)])[:, None] for t in (x, e, y)]
        later.append(layer(*new, cache=cache))
    later = torch.cat(later, dim=1)
    for b, count in enumerate(counts):
        single = layer(*(t[b : b + 1, : count + steps] for t in (x, e, y)))[0]
        torch.testing.assert_close(out[b][mask[b] == 1], single[:count], rtol=0, atol=1e-10)
        torch.testing.assert_close(later[b], single[count:], rtol=0, atol=1e-10)


def test_a_finished_sequence_can_be_masked():
    layer = make(key_conv=2)
    x, e, y = inputs(length=LENGTH)
    cache = layer.make_cache(2, LENGTH)
    layer(x[:, :9], e[:, :9], y[:, :9], cache=cache)
    step = [t[:, 9:10] for t in (x, e, y)]
    out = layer(*step, attention_mask=torch.tensor([[0], [1]]), cache=cache)
    assert cache.lengths.tolist() == [9, 10]
    torch.testing.assert_close(out[1], layer(x, e, y)[1, 9:10], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["default", "key convolution", "rotary"])
def test_crop_and_reorder(name):
    layer = make(**copy.deepcopy(CASES[name]))
    x, e, y = inputs(length=LENGTH)
    cache = layer.make_cache(2, LENGTH)
    in_pieces(layer, cache, [0, 13, 14, 15], x, e, y)
    cache.crop(11)
    cache.reorder(torch.tensor([1, 1]))
    twin = [t[1:].expand(2, -1, -1) for t in (x, e, y)]
    out = in_pieces(layer, cache, [11, 12, 13, LENGTH], *twin)
    torch.testing.assert_close(out, layer(*twin)[:, 11:], rtol=0, atol=1e-12)


def test_bfloat16_under_autocast():
    """All chunks are selected, so that no rounding can change the selection."""
    layer = make(torch.float32, key_conv=2, trainable_retrieval=True, top_k=8)
    x, e, y = inputs(dtype=torch.float32, length=LENGTH)
    with torch.autocast("cpu", torch.bfloat16):
        cache = layer.make_cache(2, LENGTH)
        assert cache.dtype == torch.bfloat16
        out = in_pieces(layer, cache, [0, 8, *range(9, LENGTH + 1)], x, e, y)
        torch.testing.assert_close(out, layer(x, e, y), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("search", [{}, TWO_LEVEL], ids=["exact", "two_level"])
def test_compiled_steps(search):
    layer = make(torch.float32, key_conv=2, **search)
    x, e, y = inputs(dtype=torch.float32, length=LENGTH)
    full = layer(x, e, y)
    cache = layer.make_cache(2, LENGTH)
    layer(x[:, :4], e[:, :4], y[:, :4], cache=cache)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=False, recompile_limit=4):
        out = in_pieces(compiled, cache, range(4, LENGTH + 1), x, e, y)
    torch.testing.assert_close(out, full[:, 4:])


def test_a_cache_takes_no_gradients():
    layer = make()
    x, e, y = inputs()
    for length in (1, 5):
        cache = layer.make_cache(2, 8)
        with torch.enable_grad(), pytest.raises((RuntimeError, ValueError), match="no_grad"):
            layer(x[:, :length], e[:, :length], y[:, :length], cache=cache)
        assert cache.get_seq_length() == 0


@pytest.mark.parametrize("length", [1, 2])
@pytest.mark.parametrize("name", ["default", "inclusive", "key convolution"])
def test_a_full_cache(name, length):
    layer = make(**copy.deepcopy(CASES[name]))
    x, e, y = inputs()
    cache = layer.make_cache(2, 8)
    layer(x[:, :8], e[:, :8], y[:, :8], cache=cache)
    with pytest.raises(ValueError, match="at most max_length"):
        layer(*(t[:, 8 : 8 + length] for t in (x, e, y)), cache=cache)
    assert cache.lengths.tolist() == [8, 8]


X = torch.zeros(2, 4, D_MODEL)
CU = torch.tensor([0, 4], dtype=torch.int32)


def cache_of(batch: int = 2, **settings) -> ChunkCache:
    return Resona(D_MODEL, HEADS, **(BASE | settings)).make_cache(batch, 8)


@pytest.mark.parametrize(
    ("settings", "arguments", "message"),
    [
        ({}, {"cache": {}}, "cache must be a ChunkCache, got dict"),
        ({}, {"cache": cache_of(3)}, "cache must be of batch 2, got 3"),
        ({}, {"cache": cache_of(chunk_size=4)}, "cache must be one of `make_cache` with {"),
        ({}, {"cache": cache_of(num_kv_heads=2)}, "cache must be one of `make_cache` with {"),
        ({}, {"cache": cache_of(key_conv=2)}, "cache must be one of `make_cache` with {"),
        ({}, {"cache": cache_of(search="two_level")}, "cache must be one of `make_cache` with {"),
        (TWO_LEVEL, {"cache": cache_of()}, "cache must be one of `make_cache` with {"),
        (
            TWO_LEVEL,
            {"cache": cache_of(search="two_level", superchunk_size=3)},
            "cache must be one of `make_cache` with {",
        ),
        (
            {"encoder": last_token, "retrieval_dim": D_MODEL},
            {"cache": cache_of()},
            "cache must be None with a context encoder of your own",
        ),
    ],
)
def test_a_cache_that_does_not_fit(settings, arguments, message):
    layer = Resona(D_MODEL, HEADS, **(BASE | settings))
    with pytest.raises(ValueError) as error:
        layer(X, X, X, **arguments)
    assert str(error.value).startswith(f"Resona: {message}")


def test_a_cache_of_another_dtype_and_packed_sequences():
    layer = Resona(D_MODEL, HEADS, **BASE)
    cache = layer.make_cache(2, 8, dtype=torch.bfloat16)
    with pytest.raises(
        ValueError, match=r"query: expected dtype torch.bfloat16, got torch.float32"
    ):
        layer(X, X, X, cache=cache)
    with pytest.raises(RuntimeError, match="key_cache: expected dtype float32 like query, got"):
        layer(X[:, :1], X[:, :1], X[:, :1], cache=cache)
    assert cache.get_seq_length() == 0
    with pytest.raises(ValueError, match="cache must be None with cu_seqlens, got both"):
        layer(X[:1], X[:1], X[:1], cu_seqlens=CU, cache=layer.make_cache(1, 8))
