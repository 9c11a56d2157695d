"""The registry: what can be timed, by whom, and how much work it is.

pool, search, attend   one stage each, through the public operators
fused                  the whole forward; "stages" is the same as three calls
backward               gradients of query, key and value; the forward is outside the timer
decode                 one new token: decode_step appends it to a cache and attends. "no-cache" is the fused
                       operator with T = 1, which pools the context anew for every token.
layer-forward, -train, -decode   a Mamba-2 block with and without Resona

The index and the merge of partial results have no operator of their own: parts.py takes calls apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from resona_ext import attend, pool_chunks, retrieve, retrieve_attend

from . import layer, model, truth
from .baselines import Baseline, Checkouts, Forward
from .data import Case
from .timer import Call

OURS = "resona"  # the contender that ratios refer to


@dataclass
class Contender:
    name: str
    computes: str
    call: Call
    check: Callable[[object], truth.Check]  # of what the call returns
    stages: tuple[model.Work, ...] = ()
    note: str = ""


@dataclass(frozen=True)
class Operator:
    name: str
    ours: Callable[[Case], Iterator[Contender]]
    theirs: Callable[[Case, Baseline, Checkouts], Contender] | None
    missing: Callable[[str], str | None] = lambda device: None  # why it cannot run on a device


class Uncaptured:
    """A call that CUDA graphs cannot record: autograd runs its own threads and streams."""

    capturable = False

    def __init__(self, function: Call):
        self.function = function

    def __call__(self) -> object:
        return self.function()


class DecodeStep:
    """The last token of the context, appended to a cache that holds the others.

    Every call finds the cache as the first one did: the length and the sum of the open chunk, which a
    step changes, are put back inside the timer. Everything else it writes is the same every time.
    """

    def __init__(self, case: Case):
        s = case.shape
        before = s.length - 1
        open_chunk = case.context_embedding[:, before // s.chunk_size * s.chunk_size : before]
        self.open_sum = open_chunk.float().sum(dim=1)
        self.lengths = torch.full((s.batch,), before, dtype=torch.int32, device=case.device)
        self.state = (self.open_sum.clone(), self.lengths.clone())
        key, value, embedding = case.key.clone(), case.value.clone(), case.context_embedding
        token = (case.query, key[:, -1:], value[:, -1:], case.query_embedding, embedding[:, -1:])
        history = embedding.new_empty(s.batch, 0, *embedding.shape[2:])
        cache = (key, value, case.chunk_embedding.clone(), self.state[0], history, self.state[1])
        self.arguments = (*token, *cache, s.chunk_size, s.top_k)

    def __call__(self) -> Tensor:
        self.state[0].copy_(self.open_sum)
        self.state[1].copy_(self.lengths)
        return torch.ops.resona.decode_step(*self.arguments)[0]


def _no_grad(function: Call) -> Call:
    def call() -> object:
        with torch.no_grad():
            return function()

    return call


def _stages(case: Case) -> tuple[model.Work, ...]:
    size = case.dtype.itemsize
    return tuple(f(case.shape, size) for f in (model.pool, model.search, model.attend))


# --- single stages --------------------------------------------------------------------------------


def _pool(case: Case) -> Iterator[Contender]:
    yield Contender(
        OURS,
        "stage",
        _no_grad(lambda: pool_chunks(case.context_embedding, case.shape.chunk_size)),
        lambda out: truth.check_pool(case, out, exact=True),
        _stages(case)[:1],
    )


def _search(case: Case) -> Iterator[Contender]:
    s = case.shape

    def call() -> tuple[Tensor, Tensor]:
        return retrieve(
            case.query_embedding,
            case.chunk_embedding,
            chunk_size=s.chunk_size,
            top_k=s.top_k,
            context_length=s.length,
        )

    yield Contender(
        OURS,
        "stage",
        _no_grad(call),
        lambda out: truth.check_search(case, out, exact=True),
        _stages(case)[1:2],
    )


def _other_stage(case: Case, baseline: Baseline, checkouts: Checkouts) -> Contender:
    check = truth.check_pool if case.operator == "pool" else truth.check_search
    work = _stages(case)[:1] if case.operator == "pool" else _stages(case)[1:2]
    call = _no_grad(baseline.build(case, checkouts))
    return Contender(baseline.name, "stage", call, lambda out: check(case, out, False), work)


# --- attention: forward ---------------------------------------------------------------------------


def _attend_call(case: Case) -> Callable[[], Tensor]:
    return _no_grad(
        lambda: attend(
            case.query, case.key, case.value, case.indices, chunk_size=case.shape.chunk_size
        )
    )


def _fused_call(case: Case) -> Callable[[], Tensor]:
    return _no_grad(lambda: _fused(case, case.query, case.key, case.value))


def _fused(case: Case, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return retrieve_attend(
        query,
        key,
        value,
        case.query_embedding,
        case.context_embedding,
        chunk_size=case.shape.chunk_size,
        top_k=case.shape.top_k,
    )


def _search_and_attend(case: Case, chunk_embedding: Tensor) -> Tensor:
    s = case.shape
    found = retrieve(
        case.query_embedding,
        chunk_embedding,
        chunk_size=s.chunk_size,
        top_k=s.top_k,
        context_length=s.length,
    )
    return attend(case.query, case.key, case.value, found.indices, chunk_size=s.chunk_size)


def _forward(case: Case, name: str, call: Call, computes: str, stages: tuple) -> Contender:
    check = lambda out: truth.check_forward(case, out, computes)  # noqa: E731
    return Contender(name, computes, call, check, stages)


def _attend(case: Case) -> Iterator[Contender]:
    yield _forward(case, OURS, _attend_call(case), "selected", _stages(case)[2:])


def _fused_contenders(case: Case) -> Iterator[Contender]:
    def stages() -> Tensor:
        return _search_and_attend(case, pool_chunks(case.context_embedding, case.shape.chunk_size))

    yield _forward(case, OURS, _fused_call(case), "whole", _stages(case))
    yield _forward(case, "stages", _no_grad(stages), "whole", _stages(case))


def _decode(case: Case) -> Iterator[Contender]:
    yield _forward(case, OURS, _no_grad(DecodeStep(case)), "whole", _stages(case)[1:])
    yield _forward(case, "no-cache", _fused_call(case), "whole", _stages(case))


def _other_forward(case: Case, baseline: Baseline, checkouts: Checkouts) -> Contender:
    forward = baseline.build(case, checkouts)
    inputs = forward.inputs(case)
    call = _no_grad(lambda: forward.function(*inputs))
    stages = {
        "dense": (model.dense(case.shape, case.dtype.itemsize),),
        "selected": _stages(case)[2:],
        "whole": _stages(case),
    }.get(baseline.computes, ())
    contender = _forward(case, baseline.name, call, baseline.computes, stages)
    check = contender.check
    contender.check = lambda out: check(forward.standard(out))
    return contender


# --- attention: backward --------------------------------------------------------------------------


def _backward_call(forward: Forward, case: Case) -> tuple[Call, Callable]:
    """The call, and how its gradients become [B, T, H, D]."""
    leaves = [x.detach().requires_grad_() for x in forward.inputs(case)]
    out = forward.function(*leaves)
    grad_out = forward.standard(case.grad_out)
    if forward.heads_first:
        grad_out = grad_out.contiguous()

    def call() -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, leaves, grad_out, retain_graph=True)

    return Uncaptured(call), lambda gradients: tuple(map(forward.standard, gradients))


def _backward_contender(
    case: Case, name: str, forward: Forward, computes: str, stages: tuple
) -> Contender:
    call, standard = _backward_call(forward, case)

    def check(gradients) -> truth.Check:
        return truth.check_backward(case, standard(gradients), computes)

    return Contender(name, computes, call, check, stages)


def _backward(case: Case) -> Iterator[Contender]:
    forward = Forward(lambda query, key, value: _fused(case, query, key, value))
    work = (model.attend_backward(case.shape, case.dtype.itemsize),)
    yield _backward_contender(case, OURS, forward, "whole", work)


def _other_backward(case: Case, baseline: Baseline, checkouts: Checkouts) -> Contender:
    size = case.dtype.itemsize
    stages = {
        "dense": (model.dense_backward(case.shape, size),),
        "selected": (model.attend_backward(case.shape, size),),
    }.get(baseline.computes, ())
    forward = baseline.build(case, checkouts)
    return _backward_contender(case, baseline.name, forward, baseline.computes, stages)


# --- layer ----------------------------------------------------------------------------------------


def _layer(make: Callable, training: bool = False) -> Callable[[Case], Iterator[Contender]]:
    def contenders(case: Case) -> Iterator[Contender]:
        for name, is_augmented in ((OURS, True), ("plain", False)):
            block = layer.make_block(case, is_augmented)
            call, check = make(block, case)
            call = Uncaptured(call if training else _no_grad(call))
            yield Contender(name, "layer", call, check, note=block.mixer.label)

    return contenders


OPERATORS = {
    operator.name: operator
    for operator in (
        Operator("pool", _pool, _other_stage),
        Operator("search", _search, _other_stage),
        Operator("attend", _attend, _other_forward),
        Operator("fused", _fused_contenders, _other_forward),
        Operator("backward", _backward, _other_backward),
        Operator("decode", _decode, _other_forward),
        Operator("layer-forward", _layer(layer.forward), None, layer.missing),
        Operator("layer-train", _layer(layer.step, training=True), None, layer.missing),
        Operator("layer-decode", _layer(layer.decode), None, layer.missing),
    )
}
