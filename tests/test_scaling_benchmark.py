"""The cost model of sharded sequences against counts of real selections, and its record."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from torch.utils.flop_counter import FlopCounterMode

import resona_ext
from benchmarks.scaling import counting, model, plot
from benchmarks.scaling.model import Problem

RECORD = Path(__file__).parents[1] / "benchmarks" / "results" / "scaling-cpu.json"


@pytest.mark.parametrize("heads", [1, 2])
def test_the_model_foresees_what_random_selections_need(heads):
    p = Problem(8192, 4, retrieval_heads=heads, retrieval_dim=16, chunk_size=16, top_k=4)
    chunk = counting.select(p, "random")
    for ranks in (1, 2, 4, 8):
        p = replace(p, ranks=ranks)
        counted = counting.needs(chunk, p)
        assert model.foreign_chunks(p) == pytest.approx(counted["chunks"], rel=0.05)
        assert model.foreign_pairs(p) == pytest.approx(counted["queries"], rel=0.05)


def test_operations_are_those_of_the_operator():
    p = Problem(4096, 1, heads=4, kv_heads=2, head_dim=8, retrieval_dim=8, chunk_size=16, top_k=4)
    with FlopCounterMode(display=False) as counter:
        resona_ext.retrieve_attend(**counting.inputs(p, "random"), chunk_size=16, top_k=4)
    assert sum(model.flops(p).values()) == counter.get_total_flops()


def test_the_record_bears_the_model_out():
    rows = json.loads(RECORD.read_text())["rows"]
    parity = {name: row for name, row in rows.items() if name.startswith("parity/")}
    assert {name.rpartition("/W")[2] for name in parity} == {"1", "2", "4"}
    for name, row in parity.items():
        assert row["indices_equal"] and max(row["out_error"], row["gradient_error"]) < 1e-6, name
        for counted in ("collectives", "forward_bytes", "backward_bytes"):
            assert row[counted] == row[f"{counted}_by_model"], name
    for name, row in rows.items():
        if name.startswith("needs/"):
            for counted in ("chunks", "queries"):
                assert row[f"{counted}_by_model"] == pytest.approx(row[counted], rel=0.03), name


def test_the_picture_and_its_table(tmp_path):
    record = json.loads(RECORD.read_text())
    rows = plot.table(record["constants"])
    for name, row in rows.items():
        best, expected = row.pop("best"), dict(record["rows"][name])
        assert expected.pop("best") == best and row == pytest.approx(expected, rel=1e-6), name
    plot.draw(record["constants"], tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")
