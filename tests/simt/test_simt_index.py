"""The inverted index in the simulator against a stable sort in numpy."""

import harness
import numpy as np
import pytest
import sanitized
from cases import Case
from harness import SCHEDULES

ANY = SCHEDULES[0]
TILE, SCAN_TILE = 4096, 2048  # slots of a block, entries of a block of the scan


def index_case(
    indices,
    context,
    chunk_size,
    lengths=None,
    rows_per_query=1,
    tile_rows=4,
    digit_bits=11,
    name="",
) -> Case:
    """indices [B, T, R, k] with anything in them."""
    batch, queries, heads, top_k = indices.shape
    chunks = context // chunk_size
    row = np.arange(queries)
    begin, position = np.zeros(queries, np.int64), row + context - queries
    first, own = np.zeros(queries, np.int64), np.full(queries, chunks)
    inputs = {"indices": indices}
    if lengths is not None:
        borders = np.cumsum([0, *lengths])
        chunk_begin = np.cumsum([0, *(n // chunk_size for n in lengths)])
        sequence = np.searchsorted(borders, row, side="right") - 1
        begin, first = borders[sequence], chunk_begin[sequence]
        position, own = row - begin, chunk_begin[sequence + 1] - first
        inputs |= {
            "cu_seqlens": borders.astype(np.int32),
            "chunk_begin": chunk_begin.astype(np.int32),
        }
    eligible = np.minimum(position // chunk_size, own)[None, :, None, None]
    used = (indices >= 0) & (indices < eligible)
    group = np.arange(batch)[:, None, None, None] * heads + np.arange(heads)[None, None, :, None]
    unused_key = batch * heads * chunks
    keys = np.where(used, group * chunks + first[None, :, None, None] + indices, unused_key).ravel()

    order = np.argsort(keys, kind="stable")
    place = np.empty(keys.size, np.int64)
    place[order] = np.arange(keys.size)
    offsets = np.searchsorted(keys[order], np.arange(unused_key + 1))
    rows = np.diff(offsets) * rows_per_query
    tiles = -(-rows // tile_rows)
    items = [(key, tile) for key in range(unused_key) for tile in range(tiles[key])]

    digits = 1 << min(digit_bits, max(1, int(unused_key).bit_length()))
    counts = digits * -(-keys.size // TILE)
    size = np.empty
    return Case(
        name=f"index {name} {indices.shape} L={context} S={chunk_size} bits={digit_bits}",
        kernel="index",
        inputs=inputs,
        expected={
            "list": (order // (heads * top_k)).astype(np.uint32),
            "position": np.where(used.ravel(), place, -1).astype(np.int32),
            "offsets": offsets.astype(np.uint32),
            "items": np.array(items, np.int64).reshape(-1, 2),
        },
        workspace={
            **{
                f"{name}_{i}": size(keys.size, np.uint32)
                for name in ("keys", "slots")
                for i in (0, 1)
            },
            "counts": size(counts, np.uint32),
            "totals": size(-(-counts // SCAN_TILE), np.uint32),
            "tile_begin": size(unused_key + 1, np.uint32),
            "tile_totals": size(-(-(unused_key + 1) // SCAN_TILE), np.uint32),
        },
        scalars={
            **{"batch": batch, "queries": queries, "heads": heads, "top_k": top_k},
            **{"context": context, "chunk_size": chunk_size, "sequences": len(lengths or [])},
            **{"rows_per_query": rows_per_query, "tile_rows": tile_rows, "digit_bits": digit_bits},
        },
    )


def random_indices(batch, queries, heads, top_k, most, seed=3):
    """Some used, some not eligible, some -1, some nonsense; repeats are common."""
    rng = np.random.default_rng(seed)
    indices = rng.integers(-1, most, (batch, queries, heads, top_k), dtype=np.int32)
    return np.where(rng.random(indices.shape) < 0.02, np.int32(2**31 - 1), indices)


@pytest.mark.parametrize("digit_bits", [1, 3, 11])
@pytest.mark.parametrize(
    "batch, queries, context, heads, top_k, chunk_size",
    [
        (1, 1, 1, 1, 1, 1),
        (1, 7, 9, 1, 3, 20),  # no chunk at all
        (2, 40, 61, 2, 3, 4),
        (1, 600, 600, 1, 8, 16),  # two tiles
        (1, 90, 300, 3, 5, 1),
    ],
)
def test_equals_a_stable_sort(plain, batch, queries, context, heads, top_k, chunk_size, digit_bits):
    indices = random_indices(batch, queries, heads, top_k, context // chunk_size + 2)
    index_case(indices, context, chunk_size, digit_bits=digit_bits).check(plain, ANY)


def test_many_chunks_take_two_passes(plain):
    indices = random_indices(1, 3000, 1, 2, 3000)
    index_case(indices, 3000, 1).check(plain, ANY)


@pytest.mark.parametrize("rows_per_query, tile_rows", [(1, 1), (3, 8), (8, 64)])
def test_work_list(plain, rows_per_query, tile_rows):
    """One chunk that everybody wants, and many that nobody does."""
    indices = np.where(np.arange(500) % 7 == 0, 30, 2).astype(np.int32).reshape(1, 500, 1, 1)
    case = index_case(indices, 500, 8, rows_per_query=rows_per_query, tile_rows=tile_rows)
    case.check(plain, ANY)


def test_packed(plain):
    lengths = [0, 17, 3, 0, 64, 1, 40, 0]
    index_case(random_indices(1, 125, 2, 3, 18), 125, 4, lengths).check(plain, ANY)


def test_wrong_cu_seqlens_reach_no_foreign_memory(race):
    for wrong in ([9, 5, 1], [-5, 2**31 - 1, 7], [0, 0, 0]):
        case = index_case(random_indices(1, 40, 1, 3, 12), 40, 4, [20, 20])
        case.inputs["cu_seqlens"] = np.array(wrong, np.int32)
        case.workspace |= case.expected
        case.workspace["items"] = np.empty((500, 2), np.int64)
        case.expected = {}
        case.check(race, ANY)


def test_no_sequence_at_all(race):
    """cu_seqlens of one entry and tokens nonetheless: no query has a past."""
    case = index_case(random_indices(1, 40, 1, 3, 12), 40, 4, [40])
    case.inputs["cu_seqlens"] = np.zeros(1, np.int32)
    case.inputs["chunk_begin"] = np.zeros(1, np.int32)
    case.scalars["sequences"] = 0
    case.workspace |= {name: array for name, array in case.expected.items() if name != "position"}
    case.workspace["items"] = np.empty((500, 2), np.int64)
    case.expected = {"position": np.full_like(case.expected["position"], -1)}
    case.check(race, ANY)


def covering():
    return [
        index_case(random_indices(1, 530, 2, 4, 9), 536, 64, name="two tiles"),
        index_case(random_indices(2, 30, 2, 3, 20), 40, 2, digit_bits=3, name="three passes"),
        index_case(random_indices(1, 60, 1, 2, 9), 60, 4, [13, 0, 47], name="packed"),
    ]


def test_every_schedule(plain, race):
    for case in covering():
        for schedule in SCHEDULES:
            case.check(plain, schedule)
        for schedule in SCHEDULES[::3]:
            case.check(race, schedule)


def test_sanitizers():
    outcomes = sanitized.run([(case, SCHEDULES[::4]) for case in covering()])
    assert set(outcomes.values()) == {""}, outcomes


DROPPED = {
    "zeros": (
        "__syncwarp();\n  ptx::griddepcontrol_wait();\n  walk",
        "ptx::griddepcontrol_wait();\n  walk",
    ),
    "counts of a warp": ("__syncwarp();\n  });\n  __syncthreads();", "});\n  __syncthreads();"),
    "counts of all warps": (
        "__syncthreads();\n  for (int d = threadIdx.x; d < digits;",
        "for (int d = threadIdx.x; d < digits;",
    ),
    "begins": ("__syncthreads();\n  walk_part", "walk_part"),
    "ranks": ("__syncwarp();  // ranks are taken", "//"),
    "ranks of the next round": ("__syncwarp();\n  });\n  ptx::", "});\n  ptx::"),
}


@pytest.mark.parametrize("old, new", DROPPED.values(), ids=DROPPED)
def test_race_build_notices_a_dropped_line(old, new):
    sim = harness.mutant("race", "index.cpp", "index.cuh", old, new)
    with pytest.raises(sim.Error, match=r"race: |nobody has written"):
        covering()[0].check(sim, ANY)
