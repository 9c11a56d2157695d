"""Which rank holds what: every token once, every whole chunk on one rank, whatever the lengths."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from resona_ext.distributed import Layout, Piece, shard, unshard
from resona_ext.distributed.plan import Sizes, bytes_of_chunk, bytes_of_query, plan_exchange

lengths = st.lists(st.integers(0, 40), min_size=1, max_size=5)


@given(lengths, st.integers(1, 5), st.integers(1, 9), st.booleans())
def test_layouts_hold_every_token_and_no_chunk_is_cut(sequences, ranks, chunk_size, balanced):
    borders = [0]
    for length in sequences:
        borders.append(borders[-1] + length)
    make = Layout.balanced if balanced else Layout.contiguous
    layout = make(borders[-1], ranks, chunk_size, borders)
    token = torch.arange(borders[-1]).unsqueeze(0)
    parts = [shard(token, layout, rank) for rank in range(ranks)]
    assert [part.shape[1] for part in parts] == [layout.tokens_of(rank) for rank in range(ranks)]
    assert torch.equal(unshard(parts, layout), token)
    chunk = 0
    for begin, end in itertools.pairwise(borders):
        for first in range(begin, end - chunk_size + 1, chunk_size):
            held = parts[layout.owner[chunk]][0]
            row = int(layout.row[chunk])
            assert held[row : row + chunk_size].tolist() == list(range(first, first + chunk_size))
            chunk += 1
    assert chunk == layout.chunks


@given(st.integers(1, 500), st.integers(1, 8), st.integers(1, 16))
def test_pieces_are_nearly_equal(length, ranks, chunk_size):
    sizes = [Layout.contiguous(length, ranks, chunk_size).tokens_of(r) for r in range(ranks)]
    assert max(sizes) - length / ranks < 2 * chunk_size


def test_balanced_shares_the_search():
    """Chunks to be searched, over all queries of a rank: with one piece the last rank does most."""

    def work(layout):
        pieces = [sum((p.start + p.length / 2) * p.length for p in own) for own in layout.pieces]
        return max(pieces) / min(pieces)

    assert work(Layout.contiguous(4096, 4, 16)) == pytest.approx(7)
    assert work(Layout.balanced(4096, 4, 16)) == pytest.approx(1)


@pytest.mark.parametrize(
    "pieces, message",
    [
        (((Piece(0, 8),), (Piece(9, 7),)), "one that begins at token 8"),
        (((Piece(0, 8),), (Piece(7, 9),)), "one that begins at token 8"),
        (((Piece(0, 6),), (Piece(6, 10),)), "a multiple of 4 tokens"),
        (((Piece(0, 8),), (Piece(8, 4),)), "16 tokens in all, got 12"),
        (((Piece(8, 8), Piece(0, 8)),), "ascending pieces"),
    ],
)
def test_bad_layouts_are_refused(pieces, message):
    with pytest.raises(ValueError, match=message):
        Layout(pieces, 4, (0, 16))


@pytest.mark.parametrize(
    "changes, chunks, rows, exchange",
    [
        ({}, 100, 10_000, "chunks"),
        ({}, 100, 10, "queries"),
        ({"chunk_size": 1}, 100, 100, "chunks"),
        ({"kv_heads": 1}, 1000, 5000, "chunks"),
        ({}, 0, 0, "chunks"),
    ],
)
def test_fewer_bytes_win(changes, chunks, rows, exchange):
    shape = {"heads": 16, "kv_heads": 16, "retrieval_heads": 1, "head_dim": 128, "top_k": 8}
    sizes = Sizes(**(shape | {"chunk_size": 64, "itemsize": 2} | changes))
    plan = plan_exchange(sizes, chunks, rows, "auto")
    assert plan.exchange == exchange
    assert plan.chunk_bytes == chunks * bytes_of_chunk(sizes)
    assert plan.query_bytes == rows * bytes_of_query(sizes)
