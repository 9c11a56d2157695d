"""Problems for the attention kernels, and the reference's verdict on what came out."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import harness
import numpy as np
import torch
from cases import Case
from harness import SCHEDULES
from support import assert_no_worse
from torch import Tensor

from resona_ext import reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ANY = SCHEDULES[0]
PATHS = ["query", "query_mma", "dense", "chunk"]  # of common/plan_attend_cuda.h


def name_of(value) -> str:
    return str(value).removeprefix("torch.")


def storage(x: Tensor) -> np.ndarray:
    """The same memory, strides included; numpy has no bfloat16."""
    return (x if x.dtype in (torch.float32, torch.int32) else x.view(torch.int16)).numpy()


def aligned(x: Tensor) -> bool:
    """Rows of whole 16-byte pieces on 16-byte borders."""
    rows = (*x.stride()[:-1], x.shape[-1])
    return x.data_ptr() % 16 == 0 and all(n * x.element_size() % 16 == 0 for n in rows)


@dataclass
class Attention:
    """Arguments of `attend`, random. Slots hold eligible chunks in any order, repeated or -1."""

    dtype: torch.dtype = torch.bfloat16
    batch: int = 1
    queries: int = 12
    context: int = 40
    heads: int = 2
    kv_heads: int = 2
    head_dim: int = 16
    retrieval_heads: int = 1
    chunk_size: int = 4
    top_k: int = 3
    lengths: list[int] | None = None  # of packed sequences; sets batch, queries and context
    bias: bool = False
    bias_scale: bool = False
    sink: bool = False
    scale: float | None = None
    distinct: bool = False  # no chunk twice in a row of slots, as retrieve returns them
    tensors: dict = field(init=False)

    def __post_init__(self):
        cu_seqlens = None
        if self.lengths is not None:
            cu_seqlens = torch.tensor([0, *self.lengths]).cumsum(0).int()
            self.batch, self.queries, self.context = 1, sum(self.lengths), sum(self.lengths)
        rows, tokens = (self.batch, self.queries), (self.batch, self.context)
        slots = (*rows, self.retrieval_heads, self.top_k)
        self.tensors = {
            "query": torch.randn(*rows, self.heads, self.head_dim).to(self.dtype),
            "key": torch.randn(*tokens, self.kv_heads, self.head_dim).to(self.dtype),
            "value": torch.randn(*tokens, self.kv_heads, self.head_dim).to(self.dtype),
            "indices": self._selection(),
            "bias": torch.randn(slots) if self.bias else None,
            "bias_scale": torch.rand(self.retrieval_heads) + 0.5 if self.bias_scale else None,
            "sink": torch.randn(self.heads) if self.sink else None,
            "cu_seqlens": cu_seqlens,
        }

    def eligible(self) -> Tensor:
        """Chunks in the past of each query, [T]."""
        if self.lengths is not None:
            return torch.cat([torch.arange(n) // self.chunk_size for n in self.lengths])
        return (torch.arange(self.queries) + self.context - self.queries) // self.chunk_size

    def _selection(self) -> Tensor:
        shape = (self.batch, self.queries, self.retrieval_heads, self.top_k)
        eligible = self.eligible().view(1, -1, 1, 1)
        if self.distinct:
            most = max(int(eligible.max()) if self.queries else 0, self.top_k)
            order = torch.rand(*shape[:3], most).masked_fill(torch.arange(most) >= eligible, 2)
            order, picked = order.sort(dim=-1)
            picked = picked.masked_fill(order == 2, -1)[..., : self.top_k]
            picked = picked.masked_fill(torch.rand(shape) < 0.1, -1)
        else:
            picked = (torch.rand(shape) * eligible).long()
            picked = picked.masked_fill((eligible == 0) | (torch.rand(shape) < 0.2), -1)
        return picked.int().contiguous()

    @property
    def vector(self) -> bool:
        rows = all(aligned(self.tensors[name]) for name in ("query", "key", "value"))
        return rows and self.head_dim * self.tensors["query"].element_size() % 16 == 0

    def reference(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """In this dtype throughout; slots that CUDA ignores are -1."""
        a = self.tensors
        indices = a["indices"]
        legal = (indices >= 0) & (indices < self.eligible().view(1, -1, 1, 1))
        bias = a["bias"]
        if bias is not None and a["bias_scale"] is not None:
            bias = bias * a["bias_scale"][:, None]
        rows = [a[name].to(dtype) for name in ("query", "key", "value")]
        sink = None if a["sink"] is None else a["sink"].to(dtype)
        if bias is not None:
            bias = torch.where(legal, bias, 0.0)
            bias = bias.double() if dtype == torch.float64 else bias
        indices = torch.where(legal, indices, -1)
        return reference.attend(
            *rows, indices, self.chunk_size, bias, sink, a["cu_seqlens"], self.scale
        )

    def case(self, kernel: str, **choice) -> Case:
        """Expects nothing yet."""
        inputs = {name: storage(x) for name, x in self.tensors.items() if x is not None}
        workspace = {}
        if self.lengths is not None:
            workspace["chunk_begin"] = np.empty(len(self.lengths) + 1, np.int32)
        scale = self.head_dim**-0.5 if self.scale is None else self.scale
        scalars = {
            f"{name}_{axis}_stride": stride
            for name in ("query", "key", "value")
            for axis, stride in zip(
                ("batch", "token", "head"), self.tensors[name].stride(), strict=False
            )
        }
        fields = ("batch", "queries", "context", "chunk_size", "top_k")
        fields += ("heads", "kv_heads", "retrieval_heads", "head_dim")
        scalars |= {name: getattr(self, name) for name in fields}
        scalars |= {"dtype": name_of(self.dtype), "vector": int(self.vector), "scale": repr(scale)}
        scalars |= {"sequences": len(self.lengths or []), **choice}
        shape = " ".join(f"{name}={getattr(self, name)}" for name in fields)
        return Case(
            name=f"{kernel} {name_of(self.dtype)} {shape} {self.lengths or ''} {choice}",
            kernel=kernel,
            inputs=inputs,
            expected={},
            workspace=workspace,
            scalars=scalars,
            dtypes={"out": name_of(self.dtype)},
        )

    def results(self) -> dict[str, np.ndarray]:
        shape = (self.batch, self.queries, self.heads, self.head_dim)
        out = storage(torch.empty(shape, dtype=self.dtype))
        return {"out": out, "lse": np.empty(shape[:-1], np.float32)}

    def nothing(self) -> tuple[Tensor, Tensor]:
        """Results that nobody has computed."""
        results = self.results()
        return torch.from_numpy(results["out"]).view(self.dtype), torch.from_numpy(results["lse"])

    def run(self, sim, case: Case, schedule=ANY, truncated_products=False) -> tuple[Tensor, Tensor]:
        """Runs a case, and makes what comes out what it expects from now on."""
        results, work = self.results(), {k: np.empty_like(v) for k, v in case.workspace.items()}
        sim.run(
            case.kernel,
            case.inputs,
            {},
            {**results, **work},
            schedule,
            truncated_products,
            **case.scalars,
        )
        case.expected = results
        return torch.from_numpy(results["out"]).view(self.dtype), torch.from_numpy(results["lse"])

    def check(self, sim, case: Case, **options) -> Case:
        """The result against the reference: the error that this dtype may be forgiven."""
        got = self.run(sim, case, **options)
        if self.queries and self.batch:
            plain, truth = self.reference(self.dtype), self.reference(torch.float64)
            for name, *results in zip(("out", "lse"), got, plain, truth, strict=True):
                assert_no_worse(f"{case.name}: {name}", *results)
        return case


def poison(p: Attention) -> None:
    """Values that must not matter: wrong indices, and the bias of slots that are not used."""
    indices = p.tensors["indices"]
    wrong = torch.tensor([2**31 - 1, -(2**31), -2, p.context // p.chunk_size, 10**6])
    where = torch.rand(indices.shape) < 0.15
    indices[where] = wrong[torch.randint(len(wrong), (int(where.sum()),))].int()
    late = p.eligible().view(1, -1, 1, 1).expand(indices.shape).int()
    where = torch.rand(indices.shape) < 0.05
    indices[where] = late[where]  # the first chunk that is not wholly in the past
    bias = p.tensors["bias"]
    if bias is not None:
        unused = (indices < 0) | (indices >= late)
        bias[unused] = math.nan
        bias[~unused & (torch.rand(bias.shape) < 0.1)] = -math.inf


def planned(p: Attention, range=0, range_heads=0, sms=2) -> tuple[Case, str]:
    """The whole stage with the workspace that its plan asks for, and the path that the plan takes."""
    ranges = dict(range=range, range_heads=range_heads)
    case = p.case("stage_attend", distinct=int(p.distinct), **ranges, sms=sms)
    case.workspace.pop("chunk_begin", None)
    facts = np.zeros(2, np.int64)
    harness.build("plain").run("stage_attend_plan", case.inputs, {"facts": facts}, **case.scalars)
    if facts[0] > 0:
        case.workspace["workspace"] = np.empty(int(facts[0]), np.uint8)
    return case, PATHS[facts[1]]


def attend_case(p: Attention, path: str, **options) -> Case:
    """A case, once the plan says that it takes this path."""
    case, taken = planned(p, **options)
    assert taken == path
    return case
