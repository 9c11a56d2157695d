"""torch.ops.resona.decode_step as an operator: in place, without gradients, a citizen of torch."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

ops = torch.ops.resona

CACHE = ("key_cache", "value_cache", "chunk_embedding", "open_sum", "history", "lengths")
B, H, HKV, D, R, E, S, K, M = 3, 4, 2, 8, 2, 5, 3, 2, 12


def cache(batch: int = B) -> dict[str, torch.Tensor]:
    return {
        "key_cache": torch.randn(batch, M, HKV, D),
        "value_cache": torch.randn(batch, M, HKV, D),
        "chunk_embedding": torch.randn(batch, M // S, R, E),
        "open_sum": torch.randn(batch, R, E),
        "history": torch.randn(batch, 4, R, E),
        "lengths": torch.tensor([0, 5, 11], dtype=torch.int32)[:batch],
    }


def arguments(batch: int = B, **changes) -> dict:
    rows = {
        "query": torch.randn(batch, 1, H, D),
        "key": torch.randn(batch, 1, HKV, D),
        "value": torch.randn(batch, 1, HKV, D),
        "query_embedding": torch.randn(batch, 1, R, E),
        "context_embedding": torch.randn(batch, 1, R, E),
    }
    extras = {"score_scale": torch.rand(R), "sink": torch.randn(H)}
    return {**rows, **cache(batch), "chunk_size": S, "top_k": K, **extras, **changes}


def copied(a: dict) -> dict:
    return {k: t.clone() if isinstance(t, torch.Tensor) else t for k, t in a.items()}


def assert_same_cache(a: dict, b: dict) -> None:
    for name in CACHE:
        assert torch.equal(a[name], b[name]), name


def test_what_a_step_writes():
    """Sequence 0 opens a chunk, 1 closes one, 2 fills the cache; everything else stays."""
    a = arguments()
    before = copied(a)
    ops.decode_step(**a)
    assert a["lengths"].tolist() == [1, 6, 12]
    for b, position in enumerate((0, 5, 11)):
        for name, new in (("key_cache", "key"), ("value_cache", "value")):
            before[name][b, position] = a[new][b, 0]
        before["history"][b, position % 4] = a["context_embedding"][b, 0]
        total = before["open_sum"][b] + a["context_embedding"][b, 0]
        before["open_sum"][b] = total if b == 0 else 0
        if b > 0:
            unit = ops.pool_chunks(total[None, None], 1)[0, 0]
            before["chunk_embedding"][b, position // S] = unit
    before["lengths"] += 1
    assert_same_cache(a, before)


def test_a_full_sequence_changes_nothing_anywhere():
    a = arguments()
    a["lengths"][1] = M
    before = copied(a)
    with pytest.raises(
        RuntimeError, match=r"lengths: expected 0 to M - 1 = 11, .* got 12 at \[1\]"
    ):
        ops.decode_step(**a)
    assert_same_cache(a, before)


def test_strided_arguments():
    a = arguments()
    twin = copied(a)
    expected = ops.decode_step(**a)
    for name in ("query", "key", "value", "query_embedding", "context_embedding"):
        twin[name] = twin[name].mT.contiguous().mT
    twin["query"] = twin["query"].expand(2, *twin["query"].shape)[0]
    got = ops.decode_step(**twin)
    assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))
    assert_same_cache(a, twin)


def test_no_sequences_and_no_history():
    out, lse, indices, scores = ops.decode_step(**arguments(batch=0))
    assert out.shape == (0, 1, H, D) and lse.shape == (0, 1, H)
    assert indices.shape == scores.shape == (0, 1, R, K)
    a, b = arguments(), None
    b = copied(a)
    b["history"] = torch.zeros(B, 0, R, E)
    for got, expected in zip(ops.decode_step(**b), ops.decode_step(**a), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("name", ["query", "context_embedding", "key_cache", "sink"])
def test_gradients_are_refused(name):
    a = arguments()
    a[name] = a[name].requires_grad_()
    before = copied(a)
    text = f"resona::decode_step: {name}: expected no gradient, as the step has no backward"
    with pytest.raises(RuntimeError, match=text):
        ops.decode_step(**a)
    assert_same_cache(a, before)
    with torch.no_grad():
        out = ops.decode_step(**a)[0]
    assert not out.requires_grad


def test_inference_mode():
    a = arguments()
    twin = copied(a)
    expected = ops.decode_step(**a)
    with torch.inference_mode():
        got = ops.decode_step(**twin)
    assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))
    assert_same_cache(a, twin)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    a = arguments()
    for name, t in a.items():
        if isinstance(t, torch.Tensor) and name not in (
            "open_sum",
            "lengths",
            "score_scale",
            "sink",
        ):
            a[name] = t.to(dtype)
    torch.library.opcheck(ops.decode_step.default, (), a)


def test_flops():
    with FlopCounterMode(display=False) as counter:
        ops.decode_step(*arguments().values())
    search, attention = 2 * B * R * E * (M // S), 4 * B * H * D * K * S
    assert counter.get_total_flops() == search + attention


def test_compiled_steps_write_in_place():
    def two_steps(a):
        first = ops.decode_step(**a)[0]
        return first, *ops.decode_step(**{**a, "query": first})

    a = arguments()
    a["lengths"].fill_(4)
    twin = copied(a)
    expected = two_steps(a)
    got = torch.compile(two_steps, fullgraph=True, backend="aot_eager")(twin)
    assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))
    assert_same_cache(a, twin)
