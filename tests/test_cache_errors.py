"""Bad input to the decode cache: one clear error each, and the cache as it was."""

from __future__ import annotations

import pytest
import torch
from test_cache import assert_unchanged, snapshot

from resona_ext import ChunkCache


def piece(rows: int = 2, **changes) -> dict:
    tensors = {
        "query": torch.randn(2, rows, 4, 16),
        "key": torch.randn(2, rows, 2, 16),
        "value": torch.randn(2, rows, 2, 16),
        "query_embedding": torch.randn(2, rows, 1, 12),
        "context_embedding": torch.randn(2, rows, 1, 12),
        "top_k": 3,
    }
    return {**tensors, **changes}


Z = torch.zeros
MASK = torch.ones(2, 2, dtype=torch.long)
BAD_PIECES = [
    (dict(query=Z(2, 2, 64)), "query: expected rank 4 [B, T, H, D], got [2, 2, 64]"),
    (dict(query=Z(2, 2, 3, 16)), "query: expected H a multiple of num_kv_heads = 2, got 3"),
    (dict(query=Z(1, 2, 4, 16)), "query: expected shape [2, 2, 4, 16], got [1, 2, 4, 16]"),
    (dict(query=Z(2, 2, 4, 8)), "query: expected shape [2, 2, 4, 16], got [2, 2, 4, 8]"),
    (dict(query=Z(2, 2, 4, 16).half()), "query: expected dtype torch.float32, got torch.float16"),
    (dict(query=Z(2, 2, 4, 16, device="meta")), "query: expected device cpu, got meta"),
    (dict(key=Z(2, 3, 2, 16)), "key: expected shape [2, 2, 2, 16], got [2, 3, 2, 16]"),
    (dict(value=Z(2, 2, 1, 16)), "value: expected shape [2, 2, 2, 16], got [2, 2, 1, 16]"),
    (dict(value=Z(2, 2, 2, 16).double()), "value: expected dtype torch.float32, got torch.float64"),
    (
        dict(query_embedding=Z(2, 2, 12).bfloat16()),
        "query_embedding: expected dtype torch.float32, got torch.bfloat16",
    ),
    (
        dict(context_embedding=Z(2, 2, 13)),
        "context_embedding: expected shape [2, 2, 1, 12], got [2, 2, 1, 13]",
    ),
    (dict(top_k=0), "top_k: expected at least 1, got 0"),
    (dict(score_scale=Z(2)), "score_scale: expected shape [1], got [2]"),
    (dict(sink=Z(4).half()), "sink: expected dtype torch.float32, got torch.float16"),
    (dict(scale=float("nan")), "scale: expected a finite number, got nan"),
    (dict(carry=Z(2, 2, 3)), "carry: expected None without carry_rows, got a tensor"),
    (dict(lengths=[1]), "lengths: expected shape [2], got 1 numbers"),
    (dict(lengths=Z(2, 1).int()), "lengths: expected shape [2], got [2, 1]"),
    (dict(lengths=torch.tensor([0, 3])), "lengths: expected ints from 0 to T = 2, got [0, 3]"),
    (dict(lengths=[-1, 2]), "lengths: expected ints from 0 to T = 2, got [-1, 2]"),
    (dict(lengths=[1.0, 2]), "lengths: expected ints from 0 to T = 2, got [1.0, 2]"),
    (dict(lengths=[1, 2], attention_mask=MASK), "attention_mask: expected None with lengths"),
    (dict(attention_mask=MASK[:1]), "attention_mask: expected [2, 2], got [1, 2]"),
    (
        dict(attention_mask=MASK.float()),
        "attention_mask: expected bool or integer, 1 at tokens, got torch.float32",
    ),
    (
        piece(3) | dict(attention_mask=torch.tensor([[1, 1, 1], [1, 0, 1]])),
        "attention_mask: expected no padding between tokens, got a hole",
    ),
    (piece(6), "lengths: expected at most max_length = 10 tokens per sequence, got 11"),
    (
        dict(key=Z(2, 2, 2, 16).requires_grad_()),
        "inputs: expected no gradient, as a cache has no backward, got requires_grad=True",
    ),
]


def partly_filled(**changes) -> ChunkCache:
    cache = ChunkCache(2, 10, 2, 16, 1, 12, 4, **changes)
    cache.prefill(**piece(5), lengths=[5, 3])
    return cache


@pytest.mark.parametrize(("changes", "message"), BAD_PIECES)
def test_bad_pieces(changes, message):
    cache = partly_filled()
    before = snapshot(cache)
    with pytest.raises(ValueError) as error:
        cache.prefill(**(piece() | changes))
    assert str(error.value).startswith(f"ChunkCache.prefill: {message}")
    assert_unchanged(cache, before)


BAD_STEPS = [
    (piece(2), RuntimeError, "resona::decode_step: query: expected T = 1"),
    (dict(key=Z(2, 1, 2, 8)), RuntimeError, "resona::decode_step: key: expected D = 16 like query"),
    (dict(query=Z(2, 1, 4, 16).half()), RuntimeError, "resona::decode_step: key: expected dtype"),
    (dict(sink=Z(3)), RuntimeError, "resona::decode_step: sink: expected shape [H] = [4], got [3]"),
    (
        dict(carry=Z(2, 1, 3)),
        ValueError,
        "ChunkCache.step: carry: expected None without carry_rows",
    ),
    (
        dict(query=Z(2, 1, 4, 16).requires_grad_()),
        RuntimeError,
        "resona::decode_step: query: expected no gradient",
    ),
]


@pytest.mark.parametrize(("changes", "kind", "message"), BAD_STEPS)
def test_bad_steps(changes, kind, message):
    cache = partly_filled()
    before = snapshot(cache)
    with pytest.raises(kind) as error:
        cache.step(**(piece(1) | changes))
    assert str(error.value).startswith(message)
    assert_unchanged(cache, before)


def test_a_full_cache():
    cache = partly_filled()
    for _ in range(5):
        cache.step(**piece(1))
    before = snapshot(cache)
    with pytest.raises(ValueError, match=r"ChunkCache.step: lengths: .* max_length = 10 .* got 11"):
        cache.step(**piece(1))
    assert_unchanged(cache, before)
    cache.prefill(**piece(2), lengths=[0, 2])
    assert cache.lengths.tolist() == [10, 10]


def test_check_tells_of_a_sequence_that_a_replayed_graph_found_full():
    cache = partly_filled()
    cache.check()
    cache.lengths[1] = -10 - 1
    for call in (cache.check, lambda: cache.crop(1), lambda: cache.prefill(**piece(1))):
        with pytest.raises(RuntimeError, match=r"max_length = 10 .* for sequences \[1\]"):
            call()
    cache.reset()
    cache.check()


def test_check_counts_what_a_replayed_graph_has_appended():
    """Python's count is what `reorder` and `state_dict` go by."""
    cache = partly_filled()
    longest = cache.get_seq_length()
    cache.lengths += 2
    cache.check()
    assert cache.get_seq_length() == longest + 2


BAD_SETTINGS = [
    (dict(batch=-1), "batch: expected an int of at least 0, got -1"),
    (dict(max_length=2**31), f"max_length: expected at most {2**31 - 1}, got {2**31}"),
    (dict(num_kv_heads=0), "num_kv_heads: expected an int of at least 1, got 0"),
    (dict(head_dim=257), "head_dim: expected from 1 to 256, got 257"),
    (
        dict(retrieval_heads=3),
        "retrieval_heads: expected 1 or a divisor of num_kv_heads = 2, got 3",
    ),
    (dict(retrieval_dim=0.5), "retrieval_dim: expected an int of at least 1, got 0.5"),
    (dict(chunk_size=0), "chunk_size: expected an int of at least 1, got 0"),
    (dict(history=-1), "history: expected an int of at least 0, got -1"),
    (dict(history=1, carry_rows=2), "history: expected an int of at least 2, got 1"),
    (dict(dtype=torch.int32), "dtype: expected one of"),
    (dict(embedding_dtype=torch.complex64), "embedding_dtype: expected one of"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_SETTINGS)
def test_bad_settings(changes, message):
    arguments = dict(
        batch=2,
        max_length=10,
        num_kv_heads=2,
        head_dim=4,
        retrieval_heads=1,
        retrieval_dim=4,
        chunk_size=4,
        device="meta",
    )
    with pytest.raises(ValueError) as error:
        ChunkCache(**(arguments | changes))
    assert str(error.value).startswith(f"ChunkCache: {message}")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (torch.tensor([0.0, 1.0]), "expected dtype int32 or int64, got torch.float32"),
        (torch.tensor([[0, 1]]), "expected rank 1, got [1, 2]"),
        (torch.tensor([0, 2]), "expected from 0 to 1, got [2]"),
        (torch.tensor([0]), "expected shape [2], got [1]"),
    ],
)
def test_bad_beams(index, message):
    cache = partly_filled()
    before = snapshot(cache)
    with pytest.raises(ValueError) as error:
        cache.reorder(index)
    assert str(error.value) == f"ChunkCache.reorder: beam_idx: {message}"
    assert_unchanged(cache, before)


@pytest.mark.parametrize("length", [[1], [1, 2, 3], [1, None], "12"])
def test_bad_crops(length):
    cache = partly_filled()
    with pytest.raises(ValueError, match=r"ChunkCache.crop: length: expected an int or 2 of them"):
        cache.crop(length)


BAD_STATES = [
    (dict(chunk_size=5), "chunk_size: expected 4, got 5"),
    (dict(batch=3), "batch: expected 2, got 3"),
    (dict(format=2), "format: expected 1, got 2"),
    (dict(extra=1), "state: expected a dict of"),
    (dict(longest=11), "longest: expected 0 to max_length = 10, got 11"),
    (dict(longest=4), "key: expected shape [2, 4, 2, 16], got [2, 5, 2, 16]"),
    (dict(key=None), "key: expected a tensor, got NoneType"),
    (dict(open_sum=Z(2, 1, 12).double()), "open_sum: expected dtype torch.float32, got"),
    (dict(history=Z(2, 4, 1, 12)), "history: expected shape [2, 8, 1, 12], got [2, 4, 1, 12]"),
    (dict(lengths=torch.tensor([5, 6]).int()), "lengths: expected 0 to 5, got [5, 6]"),
    (
        dict(history_start=torch.tensor([-1, 0]).int()),
        "history_start: expected 0 to 5, got [-1, 0]",
    ),
]


@pytest.mark.parametrize(("changes", "message"), BAD_STATES)
def test_bad_states(changes, message):
    state = partly_filled().state_dict()
    cache = partly_filled()
    before = snapshot(cache)
    with pytest.raises(ValueError) as error:
        cache.load_state_dict({**state, **changes})
    assert str(error.value).startswith(f"ChunkCache.load_state_dict: {message}")
    assert_unchanged(cache, before)
    with pytest.raises(ValueError, match=r"state: expected a dict of .* got list"):
        cache.load_state_dict([state])
