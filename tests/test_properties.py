"""Random shapes and contents: what must hold for every legal problem."""

import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from support import CONTENTS, Problem, embeddings, selection

from resona_ext import reference

ops = torch.ops.resona

few = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)


EITHER = st.booleans()


@st.composite
def problems(draw, packed=EITHER, score_scale=EITHER) -> Problem:
    torch.manual_seed(draw(st.integers(0, 2**20)))
    context = draw(st.integers(0, 90))
    retrieval_heads = draw(st.sampled_from([1, 2, 3]))
    kv_heads = retrieval_heads * draw(st.integers(1, 2))
    lengths = draw(st.lists(st.integers(0, 40), max_size=5)) if draw(packed) else None
    p = Problem(
        batch=draw(st.integers(0, 3)),
        queries=draw(st.integers(0, context)),
        context=context,
        heads=kv_heads * draw(st.integers(1, 3)),
        kv_heads=kv_heads,
        head_dim=draw(st.integers(1, 40)),
        retrieval_heads=draw(st.sampled_from([1, retrieval_heads])),
        retrieval_dim=draw(st.integers(1, 40)),
        chunk_size=draw(st.integers(1, 20)),
        top_k=draw(st.integers(1, 12)),
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
        score_scale=draw(score_scale),
        sink=draw(st.booleans()),
        lengths=lengths,
    )
    kind = draw(st.sampled_from(sorted(CONTENTS)))
    shape = (p.batch, p.context, p.retrieval_heads, p.retrieval_dim)
    p.tensors["context_embedding"] = embeddings(kind, *shape, p.dtype)
    if draw(st.booleans()) and p.context:
        own = p.tensors["context_embedding"][:, p.context - p.queries :]
        p.tensors["query_embedding"] = own.clone()
    return p


@few
@given(problems())
def test_selection_is_exact(p):
    _, _, indices, scores = ops.fused_retrieve_attend(**p.arguments())
    a = p.tensors
    chunks = reference.pool_chunks(a["context_embedding"], p.chunk_size, a["cu_seqlens"])
    search = (chunks, p.chunk_size, p.top_k, p.context, a["cu_seqlens"])
    expected = reference.retrieve(a["query_embedding"], *search)
    assert torch.equal(indices, expected[0]) and torch.equal(scores, expected[1])


@few
@given(problems())
def test_selection_is_causal_sorted_and_distinct(p):
    _, _, indices, scores = ops.fused_retrieve_attend(**p.arguments())
    position = torch.arange(p.queries) + p.context - p.queries
    cu_seqlens = p.tensors["cu_seqlens"]
    if cu_seqlens is not None:
        lengths = cu_seqlens.diff()
        position = position - cu_seqlens[:-1].repeat_interleave(lengths)
    eligible = (position // p.chunk_size)[None, :, None, None]
    assert torch.all(indices < eligible) and torch.all(indices >= -1)
    filled = (indices >= 0).sum(dim=-1, keepdim=True)
    assert torch.equal(filled, eligible.clamp_max(p.top_k).expand_as(filled))
    assert torch.all(scores[..., :-1] >= scores[..., 1:])
    used = indices.sort(dim=-1).values
    assert not torch.any((used[..., 1:] == used[..., :-1]) & (used[..., 1:] >= 0))


@few
@given(problems())
def test_output_equals_reference(p):
    out, lse, indices, scores = ops.fused_retrieve_attend(**p.arguments())
    a = {k: v.float() if k in ("query", "key", "value") else v for k, v in p.tensors.items()}
    bias = None
    if a["score_scale"] is not None:
        bias = a["score_scale"][:, None] * torch.where(indices >= 0, scores, 0.0)
    expected, expected_lse = reference.attend(
        a["query"], a["key"], a["value"], indices, p.chunk_size, bias, a["sink"], a["cu_seqlens"]
    )
    # Both sides round in float32: a logit of size 8 moves its weight by 8 eps, on either side.
    tolerance = 4 * torch.finfo(p.dtype).eps + 16 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(out.float(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-4, atol=1e-4)


@few
@given(problems(packed=st.just(False)), st.integers(0, 10**6))
def test_the_future_changes_nothing(p, where):
    """New contents from token t on leave every row before t as it was, bit for bit."""
    assume(p.context > 0)
    first = where % p.context
    row = max(0, first - (p.context - p.queries))
    before = ops.fused_retrieve_attend(**p.arguments())
    changed = {k: p.tensors[k].clone() for k in ("key", "value", "context_embedding")}
    for t in changed.values():
        t[:, first:] = torch.randn_like(t[:, first:].float()).to(t.dtype)
    after = ops.fused_retrieve_attend(**p.arguments(**changed))
    assert all(torch.equal(b[:, :row], a[:, :row]) for b, a in zip(before, after, strict=True))


@few
@given(problems())
def test_key_and_value_gradients_stay_inside_the_selection(p):
    a = p.arguments()
    for name in ("key", "value"):
        a[name] = a[name].clone().requires_grad_()
    ops.fused_retrieve_attend(**a)[0].square().sum().backward()
    borders = [0, p.context] if a["cu_seqlens"] is None else a["cu_seqlens"].tolist()
    first = torch.tensor(borders[:-1]).repeat_interleave(torch.tensor(borders).diff())
    indices = selection(p).long()
    chosen = torch.zeros(p.batch, p.context, dtype=torch.bool)
    for b, t, r, k in (indices >= 0).nonzero().tolist():
        begin = int(first[t + p.context - p.queries]) + int(indices[b, t, r, k]) * p.chunk_size
        chosen[b, begin : begin + p.chunk_size] = True
    for name in ("key", "value"):
        assert torch.count_nonzero(a[name].grad[~chosen]) == 0, name
