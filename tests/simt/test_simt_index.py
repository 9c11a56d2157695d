"""The inverted index in the simulator against a stable sort in numpy."""

import harness
import numpy as np
import planted
import pytest
import sanitized
from cases import Case, index_workspace
from harness import SCHEDULES

ANY = SCHEDULES[0]
PASSES = [1, 3, 11]  # bits of a digit of the sort
QUICK = 0


def index_case(
    indices,
    context,
    chunk_size,
    lengths=None,
    rows_per_query=1,
    tile_rows=4,
    digit_bits=QUICK,
    before=0,
    behind=0,
    wants_positions=True,
    given_counts=False,
    sms=3,
    name="",
) -> Case:
    """indices [B, T, R, k] with anything in them; `before` and `behind` queries belong to other ranges."""
    batch, queries, heads, top_k = indices.shape
    chunks = context // chunk_size
    row = np.arange(before, before + queries)
    position = row + context - before - queries - behind
    first, own = np.zeros(queries, np.int64), np.full(queries, chunks)
    inputs = {"indices": indices}
    if lengths is not None:
        borders = np.cumsum([0, *lengths])
        chunk_begin = np.cumsum([0, *(n // chunk_size for n in lengths)])
        sequence = np.searchsorted(borders, row, side="right") - 1
        first = chunk_begin[sequence]
        position, own = row - borders[sequence], chunk_begin[sequence + 1] - first
        inputs |= {
            "cu_seqlens": borders.astype(np.int32),
            "chunk_begin": chunk_begin.astype(np.int32),
        }
    eligible = np.minimum(position // chunk_size, own)[None, :, None, None]
    used = (indices >= 0) & (indices < eligible)
    group = np.arange(batch)[:, None, None, None] * heads + np.arange(heads)[None, None, :, None]
    count, unused_key = indices.size, batch * heads * chunks
    keys = np.where(used, group * chunks + first[None, :, None, None] + indices, unused_key).ravel()

    order = np.argsort(keys, kind="stable")
    place = np.empty(count, np.int64)
    place[order] = np.arange(count)
    order = order[: used.sum()]
    offsets = np.searchsorted(keys[order], np.arange(unused_key + 1))
    tiles = -(-np.diff(offsets) * rows_per_query // tile_rows)
    items = [(key, tile) for key in range(unused_key) for tile in range(tiles[key])]
    expected = {
        "sorted_slots": order.astype(np.uint32),
        "offsets": offsets.astype(np.uint32),
        "items": np.array(items, np.int64).reshape(-1, 2),
    }
    if wants_positions:
        expected["list"] = (order // (heads * top_k)).astype(np.uint32)
        expected["position"] = np.where(used.ravel(), place, -1).astype(np.int32)
    if given_counts:
        inputs["tile_counts"] = tile_counts(keys.reshape(indices.shape), chunks)
    workspace = index_workspace(count, unused_key)
    return Case(
        name=f"index {name} {indices.shape} L={context} S={chunk_size} bits={digit_bits}",
        kernel="index",
        inputs=inputs,
        expected=expected,
        workspace={"workspace": workspace},
        scalars={
            **{"batch": batch, "queries": queries, "heads": heads, "top_k": top_k},
            **{"context": context, "chunk_size": chunk_size, "sequences": len(lengths or [])},
            **{"queries_before": before, "queries_behind": behind, "sms": sms},
            **{"rows_per_query": rows_per_query, "tile_rows": tile_rows, "digit_bits": digit_bits},
            **{"quick": int(digit_bits == QUICK), "workspace_bytes": workspace.size},
        },
    )


def tile_counts(keys, chunks) -> np.ndarray:
    """Per tile of 128 queries of a batch entry and head, how many slots name each chunk."""
    batch, queries, heads, _ = keys.shape
    counts = np.zeros((batch, heads, -(-queries // 128), -(-chunks // 8) * 8), np.uint16)
    for b, r, t in np.ndindex(counts.shape[:3]):
        of_tile = keys[b, 128 * t : 128 * (t + 1), r].ravel() - (b * heads + r) * chunks
        row = np.bincount(
            of_tile[keys[b, 128 * t : 128 * (t + 1), r].ravel() < batch * heads * chunks]
        )
        counts[b, r, t, : row.size] = row
    return counts


def random_indices(batch, queries, heads, top_k, most, seed=3):
    """Some used, some not eligible, some -1, some nonsense; repeats are common."""
    rng = np.random.default_rng(seed)
    indices = rng.integers(-1, most, (batch, queries, heads, top_k), dtype=np.int32)
    return np.where(rng.random(indices.shape) < 0.02, np.int32(2**31 - 1), indices)


@pytest.mark.parametrize("digit_bits", [QUICK, *PASSES])
@pytest.mark.parametrize(
    "batch, queries, context, heads, top_k, chunk_size",
    [
        (1, 1, 1, 1, 1, 1),
        (1, 7, 9, 1, 3, 20),  # no chunk at all
        (2, 40, 61, 2, 3, 4),
        (1, 600, 600, 1, 8, 16),  # two tiles of the sort, five of queries
        (1, 90, 300, 3, 5, 1),
        (3, 130, 131, 2, 33, 7),  # a warp's 32 slots lie within a query
        (1, 0, 40, 2, 3, 4),
        (0, 40, 40, 2, 3, 4),
    ],
)
def test_equals_a_stable_sort(plain, batch, queries, context, heads, top_k, chunk_size, digit_bits):
    indices = random_indices(batch, queries, heads, top_k, context // chunk_size + 2)
    index_case(indices, context, chunk_size, digit_bits=digit_bits).check(plain, ANY)


every_path = pytest.mark.parametrize("digit_bits", [QUICK, 11], ids=["quick", "sort"])


@every_path
def test_no_queries_no_reads_of_what_nobody_wrote(race, digit_bits):
    """Gradients of no rows: every list is empty."""
    indices = random_indices(2, 0, 2, 3, 12)
    index_case(indices, 40, 4, digit_bits=digit_bits).check(race, ANY)


def test_many_chunks_take_two_passes(plain):
    indices = random_indices(1, 3000, 1, 2, 3000)
    index_case(indices, 3000, 1, digit_bits=11).check(plain, ANY)


@pytest.mark.parametrize("sms", [1, 7, 1000])
def test_as_many_chunks_as_the_quick_index_takes(plain, sms):
    """And several tiles to a block, or one."""
    for batch, heads, chunks in ((1, 1, 4096), (2, 1, 2041), (2, 3, 680)):
        indices = random_indices(batch, 700, heads, 2, chunks)
        index_case(indices, chunks, 1, sms=sms).check(plain, ANY)


@pytest.mark.parametrize("sms", [1, 4, 1000])
def test_blocks_change_nothing(plain, sms):
    indices = random_indices(2, 1500, 2, 4, 40)
    index_case(indices, 1500, 40, sms=sms).check(plain, ANY)


@every_path
def test_one_chunk_for_all(plain, digit_bits):
    """With every slot repeated, as often as 16-bit counts of a tile allow."""
    indices = np.full((1, 260, 1, 511 if digit_bits == QUICK else 40), 2, np.int32)
    index_case(indices, 300, 9, digit_bits=digit_bits).check(plain, ANY)


@every_path
def test_no_slot_is_used(plain, digit_bits):
    for indices in (np.full((2, 140, 2, 3), -1, np.int32), np.full((2, 140, 2, 3), 9, np.int32)):
        index_case(indices, 140, 16, digit_bits=digit_bits).check(plain, ANY)


@every_path
def test_ranges_of_queries(plain, digit_bits):
    """A range's lists are those of its own queries, whose past is what it is in the whole."""
    for before, behind in ((0, 300), (130, 170), (299, 1), (300, 0)):
        indices = random_indices(1, 200, 2, 3, 140)
        options = {"digit_bits": digit_bits, "before": before, "behind": behind}
        index_case(indices, 560, 4, **options).check(plain, ANY)
        index_case(indices, 500, 4, lengths=[100, 0, 399, 1], **options).check(plain, ANY)


@every_path
@pytest.mark.parametrize("rows_per_query, tile_rows", [(1, 1), (3, 8), (8, 64)])
def test_work_list(plain, rows_per_query, tile_rows, digit_bits):
    """One chunk that everybody wants, and many that nobody does."""
    indices = np.where(np.arange(500) % 7 == 0, 30, 2).astype(np.int32).reshape(1, 500, 1, 1)
    tiles = {"rows_per_query": rows_per_query, "tile_rows": tile_rows}
    index_case(indices, 500, 8, digit_bits=digit_bits, **tiles).check(plain, ANY)


@every_path
def test_packed(plain, digit_bits):
    lengths = [0, 17, 3, 0, 64, 1, 140, 0]
    indices = random_indices(1, 225, 2, 3, 18)
    index_case(indices, 225, 4, lengths, digit_bits=digit_bits).check(plain, ANY)


@every_path
def test_positions_only_for_who_wants_them(race, digit_bits):
    indices = random_indices(1, 225, 2, 3, 18)
    index_case(indices, 225, 4, digit_bits=digit_bits, wants_positions=False).check(race, ANY)


def test_counts_that_are_there_already(race):
    for lengths in (None, [100, 0, 125]):
        indices = random_indices(1, 225, 2, 3, 18)
        index_case(indices, 225, 4, lengths, given_counts=True).check(race, ANY)
    indices = random_indices(2, 225, 2, 3, 18)
    index_case(indices, 225, 4, given_counts=True).check(race, ANY)


@every_path
def test_wrong_cu_seqlens_reach_no_foreign_memory(race, digit_bits):
    for wrong in ([9, 5, 1], [-5, 2**31 - 1, 7], [0, 0, 0]):
        case = index_case(random_indices(1, 40, 1, 3, 12), 40, 4, [20, 20], digit_bits=digit_bits)
        case.inputs["cu_seqlens"] = np.array(wrong, np.int32)
        size = case.expected["position"].size  # as many slots may come to be used
        case.workspace |= case.expected
        case.workspace |= {name: np.empty(size, np.uint32) for name in ("sorted_slots", "list")}
        case.workspace["items"] = np.empty((500, 2), np.int64)
        case.expected = {}
        case.check(race, ANY)


@every_path
def test_no_sequence_at_all(race, digit_bits):
    """cu_seqlens of one entry and tokens nonetheless: no query has a past."""
    case = index_case(random_indices(1, 40, 1, 3, 12), 40, 4, [40], digit_bits=digit_bits)
    case.inputs["cu_seqlens"] = np.zeros(1, np.int32)
    case.inputs["chunk_begin"] = np.zeros(1, np.int32)
    case.scalars["sequences"] = 0
    case.workspace |= {name: array for name, array in case.expected.items() if name != "position"}
    case.expected = {"position": np.full_like(case.expected["position"], -1)}
    case.check(race, ANY)


def covering():
    return [
        index_case(random_indices(1, 530, 2, 4, 9), 536, 64, digit_bits=11, name="two tiles"),
        index_case(random_indices(2, 30, 2, 3, 20), 40, 2, digit_bits=3, name="three passes"),
        index_case(
            random_indices(1, 60, 1, 2, 9), 60, 4, [13, 0, 47], digit_bits=11, name="packed"
        ),
        index_case(random_indices(1, 530, 2, 4, 9), 536, 8, name="quick"),
        index_case(random_indices(2, 300, 1, 3, 20), 340, 2, sms=1, name="quick, one block"),
        index_case(random_indices(1, 160, 1, 2, 9), 160, 4, [113, 0, 47], name="quick, packed"),
    ]


def test_every_schedule(plain, race):
    for case in covering():
        for schedule in SCHEDULES:
            case.check(plain, schedule)
        for schedule in SCHEDULES[::3]:
            case.check(race, schedule)


def test_sanitizers():
    sanitized.check([(case, SCHEDULES[::4]) for case in covering()])


SORT, FEW = "index_sort.cuh", "index_quick.cuh"
DROPPED = {
    "zeros": (
        SORT,
        "__syncwarp();\n  ptx::griddepcontrol_wait();\n  walk",
        "ptx::griddepcontrol_wait();\n  walk",
    ),
    "counts of a warp": (
        SORT,
        "__syncwarp();\n  });\n  __syncthreads();",
        "});\n  __syncthreads();",
    ),
    "counts of all warps": (
        SORT,
        "__syncthreads();\n  for (int d = threadIdx.x; d < digits;",
        "for (int d = threadIdx.x; d < digits;",
    ),
    "begins": (SORT, "__syncthreads();\n  walk_part", "walk_part"),
    "ranks": (SORT, "__syncwarp();  // ranks are taken", "//"),
    "ranks of the next round": (SORT, "__syncwarp();\n  });\n  ptx::", "});\n  ptx::"),
    "quick: eligible chunks": (FEW, "__syncthreads();\n  const int top_k", "const int top_k"),
    "quick: counts": (FEW, "__syncthreads();\n  uint16_t* row", "uint16_t* row"),
    "quick: zeros": (FEW, "__syncthreads();  // zeros", "//"),
    "quick: counted": (
        FEW,
        "ptx::griddepcontrol_wait();\n  for (int i = thread;",
        "for (int i = thread;",
    ),
    "quick: sums": (FEW, "__syncthreads();  // sums", "//"),
    "quick: places": (FEW, "__syncthreads();  // places", "//"),
    "quick: places are taken": (FEW, "__syncwarp();  // places", "//"),
    "quick: places of the next round": (FEW, "__syncwarp();\n      if (row[r]", "if (row[r]"),
}


@pytest.mark.parametrize("header, old, new", DROPPED.values(), ids=DROPPED)
def test_race_build_notices_a_dropped_line(header, old, new):
    sim = harness.mutant("race", "launches.cpp", header, old, new)
    case = covering()[0 if header == SORT else 3]
    with planted.reported(sim):
        for schedule in SCHEDULES[::3]:
            case.check(sim, schedule)
