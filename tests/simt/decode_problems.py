"""Decode steps for the simulator, in one level and in two, and what the CPU operator makes of them."""

import math
from dataclasses import dataclass, field

import harness
import numpy as np
import pytest
import torch
from attend_cases import ANY, name_of, storage
from cases import Case
from support import assert_no_worse, embeddings

from resona_ext import reference

ops = torch.ops.resona
NEW = ("query", "key", "value", "query_embedding", "context_embedding")
RESULTS = ("out", "lse", "indices", "scores")
ATTEND, SELECT = "decode_attend.cuh", "decode_select.cuh"  # where both have mistakes planted


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
