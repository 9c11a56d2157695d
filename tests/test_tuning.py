"""The numbers that CUDA plans decide by: each reaches a plan, each is swept, mistakes are told."""

import json
import re

import pytest
import torch

from benchmarks.kernels import tune

_C = pytest.importorskip("resona_ext._C", reason="built without pybind11 (RESONA_PYBIND=0)")

PROBLEM = dict(
    batch=1,
    queries=65536,
    context=65536,
    heads=16,
    kv_heads=16,
    head_dim=128,
    retrieval_heads=1,
    retrieval_dim=128,
    chunk_size=64,
    top_k=8,
    dtype="bfloat16",
    device="cuda",
)
SHORT = dict(queries=2048, context=2048)
PAIRS = dict(chunk_size=2, top_k=1)

# field -> another value, and a problem whose plan it changes
CHANGES = {
    "dense_context": (1024, SHORT),
    "dense_percent": (100, SHORT),
    "chunk_tokens": (1 << 40, {}),
    "chunk_rows": (1 << 20, {}),
    "item_rows": (128, {}),
    "lane_rows": (0, PAIRS),
    "search_splits": (1, dict(queries=128)),
    "search_finish": (1 << 20, dict(queries=128)),
    "attended_keys": (0, PAIRS),
    "attended_tiles": (1024, PAIRS),
    "pool_blocks": (1, PAIRS),
    "index_blocks": (1, PAIRS),
    "query_blocks": (1, PAIRS),
    "chunk_blocks": (1, {}),
    "merge_blocks": (1, {}),
    "backward_item_blocks": (1, {}),
    "backward_row_blocks": (1, {}),
    "retrieve_backward_blocks": (1, {}),
    "decode_blocks": (8, dict(context=1 << 20, **PAIRS)),
}


def plan(tuning=None, **changes) -> list[tuple]:
    stages = _C.plan(**{**PROBLEM, **changes}, tuning=tuning or {}).stages
    return [(s.name, s.kernel, s.reason, tuple(s.parameters.items())) for s in stages]


def names() -> set[str]:
    with pytest.raises((ValueError, RuntimeError)) as caught:
        torch.ops.resona._tune_cuda("nonsense", 1)
    message = str(caught.value).splitlines()[0]
    assert "got nonsense" in message
    return set(re.search(r"one of (.*), got", message)[1].split(", "))


def test_the_table_has_every_field():
    assert set(CHANGES) == names()


@pytest.mark.parametrize("field", CHANGES)
def test_a_field_changes_a_plan(field):
    value, problem = CHANGES[field]
    assert plan({field: value}, **problem) != plan(**problem)


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("nonsense", 1, "expected names of CudaTuning"),
        ("item_rows", 1, "expected item_rows of 64 to 512"),
    ],
)
def test_plan_refuses(field, value, message):
    with pytest.raises(ValueError, match=message):
        plan({field: value})


def test_tuning_is_of_the_process_and_undone():
    before = torch.ops.resona._tune_cuda("item_rows", 128)
    assert torch.ops.resona._tune_cuda("item_rows", before) == 128
    assert torch.ops.resona._tune_cuda("item_rows", before) == before
    with pytest.raises((ValueError, RuntimeError), match="expected 64 to 512 for item_rows, got 0"):
        torch.ops.resona._tune_cuda("item_rows", 0)
    with pytest.raises(KeyError), tune.tuned("item_rows", 64):
        raise KeyError
    assert torch.ops.resona._tune_cuda("item_rows", before) == before


def test_every_field_is_swept_around_its_default():
    assert set(tune.FIELDS) == names() - {"dense_percent", "retrieve_backward_blocks"}
    for sweep in tune.SWEEPS:
        for value in sweep.values:
            with tune.tuned(sweep.field, value):
                pass


def test_a_sweep_writes_a_record(tmp_path, capsys):
    path = tmp_path / "tune.json"
    arguments = ["item_rows", "--device", "cpu", "--seconds", "0", "--output", str(path)]
    assert tune.main(arguments) == 0
    kept = json.loads(path.read_text())
    assert kept["complete"] and [row["value"] for row in kept["rows"]] == [64, 128, 256, 512]
    assert [row["of_default"] for row in kept["rows"]][-1] == 1
    assert str(tmp_path) not in path.read_text()
    assert "item_rows, default 512" in capsys.readouterr().out


def test_a_case_that_fails_is_told_and_the_rest_go_on(tmp_path, monkeypatch):
    whole, path = tune.sweep_case, tmp_path / "tune.json"

    def failing(sweep, *others):
        if sweep.field == "item_rows":
            raise MemoryError("no room")
        return whole(sweep, *others)

    monkeypatch.setattr(tune, "sweep_case", failing)
    arguments = ["item_rows", "chunk_rows", "--device", "cpu", "--seconds", "0"]
    assert tune.main([*arguments, "--output", str(path)]) == 1
    kept = json.loads(path.read_text())
    told = {row["field"]: row["status"] for row in kept["rows"]}
    assert kept["complete"] and told == {"item_rows": "failed", "chunk_rows": "ok"}


@pytest.mark.parametrize(
    "arguments, message",
    [(["nonsense"], "unknown field 'nonsense'"), ([], "torch sees no GPU on this machine")],
)
def test_command_refuses(arguments, message, capsys):
    if not arguments and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert tune.main(arguments) == 2
    assert message in capsys.readouterr().err
