"""Where the time inside a call goes: every kernel belongs to a part, and the CPU's clocks tell the truth."""

from __future__ import annotations

import re
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.kernels import operators, parts, table
from benchmarks.kernels.data import Case
from benchmarks.kernels.shapes import Shape

SOURCES = Path(__file__).resolve().parents[1] / "csrc" / "cuda"
FORWARD = {"pool", "search", "rescore", "index", "pack", "attention", "merge"}


def kernels() -> list[str]:
    texts = (path.read_text() for path in sorted(SOURCES.glob("*.cuh")))
    return sorted(
        {name for text in texts for name in re.findall(r"__global__[^;{]*?\b(\w+_kernel)\(", text)}
    )


def test_every_kernel_has_a_part():
    assert len(kernels()) > 20
    assert [name for name in kernels() if parts.part_of(name) == "other"] == []


@pytest.mark.parametrize(
    "name, part",
    [
        ("void resona::cuda::attend_chunk_kernel<resona::cuda::Chunk<64, 8>>(Params)", "attention"),
        ("void resona::cuda::attend_merge_kernel<resona::A>(resona::cuda::Merge)", "merge"),
        ("resona::cuda::index_lists_kernel(resona::cuda::IndexResultParams)", "index"),
        ("attend_query_kernel", "attention"),
        ("attend_query_gradient_kernel", "gradients"),
        ("decode_search_kernel", "search"),
        ("search_attend_kernel", "search and attention"),
        ("void at::native::vectorized_elementwise_kernel<4>(int)", "other"),
    ],
)
def test_part_of_a_kernel_as_profilers_name_it(name, part):
    assert parts.part_of(name) == part


def test_kernels_of_one_part_add_up():
    seen = [("index_keys_kernel", 1.0), ("attend_merge_kernel", 2.0), ("scan_tiles_kernel", 0.5)]
    assert parts.sum_by_part(seen) == {"index": 1.5, "merge": 2.0}


def call_of(operator: str):
    queries = 1 if operator == "decode" else None
    case = Case(operator, Shape(length=1024, chunk_size=16, top_k=4, queries=queries))
    call = next(iter(operators.OPERATORS[operator].ours(case))).call
    call()  # the case makes its inputs when they are first asked for
    return call


@pytest.mark.parametrize(
    "operator, expected",
    [
        ("pool", {"pool"}),
        ("search", {"search", "rescore"}),
        ("attend", FORWARD - {"pool", "search", "rescore"}),
        ("fused", FORWARD),
        ("backward", {"index", "gradients"}),
        ("decode", FORWARD - {"rescore"}),  # one query: every chunk is scored canonically at once
    ],
)
def test_parts_of_an_operator_on_the_cpu(operator, expected):
    assert set(parts.measure(call_of(operator), "cpu")) == expected


def test_parts_on_one_thread_add_up_to_the_call(threads):
    threads(1)
    call = call_of("fused")
    begin = time.perf_counter()
    found = parts.measure(call, "cpu")
    took = time.perf_counter() - begin
    assert 0.5 * took < sum(found.values()) <= took


def test_the_clock_stands_still_between_measurements():
    call = call_of("fused")
    parts.measure(call, "cpu")
    call()
    assert parts._on_cpu(lambda: None) == {}


def test_the_clock_stops_when_the_call_raises():
    def broken():
        raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError):
        parts.measure(broken, "cpu")
    call_of("fused")()
    assert parts.measure(lambda: torch.ones(1), "cpu") == {}


def test_a_package_without_the_clock_has_no_parts(monkeypatch):
    monkeypatch.setattr(parts.torch, "ops", SimpleNamespace(resona=SimpleNamespace()))
    assert parts.measure(lambda: None, "cpu") == {}


def test_table_shows_shares():
    row = {"contender": "resona", "part_index_ms": 1.0, "part_attention_ms": 3.0, "median_ms": 4.0}
    assert table._parts(row) == "  resona spends: attention 75 %, index 25 %"
    assert table._parts({"contender": "sdpa"}) == ""
