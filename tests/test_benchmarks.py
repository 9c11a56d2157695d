"""The benchmark harness: what it computes, what it refuses, and that the README quotes records.

Nothing here looks at a time: these machines are shared and slow, and times belong in records.
"""

from __future__ import annotations

import csv
import json
import subprocess
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import records
from benchmarks.kernels import __main__ as cli
from benchmarks.kernels import (
    ceilings,
    compare,
    data,
    layer,
    model,
    operators,
    runner,
    timer,
    truth,
)
from benchmarks.kernels.baselines import Checkouts, all_baselines, flex, plain
from benchmarks.kernels.data import Case
from benchmarks.kernels.shapes import PATTERNS, SUITES, TINY, Shape
from resona_ext import reference

ROOT = Path(__file__).resolve().parents[1]
QUICK = "sdpa,sdpa-math,torch,gather,gather-whole"  # flex compiles for ten seconds

# --- the byte model -------------------------------------------------------------------------------

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


# --- data -----------------------------------------------------------------------------------------


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


# --- checks: they pass what is right and catch what is wrong --------------------------------------


@pytest.fixture(params=["float32", "bfloat16"])
def case(request) -> Case:
    return Case("attend", replace(TINY, length=203), dtype_name=request.param)


def test_check_forward_catches_one_wrong_row(case):
    out = case.selected_attention()
    for computes in ("selected", "whole"):
        assert truth.check_forward(case, out, computes).passed
    assert not truth.check_forward(case, out, "dense").passed
    out[1, -1, 2] += 0.5
    for computes in ("selected", "whole"):
        assert not truth.check_forward(case, out, computes).passed
    out[0, -1] = torch.nan
    assert not truth.check_forward(case, out, "selected").passed


def test_check_search_wants_exact_indices_of_ours_and_scores_of_others(case):
    s = case.shape
    arguments = (s.chunk_size, s.top_k, s.length)
    found = reference.retrieve(case.query_embedding, case.chunk_embedding, *arguments)
    assert truth.check_search(case, found, exact=True).passed
    full = (found[0] >= 0).all(dim=-1, keepdim=True)
    swapped = (torch.where(full, found[0].flip(-1), found[0]), found[1])
    assert not truth.check_search(case, swapped, exact=True).passed
    assert truth.check_search(case, swapped, exact=False).passed
    invented = (torch.where(found[0] > 0, found[0] - 1, found[0]), found[1])
    assert not truth.check_search(case, invented, exact=False).passed
    future = (torch.where(found[0] >= 0, 24, -1), found[1])
    assert not truth.check_search(case, future, exact=False).passed
    worse = (found[0], found[1] - 1e-3)
    assert not truth.check_search(case, worse, exact=False).passed
    fewer = (found[0].clone().index_fill_(3, torch.tensor(1), -1), found[1])
    assert not truth.check_search(case, fewer, exact=False).passed


def test_check_pool_catches_an_unnormalised_chunk(case):
    assert truth.check_pool(case, case.chunk_embedding, exact=True).passed
    assert not truth.check_pool(case, 2 * case.chunk_embedding, exact=False).passed


@pytest.mark.parametrize("computes", ["selected", "dense"])
@pytest.mark.parametrize("wrong", [0, 1, 2])
def test_check_backward_catches_each_gradient(computes, wrong):
    case = Case("backward", replace(TINY, length=203))
    leaves = [x.detach().requires_grad_() for x in (case.query, case.key, case.value)]
    if computes == "dense":
        out = truth.dense_rows(*leaves, torch.arange(203))
    else:
        out = reference.attend(*leaves, case.indices, case.shape.chunk_size)[0]
    gradients = list(torch.autograd.grad(out, leaves, case.grad_out))
    assert truth.check_backward(case, tuple(gradients), computes).passed
    gradients[wrong] = gradients[wrong] * 1.01
    assert not truth.check_backward(case, tuple(gradients), computes).passed


def test_dense_rows_is_causal_attention():
    query, key, value = (torch.randn(2, 40, heads, 8) for heads in (4, 2, 2))
    heads_first = (x.transpose(1, 2) for x in (query, key, value))
    expected = torch.nn.functional.scaled_dot_product_attention(
        *heads_first, is_causal=True, enable_gqa=True
    )
    got = truth.dense_rows(query, key, value, torch.arange(40))
    torch.testing.assert_close(got, expected.transpose(1, 2))


# --- baselines and layer --------------------------------------------------------------------------


def test_gather_attends_to_the_selected_chunks_and_gives_zero_elsewhere(monkeypatch):
    monkeypatch.setattr(plain, "BLOCK_BYTES", {"cpu": 1 << 14})  # several blocks
    case = Case("attend", replace(TINY, length=203))
    got = plain.gather_attention(case.query, case.key, case.value, case.indices, 8)
    expected = reference.attend(case.query, case.key, case.value, case.indices, 8)[0]
    torch.testing.assert_close(got, expected)
    assert not got[:, :8].any()


def test_plain_search_fills_unused_slots(monkeypatch):
    monkeypatch.setattr(plain, "BLOCK_BYTES", {"cpu": 1 << 10})
    case = Case("search", replace(TINY, length=50, top_k=9))
    found = plain.search(case.query_embedding, case.chunk_embedding, 8, 9, 50)
    expected = reference.retrieve(case.query_embedding, case.chunk_embedding, 8, 9, 50)
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1])


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_uses_the_same_mask(monkeypatch):
    from torch.nn.attention.flex_attention import flex_attention

    monkeypatch.setattr(flex, "_compiled", lambda: flex_attention)  # slow and exact
    case = Case("attend", replace(TINY, length=203))
    forward = flex.build(case, Checkouts())
    out = forward.standard(forward.function(*forward.inputs(case)))
    torch.testing.assert_close(out, case.selected_attention())


def test_block_check_catches_a_look_ahead():
    case = Case("layer-forward", replace(TINY, length=64))
    block = layer.make_block(case, is_augmented=True)
    call, check = layer.forward(block, case)
    assert check(call()).passed
    block.mixer.register_forward_hook(lambda module, inputs, y: y + y.mean(dim=1, keepdim=True))
    assert not check(call()).passed


def test_decoding_check_catches_a_forgotten_token():
    case = Case("layer-decode", replace(TINY, length=64))
    block = layer.make_block(case, is_augmented=True)
    with torch.no_grad():
        call, check = layer.decode(block, case)
        call()
        assert check(call()).passed
        call.cache.key.zero_()
        assert not check(call()).passed


def test_decoding_goes_on_beyond_the_room(monkeypatch):
    monkeypatch.setattr(layer, "ROOM", 3)
    case = Case("layer-decode", replace(TINY, length=60))
    with torch.no_grad():
        call, _ = layer.decode(layer.make_block(case, is_augmented=True), case)
        for _ in range(20):
            assert call().isfinite().all()
    assert call.cache.get_seq_length() <= 63


def test_layer_operators_say_what_is_missing(monkeypatch, tmp_path):
    operator = replace(operators.OPERATORS["layer-forward"], missing=lambda device: "no mixer")
    monkeypatch.setitem(operators.OPERATORS, "layer-forward", operator)
    status, record = run_smoke(tmp_path / "run", "layer-forward")
    (row,) = record["rows"].values()
    assert (status, row["status"], row["reason"]) == (0, "skipped", "no mixer")


def test_decode_step_finds_the_cache_as_it_was():
    case = Case("decode", replace(TINY, length=203, queries=1))
    step = operators.DecodeStep(case)
    assert torch.equal(step(), step())
    assert truth.check_forward(case, step(), "whole").passed


def test_gpu_only_baselines_say_why_they_are_missing():
    for name, baseline in all_baselines().items():
        reason = baseline.missing("cpu", Checkouts())
        if name in ("nsa", "flashmoba"):
            assert f"--{name} PATH" in reason
        elif name in ("sdpa-cudnn", "fa2", "fa3", "fa4"):
            assert reason
        elif name != "sdpa-flash":
            assert reason is None


# --- timer ----------------------------------------------------------------------------------------


class FakeClock:
    """Each call returns how long it takes."""

    def __init__(self):
        self.log = []

    def prepare(self, call, check=None):
        if check is not None:
            check(call())
        return call, "fake"

    def seconds(self, call):
        self.log.append(call.__name__)
        return call()


def _taking(name: str, seconds: float):
    def call():
        return seconds

    call.__name__ = name
    return call


def test_interleaved_takes_turns_and_respects_the_budget():
    clock = FakeClock()
    calls = {"a": _taking("a", 0.1), "b": _taking("b", 0.4), "slow": _taking("slow", 99.0)}
    budget = timer.Budget(seconds=1.0, max_calls=5, min_calls=3, long_call=10.0)
    timings, failed = timer.interleaved(calls, clock, budget)
    assert not failed
    assert [len(timings[name].samples) for name in calls] == [5, 3, 1]
    assert clock.log == ["a", "b", "slow", "b", "a", "a", "b", "a", "a"]
    assert timings["b"].median == 0.4


def test_interleaved_goes_on_without_a_call_that_fails():
    def broken():
        raise RuntimeError("out of luck")

    calls = {"broken": broken, "fine": _taking("fine", 1.0)}
    timings, failed = timer.interleaved(calls, FakeClock(), timer.Budget(min_calls=2))
    assert list(timings) == ["fine"] and len(timings["fine"].samples) == 2
    assert str(failed["broken"]) == "out of luck"


def test_interleaved_keeps_nothing_of_what_failed():
    """The frames of an error hold the tensors of their case."""

    class Held:
        pass

    held = Held()
    gone = weakref.ref(held)

    def broken(held=held):
        raise RuntimeError("out of luck")

    calls = {"broken": broken}
    del held, broken
    _, failed = timer.interleaved(calls, FakeClock(), timer.Budget(min_calls=1))
    calls.clear()
    assert failed["broken"].__traceback__ is None and gone() is None


def test_interleaved_leaves_out_what_is_wrong_once_prepared():
    def refuse(result):
        raise ValueError(f"got {result}")

    calls = {name: _taking(name, 1.0) for name in ("wrong", "right")}
    checks = {"wrong": refuse, "right": lambda result: None}
    budget = timer.Budget(min_calls=1, max_calls=1)
    timings, failed = timer.interleaved(calls, FakeClock(), budget, checks=checks)
    assert list(timings) == ["right"] and str(failed["wrong"]) == "got 1.0"


def test_peak_bytes_sees_an_allocation():
    result, peak = timer.CpuClock().peak_bytes(lambda: torch.ones(4 << 20))
    assert result.numel() == 4 << 20
    assert peak is None or 15 << 20 <= peak <= 64 << 20


def test_out_of_memory_is_recognised_on_a_cpu():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60)
    assert timer.is_out_of_memory(caught.value)
    assert not timer.is_out_of_memory(RuntimeError("shape mismatch"))


# --- the command ----------------------------------------------------------------------------------


def run_smoke(prefix: Path, *arguments: str) -> tuple[int, dict]:
    status = cli.main([*arguments, "--smoke", "--baselines", QUICK, "--output", str(prefix)])
    return status, json.loads(prefix.with_name(f"{prefix.name}.json").read_text())


@pytest.fixture(scope="module")
def smoke(tmp_path_factory) -> tuple[int, dict, Path]:
    prefix = tmp_path_factory.mktemp("smoke") / "run.1"
    return (*run_smoke(prefix), prefix)


def test_smoke_suite_is_right_everywhere(smoke):
    status, record, _ = smoke
    assert status == 0 and record["complete"]
    assert {row["operator"] for row in record["rows"].values()} == set(operators.OPERATORS)
    for id, row in record["rows"].items():
        assert row["status"] == "ok", f"{id}: {row['reason']}"
        assert row["error"] <= row["tolerance"]
        assert row["min_ms"] <= row["median_ms"] <= row["max_ms"]
        assert row["calls"] == 1 and row["timer"] == "wall"
        assert id == "/".join([id.rsplit("/", 1)[0], row["contender"]])


def test_smoke_record_says_what_was_measured_and_where(smoke):
    _, record, prefix = smoke
    machine = record["machine"]
    for fact in ("date", "command", "commit", "torch", "cpu", "threads", "python", "device"):
        assert machine[fact]
    assert set(record["ceilings"]) >= {"copy", "gather_memory", "gather_cache", "matmul_float32"}
    assert record["baselines"]["sdpa"] == "used"
    assert record["baselines"]["fa3"] == "not asked for"
    assert str(prefix.parent) not in json.dumps(record)
    fused = record["rows"]["fused/random/float32/L203/S8k2/B2H4x2D16R1E24/resona"]
    assert fused["ratio"] == 1
    work = sum(
        (f(replace(TINY, length=203), 4) for f in (model.pool, model.search, model.attend)),
        model.Work(),
    )
    assert fused["flops"] == work.flops
    assert fused["flops_per_s"] == pytest.approx(work.flops / fused["median_ms"] * 1e3)
    assert fused["percent_of_floor"] == pytest.approx(100 * fused["floor_ms"] / fused["median_ms"])


def test_a_call_that_cannot_be_taken_apart_keeps_its_times(tmp_path, monkeypatch):
    def failing(call, device):
        raise MemoryError("no room")

    monkeypatch.setattr(runner.parts, "measure", failing)
    status, record = run_smoke(tmp_path / "run", "pool")
    ours = [row for row in record["rows"].values() if row["contender"] == operators.OURS]
    assert status == 0 and record["complete"] and ours
    for row in ours:
        assert row["status"] == "ok" and row["median_ms"] > 0
        assert row["parts_missing"] == "MemoryError: no room"


def test_smoke_writes_csv_and_plots(smoke):
    _, record, prefix = smoke
    with open(f"{prefix}.csv") as file:
        rows = {row["id"]: row for row in csv.DictReader(file)}
    assert rows.keys() == record["rows"].keys()
    for id, row in rows.items():
        assert float(row["median_ms"]) == record["rows"][id]["median_ms"]
    for kind in ("time", "speedup", "roofline"):
        assert Path(f"{prefix}-{kind}.png").read_bytes().startswith(b"\x89PNG")
    assert not list(prefix.parent.glob("*.part"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["conv"], "unknown operator 'conv', expected some of pool, search"),
        (["--baselines", "sdpa,magic"], "--baselines: unknown 'magic', expected some of sdpa"),
        (["--dtypes", "int8"], "--dtypes: unknown 'int8'"),
        (["--patterns", "zigzag"], "--patterns: unknown 'zigzag'"),
        (["--device", "cuda"], "--device cuda: torch sees no GPU"),
        (["--baselines", "sdpa-cudnn"], "sdpa-cudnn cannot be used, needs a GPU"),
        (["--baselines", "nsa"], "nsa cannot be used, no checkout given (--nsa PATH)"),
        (["--nsa", "/no/such/tree"], "--nsa /no/such/tree: no such directory"),
        (["--max-length", "3"], "no case that fits"),
        (["--rounds", "1"], "--rounds: expected at least 2"),
        (["--threads", "0"], "--threads: expected at least 1"),
        (["--targets"], "--targets: expected alone, got --smoke too"),
        (["--compare", "no-such-commit"], "--compare no-such-commit: "),
    ],
)
def test_bad_input_gets_one_line(arguments, message, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status = cli.main(["--smoke", "--output", str(tmp_path / "x"), *arguments])
    captured = capsys.readouterr()
    assert status == 2
    assert message in captured.err and captured.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_gpu_without_cuda_kernels_gets_one_line(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda *names: False)
    assert cli.main(["--device", "cuda", "--smoke"]) == 2
    assert "--device cuda: this build of resona_ext has no CUDA kernels" in capsys.readouterr().err
    assert cli.make_plan(cli.build_parser().parse_args(["--smoke"])).device == "cpu"


def test_output_that_cannot_be_written_gets_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    status = cli.main(["pool", "--smoke", "--output", str(tmp_path / "file" / "run")])
    assert status == 2
    assert "cannot be written" in capsys.readouterr().err


def _sabotage(monkeypatch, name: str, function) -> None:
    """Replaces the forward of the baseline `gather`."""
    broken = replace(all_baselines()["gather"], name=name, build=function)
    known = all_baselines() | {name: broken}
    monkeypatch.setattr(cli, "all_baselines", lambda: known)


def _run_with(monkeypatch, tmp_path, build) -> tuple[int, dict]:
    _sabotage(monkeypatch, "odd", build)
    prefix = tmp_path / "run"
    arguments = ["attend", "--smoke", "--baselines", "sdpa,odd", "--output", str(prefix)]
    return cli.main(arguments), json.loads(Path(f"{prefix}.json").read_text())


def test_out_of_memory_stays_in_its_cell(monkeypatch, tmp_path, capsys):
    def build(case, checkouts):
        if case.dtype_name == "float32":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 TiB")
        return plain._build_gather(case, checkouts)

    status, record = _run_with(monkeypatch, tmp_path, build)
    rows = {id: row["status"] for id, row in record["rows"].items()}
    assert status == 0 and record["complete"]
    odd = {id.split("/")[2]: word for id, word in rows.items() if id.endswith("odd")}
    assert odd == {"float32": "oom", "bfloat16": "ok"}
    assert all(word == "ok" for id, word in rows.items() if not id.endswith("odd"))
    assert "oom: CUDA out of memory" in capsys.readouterr().out


def test_a_wrong_result_is_told_and_not_timed(monkeypatch, tmp_path):
    def build(case, checkouts):
        forward = plain._build_gather(case, checkouts)
        return replace(forward, function=lambda *inputs: forward.function(*inputs) * 1.1)

    status, record = _run_with(monkeypatch, tmp_path, build)
    odd = [row for id, row in record["rows"].items() if id.endswith("odd")]
    assert status == 0  # ours was right
    assert len(odd) == 2
    for row in odd:
        assert row["status"] == "wrong" and "median_ms" not in row
        assert "worst at (" in row["reason"]


def test_a_wrong_result_of_ours_fails_the_run(monkeypatch, tmp_path):
    monkeypatch.setattr(operators, "pool_chunks", lambda x, size: plain.pool(x, size) * 1.5)
    status, record = run_smoke(tmp_path / "run", "pool")
    assert status == 1
    words = {row["contender"]: row["status"] for row in record["rows"].values()}
    assert words == {"resona": "wrong", "torch": "ok"}


def test_interrupt_keeps_the_finished_cases(monkeypatch, tmp_path, capsys):
    def build(case, checkouts):
        if case.dtype_name == "bfloat16":
            raise KeyboardInterrupt
        return plain._build_gather(case, checkouts)

    status, record = _run_with(monkeypatch, tmp_path, build)
    assert status == 130
    assert not record["complete"]
    assert {row["dtype"] for row in record["rows"].values()} == {"float32"}
    assert {row["contender"] for row in record["rows"].values()} == {"resona", "sdpa", "odd"}
    assert "1 of 2 cases are finished and kept" in capsys.readouterr().out


def test_calls_foreseen_to_take_too_long_are_left_out(tmp_path):
    arguments = ["--smoke", "--baselines", "sdpa", "--output", str(tmp_path / "run"), "fused"]
    assert cli.main([*arguments, "--patience", "0", "--dtypes", "float32"]) == 0
    rows = json.loads((tmp_path / "run.json").read_text())["rows"]
    reasons = [row["reason"] for row in rows.values() if row["contender"] == "sdpa"]
    assert reasons[0].startswith("a call takes") and reasons[1].startswith("a call would take")
    assert all(row["status"] == "ok" for row in rows.values() if row["contender"] != "sdpa")

    plan = cli.make_plan(cli.build_parser().parse_args(arguments))
    sweep, case = next(plan.cases())
    run = runner.Runner(plan, {})
    sdpa = plan.baselines["sdpa"]
    assert run._why_not(sweep, case, sdpa) is None
    run.history[run._key(case, "sdpa")] = (case.shape.length, plan.patience / 3)
    assert run._why_not(sweep, case, sdpa) is None
    longer = replace(case, shape=case.shape.with_length(2 * case.shape.length))
    assert "would take about 53 s (--patience 40)" in run._why_not(sweep, longer, sdpa)


def test_baselines_that_do_not_fit_say_why(tmp_path):
    arguments = ["--smoke", "--output", str(tmp_path / "run"), "fused"]
    plan = cli.make_plan(cli.build_parser().parse_args(arguments))
    sweep, case = next(plan.cases())
    run, sdpa = runner.Runner(plan, {}), plan.baselines["sdpa"]
    part = replace(case, shape=replace(case.shape, queries=50))
    assert "T must be 1 or L" in run._why_not(sweep, part, sdpa)
    long = replace(case, shape=case.shape.with_length(65536))
    assert run._why_not(sweep, long, plan.baselines["sdpa-math"]) == "would hold 128 GiB of scores"
    assert "not part" in run._why_not(replace(sweep, baselines=()), case, sdpa)
    backward = replace(case, operator="backward")
    assert "no backward on a CPU" in run._why_not(sweep, backward, plan.baselines["flex"])


def test_the_cache_bounds_a_gpu_only():
    rates = {"copy": 1.0, "matmul_float32": 2.0, "gather_cache": 3.0}
    assert ceilings.speeds(rates, "float32", "cpu") == model.Speeds(1.0, 2.0)
    assert ceilings.speeds(rates, "float32", "cuda") == model.Speeds(1.0, 2.0, 3.0)
    assert ceilings.speeds(rates | {"gather_cache": None}, "float32", "cuda") == model.Speeds(
        1.0, 2.0
    )
    assert ceilings.speeds(rates, "bfloat16", "cpu") is None


def test_list_names_everything(capsys):
    assert cli.main(["--list"]) == 0
    text = capsys.readouterr().out
    for name in [*operators.OPERATORS, *all_baselines()]:
        assert f"  {name} " in text


# --- compare --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "this", "word"),
    [
        ([10.0, 10.1, 10.2], [8.0, 8.1, 8.2], "faster"),
        ([10.0, 10.1, 10.2], [12.0, 12.1, 12.2], "slower"),
        ([10.0, 10.1, 14.0], [12.0, 12.1, 12.2], "same"),  # the spreads overlap
        ([10.0, 10.1, 10.2], [8.0, 8.1, 10.0], "same"),
        ([10.0, 10.1, 10.2], [9.9, 9.95, 9.99], "same"),  # apart, but by too little
        ([10.0, 10.0], [10.0, 10.0], "same"),
    ],
)
def test_verdict_respects_the_spread(base, this, word):
    verdict = compare.judge("x", base, this)
    assert verdict.word == word
    assert verdict.ratio == pytest.approx(sorted(this)[len(this) // 2] / verdict.base_ms, rel=0.02)


def test_verdicts_need_a_time_from_every_round():
    def record(**times):
        return {"rows": {id: {"median_ms": t} if t else {} for id, t in times.items()}}

    base = [record(a=1.0, b=1.0), record(a=1.1, b=None)]
    this = [record(a=2.0, b=2.0, new=1.0), record(a=2.1, b=2.0, new=1.0)]
    assert [(v.id, v.word) for v in compare.verdicts(base, this)] == [("a", "slower")]


def test_compare_passes_on_all_but_its_own_options():
    argv = ["fused", "--compare", "HEAD~1", "--smoke", "--rounds=2", "--output", "x", "--seed", "3"]
    assert compare._own_options_removed(argv) == ["fused", "--smoke", "--seed", "3"]


def test_base_is_checked_out_and_removed_again(tmp_path):
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    with pytest.raises(ZeroDivisionError), compare._worktree("HEAD", tmp_path / "base") as tree:
        assert (tree / "setup.py").exists()
        raise ZeroDivisionError
    assert not (tmp_path / "base").exists()
    command = ["git", "-C", str(ROOT), "worktree", "list"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert str(tmp_path) not in listed


# --- figures of the README ------------------------------------------------------------------------

ROW = "fused/random/float32/L65536/S64k8/B1H4x4D64R1E64/sdpa"


@pytest.fixture
def folder(tmp_path) -> Path:
    record = {
        "machine": {"threads": 2},
        "ceilings": {"copy": 24.7e9},
        "rows": {ROW: {"ratio": 12.3456, "median_ms": 1234.5}},
    }
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "cpu.json").write_text(json.dumps(record))
    cells = [{"schema": 1, "suite": "x"}, {"id": "4ee25375850d", "result": {"token": 0.9963}}]
    (tmp_path / "results" / "cells.jsonl").write_text("".join(json.dumps(c) + "\n" for c in cells))
    return tmp_path


def marker(
    figure: str, field: str = "ratio", key: str = ROW, file: str = "results/cpu.json"
) -> str:
    return f"<!-- record: {file}#{key}:{field}={figure} -->"


@pytest.mark.parametrize(
    "text",
    [
        f"It is 12.3 times as fast. {marker('12.3')}",
        f"It is 12x as fast.\n{marker('12')}",
        f"| time | ratio |\n|---|---|\n| 1,234 ms | 12.35x |\n\n{marker('12.35')}\n\n"
        f"{marker('1,234', 'median_ms')}",
        f"On 2 threads. {marker('2', 'threads', 'machine')}",
        f"It copies 24.7 GB/s. {marker('24.7', 'copy/1e9', 'ceilings')}",
        f"It recalls 0.996. {marker('0.996', 'token', '4ee25375850d', 'results/cells.jsonl')}",
        "No figure, no marker.",
        f"```\nan example {marker('99')}\n```",
        f"```\nresona 12.3x\n```\n{marker('12.3')}",
    ],
)
def test_figures_that_stand_in_a_record_pass(text, folder):
    assert records.check(text, folder) == []


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (f"It is 12.4 times as fast. {marker('12.4')}", "the record has 12.3456"),
        (f"It is 12.30 times as fast. {marker('12.30')}", "the record has 12.3456"),
        (f"It is 15 times as fast. {marker('12.3')}", "does not stand in the text"),
        (f"It is 112.3 times as fast. {marker('12.3')}", "does not stand in the text"),
        (f"It is 12.31 times as fast. {marker('12.3')}", "does not stand in the text"),
        (f"12.3\n\nAnother paragraph. {marker('12.3')}", "does not stand in the text"),
        (f"12.3 {marker('12.3', file='results/gone.json')}", "no such record"),
        (f"12.3 {marker('12.3', file='results/cells.jsonl')}", "no such entry"),
        (f"12.3 {marker('12.3', field='speed')}", "no such entry"),
        (f"12.3 {marker('12.3', key='no/such/row')}", "no such entry"),
        ("12.3 <!-- record: results/cpu.json ratio 12.3 -->", "not a marker"),
    ],
)
def test_figures_that_stand_in_no_record_fail(text, problem, folder):
    (found,) = records.check(text, folder)
    assert problem in found


def test_every_marked_figure_of_the_readme_stands_in_a_record():
    for name in ("README.md", "benchmarks/README.md", "benchmarks/recall/README.md"):
        path = ROOT / name
        if path.exists():
            assert records.check(path.read_text(), ROOT / "benchmarks") == []


def test_records_in_the_repository_are_whole_and_name_no_folder():
    for path in (ROOT / "benchmarks" / "results").glob("**/*.json"):
        text = path.read_text()
        record = json.loads(text)
        assert record.get("complete", True), f"{path.name} comes from an interrupted run"
        assert "/home/" not in text and "/root/" not in text and "/tmp/" not in text, path.name
