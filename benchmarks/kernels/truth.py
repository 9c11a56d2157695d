"""The check that every contender passes before it is timed.

A few query rows are computed in float64 with resona_ext.reference and compared. Sizes do not matter:
one row needs the chunks of its past and the tokens that it attends to, nothing else.

Error is the largest difference, relative to the largest true value (absolute for scores and unit
vectors). Search: indices of resona must equal the reference exactly; others may break near ties their
own way, so the scores of what they found are compared.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from resona_ext import reference

from .data import Case

ROWS = 12
TOLERANCE = {"float32": 1e-4, "float16": 4e-3, "bfloat16": 3e-2}
DENSE_BLOCK = 8  # last rows and tokens of dense attention whose gradients are checked


@dataclass(frozen=True)
class Check:
    error: float
    tolerance: float
    where: str = ""  # the worst place

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance  # false for NaN

    @property
    def reason(self) -> str:
        return ", ".join(
            filter(None, [f"error {self.error:.2e}, tolerance {self.tolerance:.0e}", self.where])
        )

    def require(self) -> None:
        if not self.passed:
            raise ValueError(self.reason)


def worst_place(got: Tensor, truth: Tensor, name: str = "") -> str:
    """In words: where the two differ most, a NaN before all else."""
    got = got.detach().to(truth.device)
    if got.shape != truth.shape or got.numel() == 0:
        return f"{name}shape {tuple(got.shape)}, expected {tuple(truth.shape)}"
    off = (got.double() - truth.double()).abs()
    flat = int(off.nan_to_num(nan=math.inf).argmax())
    place = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), off.shape))
    return f"{name}worst at {place}: {got[place].item():.6g}, expected {truth[place].item():.6g}"


def relative_error(got: Tensor, truth: Tensor) -> float:
    got = got.detach().to(truth.device).double()
    scale = truth.abs().max().clamp_min(1e-30)
    return float((got - truth).abs().max() / scale)


def sample_rows(case: Case) -> Tensor:
    """Rows that have something eligible, evenly spread, the last one included."""
    s = case.shape
    first = max(0, s.chunk_size - (s.length - s.rows))
    if first >= s.rows:
        raise ValueError(f"no query of {case.id} has an eligible chunk: nothing could be checked")
    return torch.linspace(first, s.rows - 1, ROWS).round().long().unique()


def reference_search(case: Case, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Indices and scores of some rows, [B, n, R, k]."""
    s = case.shape
    chunk = reference.pool_chunks(case.context_embedding, s.chunk_size)
    found = []
    for row in rows.tolist():
        context = row + s.length - s.rows + 1
        query = case.query_embedding[:, row : row + 1]
        past = chunk[:, : context // s.chunk_size]
        found.append(reference.retrieve(query, past, s.chunk_size, s.top_k, context))
    indices, scores = zip(*found, strict=True)
    return torch.cat(indices, dim=1), torch.cat(scores, dim=1)


def selected_rows(query: Tensor, key: Tensor, value: Tensor, indices: Tensor, chunk_size: int):
    return reference.attend(query, key, value, indices, chunk_size)[0]


def dense_rows(query: Tensor, key: Tensor, value: Tensor, positions: Tensor) -> Tensor:
    """Causal attention of rows at the given positions, their own token included."""
    groups = query.shape[2] // key.shape[2]
    key, value = (x.repeat_interleave(groups, dim=2) for x in (key, value))
    logit = torch.einsum("bthd,bnhd->bthn", query, key) * query.shape[-1] ** -0.5
    token = torch.arange(key.shape[1], device=key.device)
    future = token > positions.to(key.device)[:, None]
    weight = logit.masked_fill(future[:, None, :], -torch.inf).softmax(dim=-1)
    return torch.einsum("bthn,bnhd->bthd", weight, value)


def check_pool(case: Case, got: Tensor, exact: bool) -> Check:
    truth = reference.pool_chunks(case.context_embedding, case.shape.chunk_size)
    error = float((got.double() - truth.double()).abs().max())
    return Check(error, 0.0 if exact else TOLERANCE[case.dtype_name], worst_place(got, truth))


def check_search(case: Case, got: tuple[Tensor, Tensor], exact: bool) -> Check:
    s, rows = case.shape, sample_rows(case)
    indices, scores = reference_search(case, rows)
    found, reported = (x[:, rows] for x in got)
    used = indices >= 0
    if exact:
        error = float((reported.double() - scores.double())[used].abs().max())
        if torch.equal(found, indices):
            return Check(error, 0.0, worst_place(reported[used], scores[used], "scores in use "))
        return Check(math.inf, 0.0, _first_other(rows, found, indices))
    if not torch.equal(found >= 0, used):
        return Check(math.inf, 0.0, "slots in use: " + _first_other(rows, found >= 0, used))
    # What the chunks that were found really score, best first, against what the best ones score. A
    # chunk that is not eligible scores something else.
    chunk = reference.pool_chunks(case.context_embedding, s.chunk_size)
    every = reference.similarity(case.query_embedding[:, rows], chunk).transpose(1, 2)
    true = every.gather(-1, found.clamp(min=0).long()).masked_fill(~used, -torch.inf)
    true = true.sort(dim=-1, descending=True).values
    errors = ((true - scores)[used].abs().max(), (reported - scores)[used].abs().max())
    return Check(float(max(errors)), 1e-5)


def _first_other(rows: Tensor, found: Tensor, expected: Tensor) -> str:
    """[B, n, R, k] of some rows: how many entries differ, and the first row that has one."""
    other = found != expected
    batch, n, head, _ = other.nonzero()[0].tolist()
    got, wanted = (x[batch, n, head].tolist() for x in (found, expected))
    place = f"row {int(rows[n])} of sequence {batch}, retrieval head {head}"
    return (
        f"{int(other.sum())} of {other.numel()} differ, first in {place}: {got}, expected {wanted}"
    )


def check_forward(case: Case, out: Tensor, computes: str) -> Check:
    """out [B, T, H, D]."""
    rows = _rows(case, out, computes)
    return Check(relative_error(*rows), TOLERANCE[case.dtype_name], worst_place(*rows))


def _rows(case: Case, out: Tensor, computes: str) -> tuple[Tensor, Tensor]:
    s = case.shape
    key, value = case.key.double(), case.value.double()
    # The first rows of MoBA select every chunk, so there its result is dense attention.
    rows = torch.arange(0, 2 * s.chunk_size, 5) if computes == "moba" else sample_rows(case)
    query = case.query[:, rows].double()
    if computes in ("dense", "moba"):
        return out[:, rows], dense_rows(query, key, value, rows + s.length - s.rows)
    if computes == "whole":
        indices, _ = reference_search(case, rows)
    else:
        indices = case.indices[:, rows]
    return out[:, rows], selected_rows(query, key, value, indices, s.chunk_size)


def check_backward(case: Case, gradients: tuple[Tensor, ...], computes: str) -> Check:
    """Gradients of query, key and value, [B, T or L, H, D], at a place that few rows reach.

    The gradient of a key needs all rows that attend to it. So take the least wanted chunk, and the
    rows that selected it: then both sides are exact. Dense: the last tokens, which only the last
    rows see. Of FlashMoBA only finiteness is known.
    """
    s = case.shape
    if computes == "moba":
        finite = all(bool(g.isfinite().all()) for g in gradients)
        return Check(0.0 if finite else math.inf, 0.0)
    if computes == "dense":
        rows = torch.arange(max(0, s.rows - DENSE_BLOCK), s.rows)
        tokens = slice(max(0, s.length - DENSE_BLOCK), s.length)
    else:
        first = case.indices[0, :, 0]
        counts = first[first >= 0].long().bincount()
        counts[counts == 0] = counts.max() + 1
        chunk = int(counts.argmin())
        rows = (first == chunk).any(dim=1).nonzero().squeeze(1)
        tokens = slice(chunk * s.chunk_size, (chunk + 1) * s.chunk_size)

    leaves = [x[:1].double().requires_grad_() for x in (case.query[:, rows], case.key, case.value)]
    if computes == "dense":
        out = dense_rows(*leaves, rows + s.length - s.rows)
    else:
        out = selected_rows(*leaves, case.indices[:1, rows], s.chunk_size)
    truth = torch.autograd.grad(out, leaves, case.grad_out[:1, rows].double())
    got = (gradients[0][:1, rows], gradients[1][:1, tokens], gradients[2][:1, tokens])
    expected = (truth[0], truth[1][:, tokens], truth[2][:, tokens])
    errors = [relative_error(g, t) for g, t in zip(got, expected, strict=True)]
    worst = int(torch.tensor(errors).nan_to_num(nan=math.inf).argmax())
    place = worst_place(got[worst], expected[worst], ("query ", "key ", "value ")[worst])
    return Check(float(torch.tensor(errors).max()), 2 * TOLERANCE[case.dtype_name], place)
