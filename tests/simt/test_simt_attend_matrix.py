"""Attention and its gradients in whole stages: every dtype, chunk size, k and group, ragged and packed.

The plans choose the paths; what comes out of the forward stage goes into the backward one. Contexts are
small, and the reference sees only rows that have a past, so that the whole product is a few minutes.
"""

import itertools
from dataclasses import dataclass

import pytest
import torch
from attend_cases import DTYPES, PATHS, Attention, name_of, planned
from attend_gradients import Backward, arguments, borders, plan
from harness import SCHEDULES
from support import assert_no_worse

from resona_ext import reference

SIZES = [1, 2, 3, 5, 8, 16, 37, 64, 128]
TOP_K = [1, 2, 4, 8, 16]
GROUPS = [1, 2, 8]
DIMS = [16, 40, 64, 24]
PROBLEMS = list(itertools.product(DTYPES, SIZES, TOP_K, GROUPS, ["ragged", "packed"]))


def problem(dtype, chunk_size, top_k, group, kind) -> Attention:
    """What the matrix leaves open changes from one problem to the next."""
    at = DTYPES.index(dtype) + SIZES.index(chunk_size) + TOP_K.index(top_k) + GROUPS.index(group)
    large = top_k * chunk_size > 256
    kv_heads = 1 if large else 1 + at % 2
    shape = {
        **{"dtype": dtype, "chunk_size": chunk_size, "top_k": top_k},
        **{
            "heads": group * kv_heads,
            "kv_heads": kv_heads,
            "head_dim": DIMS[at % (2 if large else 4)],
        },
        **{"retrieval_heads": 1 + (at // 2) % 2 if kv_heads == 2 else 1, "sink": at % 3 == 0},
        "distinct": at % 4 != 3,
    }
    if kind == "packed":
        past = (5, 11, 40)[at % 3]
        return Attention(lengths=[chunk_size + past, 0, 2, 2 * chunk_size + 3], **shape)
    queries = (9, 20, 70)[at % 3] if not large else (9, 20)[at % 2]
    context = max(queries, (2, 3, 5)[at % 3] * chunk_size + min(chunk_size - 1, 7))
    return Attention(
        queries=queries, context=context, batch=1 if large else 1 + at // 3 % 2, **shape
    )


# ---- the reference, for rows that have a past


@dataclass
class Rows:
    """Queries [begin, end) and the tokens [first, last) of their sequence."""

    begin: int
    end: int
    first: int
    last: int


def sequences(p: Attention) -> list[Rows]:
    if p.lengths is not None:
        return [Rows(begin, begin + n, begin, begin + n) for begin, n in borders(p.lengths)]
    return [Rows(0, p.queries, 0, p.context)]


def attend_rows(p: Attention, a: dict, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
    """out and lse of a sequence. Its first rows have nothing to attend to, and need no gathering."""
    count, tokens = rows.end - rows.begin, rows.last - rows.first
    idle = min(count, max(0, p.chunk_size - (tokens - count)))
    sink = a["sink"]
    query = a["query"][:, rows.begin : rows.end]
    empty = query.new_full((p.batch, idle, p.heads), -torch.inf, dtype=a["score_dtype"])
    if sink is not None:
        empty = sink.to(empty.dtype).expand_as(empty)
    key, value = (a[name][:, rows.first : rows.last] for name in ("key", "value"))
    indices = a["indices"][:, rows.begin + idle : rows.end]
    out, lse = reference.attend(
        query[:, idle:], key, value, indices, p.chunk_size, None, sink, None, p.scale
    )
    nothing = query[:, :idle] * 0
    return torch.cat([nothing, out], dim=1), torch.cat([empty, lse.to(empty.dtype)], dim=1)


def through_the_reference(p: Attention, dtype, out_gradient, lse_gradient):
    """out, lse and the gradients, in this dtype throughout."""
    a = arguments(p)
    a["score_dtype"] = torch.float64 if dtype == torch.float64 else torch.float32
    leaves = {}
    for name in ("query", "key", "value", "sink"):
        if a[name] is not None:
            of = a["score_dtype"] if name == "sink" else dtype
            a[name] = leaves[name] = a[name].to(of).detach().clone().requires_grad_()
    parts = [attend_rows(p, a, rows) for rows in sequences(p)]
    out, lse = (torch.cat(pieces, dim=1) for pieces in zip(*parts, strict=True))
    loss = (out.double() * out_gradient.double()).sum()
    if lse_gradient is not None:
        loss = loss + (torch.where(lse.isfinite(), lse, 0.0).double() * lse_gradient).sum()
    loss.backward()
    return out.detach(), lse.detach(), {name: leaf.grad for name, leaf in leaves.items()}


# ---- the matrix


def run_forward(p: Attention, sim, again):
    case, _ = planned(p)
    out, lse = p.run(sim, case)
    if again is not None:
        case.check(sim, again)
    return case.name, out, lse


@pytest.mark.parametrize("kind", ["ragged", "packed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("chunk_size", SIZES)
def test_forward_and_backward(plain, threads, dtype, chunk_size, kind):
    threads(1)  # the tensors are too small to share
    for number, (top_k, group) in enumerate(itertools.product(TOP_K, GROUPS)):
        p = problem(dtype, chunk_size, top_k, group, kind)
        again = SCHEDULES[1 + (number + chunk_size) % 19] if number % 5 == chunk_size % 5 else None
        name, out, lse = run_forward(p, plain, again)

        backward = Backward(p, lse_gradient=number % 2 == 0, given=(out, lse))
        got = backward.run(plain)
        if again is not None:
            same = backward.run(plain, again)
            assert all(torch.equal(got[x], same[x]) for x in got), name

        rule = [
            through_the_reference(p, of, backward.out_gradient, backward.lse_gradient)
            for of in (dtype, torch.float64)
        ]
        for what, result, i in (("out", out, 0), ("lse", lse, 1)):
            assert_no_worse(f"{name}: {what}", result, rule[0][i], rule[1][i])
        backward.judge(got, rule[0][2], rule[1][2])


def test_all_paths_are_taken(plain):
    """By each dtype that has them, ragged and packed, forward and backward."""
    taken = {}
    for of in PROBLEMS:
        p = problem(*of)
        paths = taken.setdefault((of[0], of[-1]), set())
        *_, lane_keys = plan(Backward(p, given=p.nothing()).case().scalars)
        paths |= {planned(p)[1], "backward lanes" if lane_keys else "backward tiles"}
    for (dtype, kind), paths in taken.items():
        forward = PATHS if dtype.itemsize == 2 else ["query", "chunk"]
        assert paths == {*forward, "backward lanes", "backward tiles"}, (dtype, kind)
