"""Sharded sequences in several processes: the same indices as in one, the same numbers to rounding."""

import time

import pytest
from processes import TIMEOUT, run
from sharded_cases import (
    MISTAKES,
    check_all,
    count_bytes,
    lose_a_rank,
    make_all_mistakes,
    order_of_events,
)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_agree_with_one_process(ranks, tmp_path):
    for result in run(ranks, check_all, folder=tmp_path):
        assert result == ("returned", {}), result


def test_a_mistake_is_an_error_on_every_rank(tmp_path):
    results = run(2, make_all_mistakes, folder=tmp_path)
    assert all(kind == "returned" for kind, *_ in results), results
    texts = [value for _, value, *_ in results]
    for name, (_, expected) in MISTAKES.items():
        of_ranks = [text[name] for text in texts]
        assert any(expected in text for text in of_ranks), (name, of_ranks)
        assert all(text.startswith("resona") for text in of_ranks), (name, of_ranks)


def test_the_plan_counts_the_bytes_that_move(tmp_path):
    for kind, totals, *_ in run(2, count_bytes, folder=tmp_path):
        assert kind == "returned", totals
        foreseen, moved = totals["chunks"]
        assert foreseen == moved > 0
        foreseen, moved = totals["queries"]
        assert (
            0 < moved < foreseen
        )  # the plan also counts the numbers of chunks, which have no gradient


def test_the_part_at_home_is_computed_while_rows_are_under_way(tmp_path):
    trip = ["leave", "home", "wait"]
    there, back = ["leave", "wait"], ["leave", "leave", "home", "wait", "wait"]
    for kind, events, *_ in run(2, order_of_events, folder=tmp_path):
        assert kind == "returned", events
        assert events["chunks"] == [*trip, "backward", *trip]
        # Queries go, are answered, and outputs and log-sum-exps come back; then the same in reverse.
        assert events["queries"] == [*there, *back, "backward", *back, *there]


def test_a_lost_rank_is_an_error_and_no_hang(tmp_path):
    begin = time.monotonic()
    results = run(2, lose_a_rank, folder=tmp_path)
    assert results[0][1].startswith("error: "), results
    assert time.monotonic() - begin < TIMEOUT.total_seconds() + 60
