"""decode_step in the simulator, the plan and decode.cu as they are, against the CPU operator. In two levels:
test_simt_decode_two_level.py.

What the search decides and what the cache holds has the very bits; outputs are near by the tolerance rule.
"""

import math
from dataclasses import dataclass, field

import harness
import numpy as np
import pytest
import sanitized
import torch
from attend_cases import ANY, DTYPES, name_of, storage
from cases import Case
from harness import SCHEDULES
from hypothesis import given, settings
from hypothesis import strategies as st
from support import assert_no_worse, embeddings

from resona_ext import reference

ops = torch.ops.resona
NEW = ("query", "key", "value", "query_embedding", "context_embedding")
RESULTS = ("out", "lse", "indices", "scores")


@pytest.fixture(autouse=True)
def one_thread(threads):
    threads(1)  # problems are small: more threads only wait for each other


@dataclass
class Decode:
    """A cache with something in it, and a new token for each of its sequences."""

    dtype: torch.dtype = torch.bfloat16
    embedding_dtype: torch.dtype | None = None
    capacity: int = 40
    lengths: tuple[int, ...] = (29,)
    heads: int = 2
    kv_heads: int = 2
    head_dim: int = 16
    retrieval_heads: int = 1
    retrieval_dim: int = 24
    chunk_size: int = 4
    top_k: int = 3
    history_rows: int = 5
    scored: bool = False
    sink: bool = False
    scale: float | None = None
    contents: str = "random"
    layout: str = "contiguous"  # of the new rows
    superchunk_size: int = 0  # above 0: decode_step_two_level
    probes: int = 1
    # What a cache of this size would not want by itself; 0: as the plan has it.
    range: int = 0
    splits: int = 0
    own_slots: bool = False
    sms: int = 3
    state: dict = field(init=False)
    new: dict = field(init=False)

    def __post_init__(self):
        batch, embedding = len(self.lengths), self.embedding_dtype or self.dtype
        tokens = (batch, self.capacity, self.kv_heads, self.head_dim)
        pooled = embeddings(
            self.contents, batch, self.capacity, self.retrieval_heads, self.retrieval_dim, embedding
        )
        chunks = ops.pool_chunks(pooled, self.chunk_size)
        open_sum = torch.zeros(batch, self.retrieval_heads, self.retrieval_dim)
        for b, length in enumerate(self.lengths):
            chunks[b, max(length, 0) // self.chunk_size :] = math.nan  # nobody may look there
            for t in range(max(length, 0) // self.chunk_size * self.chunk_size, length):
                open_sum[b] += pooled[b, t] if t < self.capacity else 0
        history = (batch, self.history_rows, self.retrieval_heads, self.retrieval_dim)
        self.state = {
            "key_cache": torch.randn(tokens).to(self.dtype),
            "value_cache": torch.randn(tokens).to(self.dtype),
            "chunk_embedding": chunks,
            "open_sum": open_sum,
            "history": torch.randn(history).to(embedding),
            "lengths": torch.tensor(self.lengths, dtype=torch.int32),
        }
        for b, length in enumerate(self.lengths):
            for name in ("key_cache", "value_cache"):
                self.state[name][b, max(length, 0) :] = math.nan
        if self.superchunk_size:
            self.add_superchunks()
        self.pooled = pooled
        self.draw()

    def add_superchunks(self) -> None:
        size, chunks = self.superchunk_size, self.state["chunk_embedding"]
        centroids = ops.pool_chunks(chunks.nan_to_num(), size)
        sums = torch.zeros_like(self.state["open_sum"])
        for b, length in enumerate(self.lengths):
            closed = min(max(length, 0), self.capacity) // self.chunk_size
            centroids[b, closed // size :] = math.nan
            for chunk in range(closed // size * size, closed):
                sums[b] += chunks[b, chunk]
        self.state |= {"superchunk_embedding": centroids, "superchunk_sum": sums}

    def operator(self, *tensors) -> tuple:
        settings = {**self.extras, "scale": self.scale}
        if not self.superchunk_size:
            return ops.decode_step(*tensors, self.chunk_size, self.top_k, **settings)
        sizes = (self.chunk_size, self.top_k, self.superchunk_size)
        return ops.decode_step_two_level(*tensors, *sizes, **settings, probes=self.probes)

    def draw(self, position: int = 0) -> None:
        """New rows; the query is a token of the context, so that repeated contents tie."""
        batch, R, E = len(self.lengths), self.retrieval_heads, self.retrieval_dim
        embedding = self.embedding_dtype or self.dtype
        rows = {
            "query": torch.randn(batch, 1, self.heads, self.head_dim).to(self.dtype),
            "key": torch.randn(batch, 1, self.kv_heads, self.head_dim).to(self.dtype),
            "value": torch.randn(batch, 1, self.kv_heads, self.head_dim).to(self.dtype),
            "query_embedding": torch.randn(batch, 1, R, E).to(embedding),
            "context_embedding": torch.randn(batch, 1, R, E).to(embedding),
        }
        if self.contents != "random":
            at = position % self.capacity
            rows["query_embedding"] = self.pooled[:, at : at + 1].clone()
        if self.layout == "apart":
            rows = {n: torch.cat([x, x[..., :3]], -1)[..., : x.shape[-1]] for n, x in rows.items()}
        self.new = rows
        self.extras = {
            "score_scale": torch.rand(R) + 0.5 if self.scored else None,
            "sink": torch.randn(self.heads) if self.sink else None,
        }

    def expected(self) -> tuple[dict, tuple]:
        """State and results of the CPU operator; sequences without room are its errors, hence left out."""
        state = {name: x.clone() for name, x in self.state.items()}
        room = [b for b, n in enumerate(state["lengths"].tolist()) if 0 <= n < self.capacity]
        batch, slots = len(self.lengths), (1, self.retrieval_heads, self.top_k)
        lse = torch.full((batch, 1, self.heads), -math.inf)
        if self.sink:
            lse[:] = self.extras["sink"]
        results = (
            torch.zeros(batch, 1, self.heads, self.head_dim, dtype=self.dtype),
            lse,
            torch.full((batch, *slots), -1, dtype=torch.int32),
            torch.full((batch, *slots), -math.inf),
        )
        own = {name: x[room].contiguous() for name, x in {**self.new, **state}.items()}
        for name in NEW:
            own[name] = own[name].contiguous()
        found = self.operator(*own.values())
        for name in state:
            state[name][room] = own[name]
        for all_rows, part in zip(results, found, strict=True):
            all_rows[room] = part
        full = state["lengths"] >= self.capacity
        for b in set(range(batch)) - set(room):
            if full[b]:
                state["lengths"][b] = -state["lengths"][b] - 1
        return state, results

    def attended(self, state: dict, dtype: torch.dtype, indices, scores) -> tuple:
        """The attention over what is to be retrieved, in this dtype throughout."""
        bias, sink = None, self.extras["sink"]
        if self.scored:
            bias = scores.masked_fill(indices < 0, 0) * self.extras["score_scale"][:, None]
            bias = bias.double() if dtype == torch.float64 else bias
        tensors = (self.new["query"], state["key_cache"], state["value_cache"])
        rows = [x.nan_to_num().to(dtype) for x in tensors]
        sink = None if sink is None else sink.to(dtype)
        return reference.attend(*rows, indices, self.chunk_size, bias, sink, None, self.scale)

    def case(self) -> Case:
        """Expects nothing yet."""
        inputs = {name: storage(x) for name, x in self.new.items()}
        inputs |= {name: storage(x) for name, x in self.extras.items() if x is not None}
        fields = ("capacity", "heads", "kv_heads", "head_dim", "retrieval_heads", "retrieval_dim")
        fields += ("chunk_size", "top_k", "history_rows", "range", "splits", "own_slots", "sms")
        fields += ("superchunk_size", "probes")
        scalars = {name: int(getattr(self, name)) for name in fields}
        scale = self.head_dim**-0.5 if self.scale is None else self.scale
        scalars |= {
            "batch": len(self.lengths),
            "dtype": name_of(self.dtype),
            "embedding_dtype": name_of(self.embedding_dtype or self.dtype),
            "scale": repr(scale),
        }
        tensors = {**self.new, **self.state}
        for name, x in tensors.items():
            if x.dim() == 4:
                axes = zip(("batch", "token", "head"), x.stride()[:3], strict=True)
                scalars |= {f"{name}_{axis}_stride": stride for axis, stride in axes}
        outputs = {name: storage(x) for name, x in self.state.items()}
        facts = np.zeros(5, np.int64)
        harness.build("plain").run(
            "stage_decode_plan", inputs, {**outputs, "facts": facts}, **scalars
        )
        self.path, self.probes_centroids = facts.tolist()[1:4], bool(facts[4])
        rows = ("chunk_embedding", "superchunk_embedding", "history")
        kinds = dict.fromkeys(rows, name_of(self.embedding_dtype or self.dtype))
        kinds |= {name: name_of(self.dtype) for name in ("key_cache", "value_cache", "out")}
        return Case(
            name=f"decode {self.lengths} {scalars}",
            kernel="stage_decode",
            inputs=inputs,
            expected={},
            outputs=outputs,
            workspace={"workspace": np.empty(int(facts[0]), np.uint8)},
            scalars=scalars,
            dtypes=kinds,
        )

    def step(self, sim, schedule=ANY, times=1) -> Case:
        """Runs one step, checks it, and goes on to the state behind it. The case expects what came out.

        times: so many steps in a row, with the same new token.
        """
        case = self.case()
        case.scalars["times"] = times
        for _ in range(times):
            before, (state, results) = self.state, self.expected()
            self.state = state
        # Of the results only the shapes; their values are compared below.
        arrays = dict(zip(RESULTS, (storage(x.clone()) for x in results), strict=True))
        case.expected = {name: storage(x) for name, x in state.items()}
        case.expected |= {name: arrays[name] for name in ("indices", "scores")}
        case.workspace |= {name: arrays[name] for name in ("out", "lse")}
        got = case.check(sim, schedule)
        for name in ("out", "lse"):
            case.expected[name] = got[name]
            del case.workspace[name]
        if len(self.lengths):
            indices, scores = results[2], results[3]
            plain = self.attended(before, self.dtype, indices, scores)
            truth = self.attended(before, torch.float64, indices, scores)
            ours = torch.from_numpy(got["out"]).view(self.dtype), torch.from_numpy(got["lse"])
            for name, *values in zip(("out", "lse"), ours, plain, truth, strict=True):
                assert_no_worse(f"{case.name}: {name}", *values)
        return case

    def steps(self, sim, count: int) -> None:
        for position in range(count):
            self.step(sim)
            self.draw(position)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("chunk_size", [1, 2, 3, 8, 16, 37])
def test_chunk_sizes_slots_and_groups(plain, dtype, chunk_size):
    """From an empty cache or a filled one, over the border of a chunk, to the end of the capacity."""
    for n, top_k in enumerate([1, 2, 8, 30]):
        group = (1, 2, 4, 12)[(n + chunk_size) % 4]
        capacity = 7 * chunk_size + chunk_size // 2 + 2
        p = Decode(
            dtype,
            capacity=capacity,
            lengths=((0, capacity - 2), (5 * chunk_size - 1,), (chunk_size, 3, 0))[n % 3],
            heads=2 * group,
            head_dim=(16, 40, 64, 128)[n],
            chunk_size=chunk_size,
            top_k=top_k,
            scored=n % 2 == 0,
            sink=n % 3 == 0,
            splits=(0, 3)[n % 2],
        )
        p.steps(plain, 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("dim", [1, 8, 16, 72, 128, 200, 256])
def test_head_dims(plain, dtype, dim):
    """On and off the borders of 16 bytes; 4 and more heads of a group take another kernel in float32."""
    for heads in (2, 10):
        sizes = dict(capacity=160, lengths=(150,), chunk_size=9, top_k=9, splits=2)
        Decode(dtype, heads=heads, head_dim=dim, **sizes).steps(plain, 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("dim", [1, 7, 64, 128, 130, 300])
def test_retrieval_dims(plain, dtype, dim):
    """Rows in slices, and off the borders of 16 bytes."""
    p = Decode(
        dtype, kv_heads=2, retrieval_heads=2, retrieval_dim=dim, capacity=90, lengths=(79, 3)
    )
    p.steps(plain, 2)


def test_which_kernels_these_were():
    """The tables above reach every instance."""
    reached = set()
    for dtype in DTYPES:
        for dim in (16, 40, 64, 72, 128, 200):
            for heads in (2, 10, 24):
                p = Decode(dtype, heads=heads, head_dim=dim)
                p.case()
                reached.add((name_of(dtype), *p.path))
    half = [(1, 64, 8), (1, 128, 8), (1, 128, 16), (1, 256, 8)]
    whole = [(0, 64, 1), (0, 128, 1), (0, 256, 1), (0, 128, 4), (0, 256, 4)]
    assert reached == {("float32", *c) for c in whole} | {
        (name_of(dtype), *c) for dtype in DTYPES[1:] for c in half
    }


@pytest.mark.parametrize("embedding_dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_two_dtypes(plain, dtype, embedding_dtype):
    Decode(dtype, embedding_dtype, lengths=(27, 3), scored=True).steps(plain, 2)


@pytest.mark.parametrize("contents", ["repeated", "permuted", "zipf", "two_letters"])
def test_ties_go_to_the_lower_index(plain, contents):
    for dtype in DTYPES:
        for ranges in (0, 8):
            p = Decode(
                dtype,
                capacity=130,
                lengths=(121, 128),
                chunk_size=2,
                top_k=7,
                contents=contents,
                range=ranges,
            )
            p.steps(plain, 3)


def test_many_steps_from_nothing(plain):
    """A cache is filled token by token; every sequence ends full, and stays as it is."""
    p = Decode(capacity=21, lengths=(0, 0, 13), chunk_size=3, history_rows=4, sink=True)
    p.steps(plain, 21)
    assert p.state["lengths"].tolist() == [21, 21, -22]
    p.steps(plain, 2)
    assert p.state["lengths"].tolist() == [-22, -22, -22]


def test_a_closed_chunk_has_the_bits_of_prefill(plain):
    for dtype in DTYPES:
        p = Decode(dtype, capacity=12, lengths=(0,), chunk_size=4, retrieval_heads=2)
        tokens = []
        for _ in range(12):
            tokens.append(p.new["context_embedding"])
            p.step(plain)
            p.draw()
        pooled = ops.pool_chunks(torch.cat(tokens, dim=1), 4)
        assert torch.equal(p.state["chunk_embedding"], pooled)


def test_more_slots_than_chunks_and_than_shared_memory(plain):
    p = Decode(capacity=700, lengths=(690, 30), chunk_size=1, top_k=600, head_dim=8)
    p.steps(plain, 1)
    Decode(own_slots=True, splits=3, lengths=(29, 5)).steps(plain, 2)
    Decode(capacity=300, lengths=(299,), chunk_size=2, top_k=1000).steps(plain, 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_ranges_of_a_long_cache(plain, dtype):
    """Tiles within ranges, a last range in part, and ranges that a short sequence does not reach."""
    for top_k in (5, 90):
        p = Decode(
            dtype,
            capacity=700,
            lengths=(699, 300, 2),
            chunk_size=1,
            top_k=top_k,
            retrieval_dim=16,
            sms=1,
        )
        p.steps(plain, 1)
        p = Decode(dtype, capacity=300, lengths=(290, 20), chunk_size=1, top_k=top_k, range=17)
        p.steps(plain, 1)


def test_rows_apart(plain):
    for dtype in DTYPES:
        Decode(dtype, layout="apart", lengths=(27, 12), retrieval_heads=2).steps(plain, 2)


def test_nothing_to_do(plain):
    Decode(lengths=()).step(plain)
    Decode(lengths=(3, 0), chunk_size=50).steps(plain, 2)  # not one chunk
    Decode(history_rows=0).steps(plain, 2)


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_queries_and_chunks_that_are_not_numbers(plain, value):
    for where in ("query", "chunk"):
        p = Decode(capacity=60, lengths=(50, 50), top_k=20, scored=where == "query" and value == 0)
        if where == "query":
            p.new["query_embedding"][0] = value
        else:
            p.state["chunk_embedding"][0, 3] = value
        p.step(plain)


@settings(max_examples=25, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    chunk_size=st.integers(1, 9),
    capacity=st.integers(1, 60),
    lengths=st.lists(st.integers(-3, 60), min_size=1, max_size=3),
    top_k=st.integers(1, 12),
    heads=st.tuples(st.integers(1, 3), st.integers(1, 5), st.booleans()),
    dims=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    history_rows=st.integers(0, 4),
    extras=st.tuples(st.booleans(), st.booleans()),
    cut=st.tuples(st.sampled_from([0, 3, 16]), st.integers(0, 3)),
    schedule=st.sampled_from(SCHEDULES),
)
def test_any_problem(
    plain,
    race,
    dtype,
    chunk_size,
    capacity,
    lengths,
    top_k,
    heads,
    dims,
    history_rows,
    extras,
    cut,
    schedule,
):
    kv_heads, group, several = heads
    p = Decode(
        dtype,
        capacity=capacity,
        lengths=tuple(min(n, capacity) for n in lengths),
        heads=kv_heads * group,
        kv_heads=kv_heads,
        head_dim=dims[0],
        retrieval_heads=kv_heads if several else 1,
        retrieval_dim=dims[1],
        chunk_size=chunk_size,
        top_k=top_k,
        history_rows=history_rows,
        scored=extras[0],
        sink=extras[1],
        range=cut[0],
        splits=cut[1],
    )
    p.step(plain, schedule).check(race, schedule)


def covering() -> list[Decode]:
    """Each kernel: ranges and splits of several blocks, chunks that close, sequences of all kinds."""
    shared = dict(capacity=160, lengths=(149, 160, 8, -3), chunk_size=2, splits=2, sms=1)
    many, few = {**shared, "top_k": 40, "range": 17}, {**shared, "top_k": 12}
    return [
        Decode(torch.bfloat16, heads=6, sink=True, scored=True, contents="two_letters", **many),
        Decode(torch.float16, head_dim=136, retrieval_dim=140, **many),
        Decode(torch.float16, head_dim=5, retrieval_dim=7, retrieval_heads=2, range=20, **few),
        Decode(torch.float32, heads=8, head_dim=36, **many),
        Decode(torch.float32, head_dim=130, own_slots=True, **few),
    ]


def test_same_bits_under_every_schedule_without_races(plain, race):
    """Two steps in a row: the second begins while the first one ends."""
    for p in covering():
        case = p.step(plain, times=2)
        for schedule in SCHEDULES[::4]:
            case.check(race, schedule)
        for schedule in SCHEDULES[1::4]:
            case.check(plain, schedule)


def test_sanitizers(plain):
    cases = [p.step(plain) for p in covering()]
    sanitized.check([(case, SCHEDULES[::7]) for case in cases])


SEARCH, ATTEND, SELECT = "decode_search.cuh", "decode_attend.cuh", "decode_select.cuh"
SCORE = "decode_score.cuh"
ORDER = r"race: |nobody has written|without griddepcontrol_wait|in flight"
CHANGED = {
    "the search waits for the step before": (SEARCH, "ptx::griddepcontrol_wait();", ""),
    "rows have landed": (SCORE, "  ptx::cp_async_wait_all();\n", ""),
    "keys are written": (SCORE, "__syncthreads();  // all keys", "//"),
    "tickets are zeroed": (SEARCH, "* p.tickets_per_batch + i] = 0", "* p.tickets_per_batch + i]"),
    "both rounds": (SELECT, "storage.largest[slot % 2]", "storage.largest[0]"),
    "attention waits for the search": (ATTEND, "ptx::griddepcontrol_wait();", ""),
    "partials are published": (ATTEND, "atom_add_acq_rel_gpu", "atom_add_relaxed_gpu"),
    "lengths as they were": (ATTEND, "= p.positions[batch];", "= p.lengths[batch];"),
}


@pytest.mark.parametrize("change", CHANGED.values(), ids=CHANGED)
def test_race_build_notices_a_mistake(plain, change):
    sim = harness.mutant("race", "stage_decode.cpp", *change)
    cases = [p.step(plain, times=2) for p in covering()]
    with pytest.raises(sim.Error, match=ORDER):
        for schedule in SCHEDULES[::7]:
            for case in cases:
                case.check(sim, schedule)


WRONG = {
    "the sum of the open chunk": ("decode_append.cuh", "sum[e] = 0;", ";"),
    "partials of all splits": (ATTEND, "s = team; s < splits", "s = team + kTeams; s < splits"),
}


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG)
def test_wrong_numbers_are_noticed(plain, change):
    sim = harness.mutant("plain", "stage_decode.cpp", *change)
    with pytest.raises(AssertionError, match="elements of"):
        for p in covering():
            p.step(plain).check(sim, ANY)
