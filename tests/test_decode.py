"""torch.ops.resona.decode_step and decode_step_two_level as operators: in place, without gradients, citizens
of torch. What they compute is in test_cache.py and test_cache_two_level.py."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

ops = torch.ops.resona

CACHE = ("key_cache", "value_cache", "chunk_embedding", "open_sum", "history", "lengths")
UPPER = ("superchunk_embedding", "superchunk_sum")
B, H, HKV, D, R, E, S, K, M, P = 3, 4, 2, 8, 2, 5, 3, 2, 12, 2


@pytest.fixture(params=["decode_step", "decode_step_two_level"])
def step(request):
    return getattr(ops, request.param)


def cache(batch: int = B) -> dict[str, torch.Tensor]:
    return {
        "key_cache": torch.randn(batch, M, HKV, D),
        "value_cache": torch.randn(batch, M, HKV, D),
        "chunk_embedding": torch.randn(batch, M // S, R, E),
        "open_sum": torch.randn(batch, R, E),
        "history": torch.randn(batch, 4, R, E),
        "lengths": torch.tensor([0, 5, 11], dtype=torch.int32)[:batch],
    }


def arguments(step, batch: int = B, **changes) -> dict:
    """In the order of the schema."""
    rows = {
        "query": torch.randn(batch, 1, H, D),
        "key": torch.randn(batch, 1, HKV, D),
        "value": torch.randn(batch, 1, HKV, D),
        "query_embedding": torch.randn(batch, 1, R, E),
        "context_embedding": torch.randn(batch, 1, R, E),
    }
    state, sizes, rest = cache(batch), {"chunk_size": S, "top_k": K}, {}
    if step is ops.decode_step_two_level:
        state["superchunk_embedding"] = torch.randn(batch, M // S // P, R, E)
        state["superchunk_sum"] = torch.randn(batch, R, E)
        sizes["superchunk_size"], rest["probes"] = P, 1
    extras = {"score_scale": torch.rand(R), "sink": torch.randn(H)}
    return {**rows, **state, **sizes, **extras, **rest, **changes}


def copied(a: dict) -> dict:
    return {k: t.clone() if isinstance(t, torch.Tensor) else t for k, t in a.items()}


def assert_same_cache(a: dict, b: dict) -> None:
    for name in (name for name in (*CACHE, *UPPER) if name in a):
        assert torch.equal(a[name], b[name]), name


def test_what_a_step_writes(step):
    """Sequence 0 opens a chunk, 1 closes one, 2 fills the cache; everything else stays."""
    a = arguments(step)
    before = copied(a)
    step(**a)
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
        if b > 0 and "superchunk_sum" in before:
            total = before["superchunk_sum"][b] + unit
            is_last = (position + 1) % (S * P) == 0
            before["superchunk_sum"][b] = 0 if is_last else total
            if is_last:
                unit = ops.pool_chunks(total[None, None], 1)[0, 0]
                before["superchunk_embedding"][b, position // (S * P)] = unit
    before["lengths"] += 1
    assert_same_cache(a, before)


def test_a_full_sequence_changes_nothing_anywhere(step):
    a = arguments(step)
    a["lengths"][1] = M
    before = copied(a)
    with pytest.raises(
        RuntimeError, match=r"lengths: expected 0 to M - 1 = 11, .* got 12 at \[1\]"
    ):
        step(**a)
    assert_same_cache(a, before)


def test_strided_arguments(step):
    a = arguments(step)
    twin = copied(a)
    expected = step(**a)
    for name in ("query", "key", "value", "query_embedding", "context_embedding"):
        twin[name] = twin[name].mT.contiguous().mT
    twin["query"] = twin["query"].expand(2, *twin["query"].shape)[0]
    got = step(**twin)
    assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))
    assert_same_cache(a, twin)


def test_no_sequences_and_no_history(step):
    out, lse, indices, scores = step(**arguments(step, batch=0))
    assert out.shape == (0, 1, H, D) and lse.shape == (0, 1, H)
    assert indices.shape == scores.shape == (0, 1, R, K)
    a, b = arguments(step), None
    b = copied(a)
    b["history"] = torch.zeros(B, 0, R, E)
    for got, expected in zip(step(**b), step(**a), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("name", ["query", "context_embedding", "key_cache", "sink"])
def test_gradients_are_refused(step, name):
    a = arguments(step)
    a[name] = a[name].requires_grad_()
    before = copied(a)
    text = f"resona::{step.__name__}: {name}: expected no gradient, as the step has no backward"
    with pytest.raises(RuntimeError, match=text):
        step(**a)
    assert_same_cache(a, before)
    with torch.no_grad():
        out = step(**a)[0]
    assert not out.requires_grad


def test_inference_mode(step):
    a = arguments(step)
    twin = copied(a)
    expected = step(**a)
    with torch.inference_mode():
        got = step(**twin)
    assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))
    assert_same_cache(a, twin)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(step, dtype):
    a = arguments(step)
    kept = ("open_sum", "superchunk_sum", "lengths", "score_scale", "sink")
    for name, t in a.items():
        if isinstance(t, torch.Tensor) and name not in kept:
            a[name] = t.to(dtype)
    torch.library.opcheck(step.default, (), a)


def test_flops(step):
    *values, last = arguments(step).items()
    keywords = dict([last])
    if last[0] != "probes":
        values, keywords = [*values, last], {}
    with FlopCounterMode(display=False) as counter:
        step(*(value for _, value in values), **keywords)
    scored, attention = M // S, 4 * B * H * D * K * S
    if keywords:
        # Two centroids, and of four chunks those of one superchunk and of half an open one.
        scored = M // S // P + 1 * P + P // 2
    assert counter.get_total_flops() == 2 * B * R * E * scored + attention


@pytest.mark.timeout(60, method="thread")
@pytest.mark.parametrize("probes", [2**54, 2**62, 2**63 - 1])
@pytest.mark.parametrize("size", [P, 2**62])
def test_more_probes_than_chunks(size, probes):
    """The exact search, whatever the superchunks are."""
    a = arguments(ops.decode_step_two_level, superchunk_size=size, probes=probes)
    a["superchunk_embedding"] = a["superchunk_embedding"][:, : M // S // size].clone()
    exact = {k: t for k, t in copied(a).items() if k not in (*UPPER, "superchunk_size", "probes")}
    got, expected = ops.decode_step_two_level(**a), ops.decode_step(**exact)
    assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))


def test_compiled_steps_write_in_place(step):
    def two_steps(a):
        first = step(**a)[0]
        return first, *step(**{**a, "query": first})

    a = arguments(step)
    a["lengths"].fill_(4)
    twin = copied(a)
    expected = two_steps(a)
    got = torch.compile(two_steps, fullgraph=True, backend="aot_eager")(twin)
    assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))
    assert_same_cache(a, twin)
