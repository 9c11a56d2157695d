"""The benchmark harness: the work that it counts, and its data.

Nothing here looks at a time: these machines are shared and slow, and times belong in records.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.kernels import data, model, operators
from benchmarks.kernels.baselines import all_baselines
from benchmarks.kernels.data import Case
from benchmarks.kernels.shapes import PATTERNS, SUITES, TINY, Shape

SHAPES = [
    Shape(length=61, chunk_size=4, top_k=3),
    Shape(length=61, chunk_size=4, top_k=3, queries=50),
    Shape(length=61, chunk_size=7, top_k=20, queries=1),
    Shape(length=64, chunk_size=64, top_k=2),
    Shape(length=5, chunk_size=1, top_k=1),
]


@pytest.mark.parametrize("shape", SHAPES)
def test_model_counts_chunks_as_the_definition_does(shape):
    positions = range(shape.length - shape.rows, shape.length)
    eligible = [p // shape.chunk_size for p in positions]
    assert model.eligible_chunks(shape) == sum(eligible)
    assert model.selected_chunks(shape) == sum(min(shape.top_k, n) for n in eligible)


def test_model_agrees_with_what_the_operator_selects():
    case = Case("attend", replace(TINY, length=203))
    used = int((case.indices >= 0).sum())
    assert used == case.shape.batch * model.selected_chunks(case.shape)


# Microseconds that the bytes of attention, forward and backward, take through the cache of an H200 at
# 5.5 TB/s, as worked out by hand for batch 1, 16 heads, dims 128, bfloat16. S, k, tokens, forward, backward.
GPU_MODEL = [
    (64, 8, 65536, 1428, 2147),
    (64, 8, 262144, 5710, 8590),
    (16, 4, 65536, 836, 1367),
    (16, 4, 262144, 3343, 5466),
    (2, 1, 65536, 195, 781),
    (2, 1, 262144, 781, 3124),
]


@pytest.mark.parametrize(("chunk", "top_k", "length", "forward", "backward"), GPU_MODEL)
def test_model_counts_the_bytes_through_the_cache(chunk, top_k, length, forward, backward):
    shape = Shape(length, chunk, top_k, heads=16, kv_heads=16, head_dim=128, retrieval_dim=128)
    seconds = model.attend(shape, 2).cached / 5.5e12
    assert seconds * 1e6 == pytest.approx(forward, rel=0.01)
    seconds = model.attend_backward(shape, 2).cached / 5.5e12
    assert seconds * 1e6 == pytest.approx(backward, rel=0.01)


def test_model_search_and_dense_match_their_formulas():
    shape = Shape(65536, heads=16, kv_heads=16, head_dim=128, retrieval_dim=128)
    assert model.search(shape, 2).flops == pytest.approx(8.6e9, rel=0.01)
    assert model.search(shape, 2).cached == pytest.approx(0.067e9, rel=0.01)
    assert model.dense(shape, 2).flops == pytest.approx(2 * 65536**2 * 128 * 16, rel=1e-4)
    one = replace(shape, queries=1)
    assert model.dense(one, 2).flops == 4 * 65536 * 128 * 16


def test_model_reads_only_what_one_query_can_select():
    shape = Shape(length=65536, queries=1)
    context = 2 * shape.kv_heads * shape.head_dim * 4 * shape.top_k * shape.chunk_size
    queries = 2 * shape.heads * shape.head_dim * 4
    indices = shape.top_k * model.INDEX_BYTES
    assert model.attend(shape, 4).compulsory == context + queries + indices


def test_floor_takes_the_slowest_part_of_each_stage():
    speeds = model.Speeds(copy=10.0, matmul=100.0, cache=1000.0)
    works = [model.Work(flops=300), model.Work(compulsory=50), model.Work(cached=7000)]
    assert model.floor_seconds(works, speeds) == 3 + 5 + 7
    assert model.floor_seconds([sum(works, model.Work())], speeds) == 7
    assert model.floor_seconds(works, replace(speeds, cache=None)) == 3 + 5


def test_autoregressive_is_its_recurrence():
    noise = torch.randn(2, 300, 3)
    got = data.autoregressive(noise, rho=0.9)
    x = noise[:, 0]
    for t in range(300):
        if t:
            x = 0.9 * x + (1 - 0.9**2) ** 0.5 * noise[:, t]
        torch.testing.assert_close(got[:, t], x, atol=1e-5, rtol=0)


def test_patterns_select_as_they_say():
    shape = Shape(length=4096, chunk_size=16, top_k=4, retrieval_dim=32, heads=1, kv_heads=1)
    found = {p: data.locality(Case("attend", shape, p).indices) for p in PATTERNS}
    assert found["random"]["neighbour_jaccard"] < 0.2
    assert found["correlated"]["neighbour_jaccard"] > 0.6
    assert found["random"]["top_tenth_share"] < 0.3
    assert found["skewed"]["top_tenth_share"] > 0.9


def test_locality_of_known_selections():
    same = torch.tensor([[[[0, 1]]] * 8])
    assert data.locality(same) == {"neighbour_jaccard": 1.0, "top_tenth_share": 0.5}
    apart = torch.arange(16).view(1, 8, 1, 2)
    assert data.locality(apart)["neighbour_jaccard"] == 0


def test_every_suite_names_what_exists():
    for suite in SUITES.values():
        for sweep in suite:
            assert sweep.operator in operators.OPERATORS
            assert set(sweep.baselines or ()) <= set(all_baselines())
            assert sweep.lengths and sweep.dtypes and sweep.patterns
