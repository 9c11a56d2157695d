"""Problems for the gradients of attention, and the verdict of autograd through the reference."""

from __future__ import annotations

import itertools
import math

import harness
import numpy as np
import torch
from attend_cases import ANY, Attention, aligned, name_of, storage
from cases import Case
from support import assert_no_worse

from resona_ext import reference

GRADIENTS = ("query", "key", "value", "bias", "sink")


def legal(p: Attention) -> torch.Tensor:
    indices = p.tensors["indices"]
    return (indices >= 0) & (indices < p.eligible().view(1, -1, 1, 1))


def arguments(p: Attention) -> dict[str, torch.Tensor]:
    """What the reference may be given: no slot that CUDA ignores, and the bias as it is added."""
    a, used = p.tensors, legal(p)
    bias = a["bias"]
    if bias is not None and a["bias_scale"] is not None:
        bias = bias * a["bias_scale"][:, None]
    return {
        **{name: a[name] for name in ("query", "key", "value", "sink", "cu_seqlens")},
        "indices": torch.where(used, a["indices"], -1),
        "bias": None if bias is None else torch.where(used, bias, 0.0),
    }


def unselected(p: Attention) -> torch.Tensor:
    """Keys that no row reads, [B, L, Hkv]: of chunks in no list, the ragged tails, between sequences."""
    indices, chunk = arguments(p)["indices"], torch.arange(p.chunk_size)
    first = torch.zeros(p.queries, dtype=torch.long)
    if p.lengths is not None:
        first = torch.tensor([begin for begin, n in borders(p.lengths) for _ in range(n)])
    token = first[:, None, None, None] + indices.long()[..., None] * p.chunk_size + chunk
    none = torch.ones(p.batch, p.context + 1, p.retrieval_heads, dtype=torch.bool)
    token = torch.where(indices[..., None] >= 0, token, p.context)
    for b, r in itertools.product(range(p.batch), range(p.retrieval_heads)):
        none[b, token[b, :, r].flatten(), r] = False
    return none[:, :-1].repeat_interleave(p.kv_heads // p.retrieval_heads, dim=2)


def borders(lengths: list[int]) -> list[tuple[int, int]]:
    return list(zip(np.cumsum([0, *lengths[:-1]]).tolist(), lengths, strict=True))


def forward(p: Attention) -> tuple[torch.Tensor, torch.Tensor]:
    a = arguments(p)
    rows = (a["query"], a["key"], a["value"], a["indices"], p.chunk_size)
    return torch.ops.resona.attend(*rows, a["bias"], a["sink"], a["cu_seqlens"], scale=p.scale)


def autograd(p: Attention, dtype, out_gradient, lse_gradient) -> dict[str, torch.Tensor]:
    """Through the reference, in this dtype throughout."""
    a = arguments(p)
    leaves = {}
    for name in GRADIENTS:
        if a[name] is not None:
            of = dtype if name not in ("bias", "sink") or dtype == torch.float64 else torch.float32
            a[name] = leaves[name] = a[name].to(of).detach().clone().requires_grad_()
    rows = (a["query"], a["key"], a["value"], a["indices"], p.chunk_size)
    out, lse = reference.attend(*rows, a["bias"], a["sink"], a["cu_seqlens"], p.scale)
    loss = (out.double() * out_gradient.double()).sum()
    if lse_gradient is not None:
        loss = loss + (torch.where(lse.isfinite(), lse, 0.0).double() * lse_gradient).sum()
    loss.backward()
    return {name: leaf.grad for name, leaf in leaves.items()}


def strides(name: str, x: torch.Tensor) -> dict[str, int]:
    axes = ("batch", "token", "head")
    return {f"{name}_{axis}_stride": x.stride(i) for i, axis in enumerate(axes)}


def plan(scalars, inputs=None) -> list[int]:
    """Bytes of workspace; batch entries, queries and heads of a list at once; keys of a warp."""
    fields = np.zeros(5, np.int64)
    sim = harness.build("plain")
    sim.run("attend_backward_plan", inputs or {}, {"plan": fields}, **scalars)
    return fields.tolist()


class Backward:
    """One problem with its forward results and the gradients that arrive."""

    def __init__(self, p: Attention, lse_gradient=False, sms=1, given=None, **plan):
        """given: out and lse, else those of the CPU operator."""
        self.p = p
        self.out, self.lse = forward(p) if given is None else given
        self.out_gradient = torch.randn(self.out.shape).to(p.dtype)
        self.lse_gradient = torch.randn(self.lse.shape) if lse_gradient else None
        self.scalars = {"sms": sms, **plan}

    def gradients(self) -> dict[str, torch.Tensor]:
        a, p = self.p.tensors, self.p
        shapes = {name: a[name].shape for name in GRADIENTS if a[name] is not None}
        return {
            f"{name}_gradient": torch.empty(
                shape, dtype=torch.float32 if name in ("bias", "sink") else p.dtype
            )
            for name, shape in shapes.items()
        }

    def case(self) -> Case:
        """Expects nothing yet."""
        p, a = self.p, self.p.tensors
        given = {
            **{name: x for name, x in a.items() if x is not None},
            **{"out": self.out, "lse": self.lse, "out_gradient": self.out_gradient},
        }
        if self.lse_gradient is not None:
            given["lse_gradient"] = self.lse_gradient
        gradients = self.gradients()
        tensors = {**given, **gradients}
        names = ("query", "key", "value", "out", "out_gradient")
        names += ("query_gradient", "key_gradient", "value_gradient")
        fields = ("batch", "queries", "context", "chunk_size", "top_k")
        fields += ("heads", "kv_heads", "retrieval_heads", "head_dim")
        scalars = {k: v for name in names for k, v in strides(name, tensors[name]).items()}
        scalars |= {name: getattr(p, name) for name in fields}
        scalars |= {
            "dtype": name_of(p.dtype),
            "vector": int(all(aligned(tensors[name]) for name in names)),
            "scale": repr(p.head_dim**-0.5 if p.scale is None else p.scale),
            "sequences": len(p.lengths or []),
            **self.scalars,
        }
        inputs = {name: storage(x) for name, x in given.items()}
        size, *_ = plan(scalars, inputs)
        shape = " ".join(f"{name}={getattr(p, name)}" for name in fields)
        results = {name: storage(x) for name, x in gradients.items()}
        return Case(
            name=f"attend_backward {name_of(p.dtype)} {shape} {p.lengths or ''} {self.scalars}",
            kernel="attend_backward",
            inputs=inputs,
            expected={},
            workspace={"workspace": np.empty(size, np.uint8), **results},
            scalars=scalars,
            dtypes={name: name_of(p.dtype) for name in names if name in results},
        )

    def run(self, sim, schedule=ANY, **options) -> dict[str, torch.Tensor]:
        got = self.case().check(sim, schedule, **options)
        return {
            name: torch.from_numpy(got[name]).view(x.dtype) for name, x in self.gradients().items()
        }

    def check(self, sim, **options) -> dict[str, torch.Tensor]:
        """Errors that this dtype may be forgiven, and zeros where nothing arrives."""
        got = self.run(sim, **options)
        plain = autograd(self.p, self.p.dtype, self.out_gradient, self.lse_gradient)
        truth = autograd(self.p, torch.float64, self.out_gradient, self.lse_gradient)
        self.judge(got, plain, truth)
        return got

    def judge(self, got, plain, truth) -> None:
        p = self.p
        for name in plain:
            # d logit is the difference of two sums of D products, and may be zero in truth
            rounding = torch.finfo(torch.float32).eps * p.head_dim
            if name == "sink":  # one number per head out of all rows
                rows = p.batch * p.queries * p.heads
                rounding = torch.finfo(p.dtype).eps * math.sqrt(rows)
            here = got[f"{name}_gradient"]
            label = f"{self.case().name}: d {name}"
            assert_no_worse(label, here, plain[name], truth[name], rounding)
            if name in ("key", "value"):
                assert not here[unselected(p)].any(), label
        if "bias_gradient" in got:
            assert not got["bias_gradient"][~legal(p)].any()
