"""The plans of prefix linear attention: pieces, slices of the value columns, parts, and what they cost."""

import itertools

import pytest

from resona_ext import cli

_C = pytest.importorskip("resona_ext._C", reason="built without pybind11 (RESONA_PYBIND=0)")

PAPER = dict(batch=16, tokens=32768, prefix_rows=16384, heads=16, dtype="bfloat16")
CUDA = dict(device="cuda", sm=90, sms=132)


def parameters(stage: str = "prefix", **changes) -> dict:
    stages = _C.plan_prefix(**{**PAPER, **CUDA, **changes}).stages
    return next(s.parameters for s in stages if s.name == stage)


# changes -> launches, pieces of the tokens and of the prefix, slices; forward, then backward
PLANS = [
    ({}, (1, 1, 1, 1), (2, 1, 1, 1)),
    (dict(batch=8), (3, 3, 2, 1), (2, 1, 1, 1)),  # half of what fits, once two blocks do
    (dict(batch=1), (3, 17, 9, 1), (7, 9, 5, 1)),
    (dict(batch=1, sequences=3, prefix_rows=32768), (1, 1, 1, 1), (2, 1, 1, 1)),
    (dict(batch=1, tokens=512, prefix_rows=64), (1, 1, 1, 1), (2, 1, 1, 1)),
    (dict(batch=1, tokens=1024, prefix_rows=0), (3, 2, 0, 1), (7, 2, 0, 1)),
    (dict(value_dim=128), (1, 1, 1, 1), (2, 1, 1, 1)),
    (dict(value_dim=128, sm=80), (1, 1, 1, 1), (5, 1, 1, 2)),
    (dict(value_dim=128, sm=120), (1, 1, 1, 2), None),
    (dict(feature_dim=32, value_dim=128), (1, 1, 1, 2), None),
    (dict(tokens=0, prefix_rows=0), (1, 1, 1, 1), (2, 1, 1, 1)),
]  # fmt: skip


@pytest.mark.parametrize("changes, forward, backward", PLANS)
def test_launches_pieces_and_slices(changes, forward, backward):
    for stage, expected in (("prefix", forward), ("prefix_backward", backward)):
        p = parameters(stage, **changes)
        got = tuple(p[n] for n in ("launches", "token_pieces", "prefix_pieces", "slices"))
        assert expected is None or got == expected, stage


@pytest.mark.parametrize("stage", ["prefix", "prefix_backward"])
def test_every_problem_fits(stage):
    """Shared memory of the device; the workspace, down to one batch entry; all tokens and columns."""
    sizes = itertools.product((1, 8, 17, 32), (1, 64, 100, 128), (80, 86, 90, 120), (1, 2, 300))
    for f, v, sm, batch in sizes:
        p = parameters(
            stage, feature_dim=f, value_dim=v, sm=sm, batch=batch, tokens=5000, prefix_rows=999
        )
        assert p["shared_bytes"] <= {80: 163, 90: 227}.get(sm, 99) << 10
        assert p["workspace_bytes"] <= 512 << 20 or p["batch"] == 1
        assert p["token_pieces"] * p["segment"] >= 5000 and p["segment"] % 64 in (0, 5000 % 64)
        assert p["prefix_pieces"] * p["segment"] >= 999
        assert p["slices"] * p["slice_values"] >= v > (p["slices"] - 1) * p["slice_values"]


def test_vector_loads_want_whole_rows_and_slices():
    assert parameters()["vector"] == 1
    for changes in (dict(feature_dim=12), dict(value_dim=60), dict(feature_dim=6, dtype="float32")):
        assert parameters(**changes)["vector"] == 0
    assert parameters(feature_dim=12, dtype="float32")["vector"] == 1


def test_bad_problems_are_named():
    for changes, message in (
        (dict(feature_dim=33), "feature_dim: expected 1 to 32, got 33"),
        (dict(value_dim=0), "value_dim: expected 1 to 128, got 0"),
        (dict(prefix_rows=32769), "prefix_rows: expected 0 to 32768, got 32769"),
        (
            dict(dtype="float64"),
            "dtype: expected float32, float16 or bfloat16 on CUDA, got float64",
        ),
        (dict(sm=75), "sm: expected at least 80, got 75"),
    ):
        with pytest.raises(ValueError, match=message):
            parameters(**changes)


def test_explain_prints_them(capsys):
    assert cli.main(["explain", "--prefix-rows", "16", "--queries", "64", "--device", "cuda"]) == 0
    printed = capsys.readouterr().out
    assert "tokens 64" in printed and "prefix_backward" in printed and "token_pieces 1" in printed
    assert cli.main(["explain", "--prefix-rows", "16"]) == 0
    assert "segmented_sweep" in capsys.readouterr().out
    assert cli.main(["explain", "--prefix-rows", "-1"]) == 2
    assert "prefix_rows: expected 0 to 16384, got -1" in capsys.readouterr().err
