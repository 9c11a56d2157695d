"""attend and the fused operator against the reference: values, gradients, edges."""

import math

import pytest
import torch
from support import ALL_DTYPES, Problem, accumulation_dtype, assert_no_worse, name_of, selection

from resona_ext import reference

ops = torch.ops.resona

PROBLEMS = {
    "plain": {},
    "heads": dict(heads=6, kv_heads=6, retrieval_heads=6),
    "one key head": dict(heads=5, kv_heads=1),
    "retrieval heads": dict(heads=8, kv_heads=4, retrieval_heads=2),
    "score scale": dict(score_scale=True),
    "sink": dict(sink=True),
    "everything": dict(heads=8, kv_heads=4, retrieval_heads=2, score_scale=True, sink=True),
    "packed": dict(lengths=[13, 0, 3, 40, 1, 22], score_scale=True, sink=True),
    "chunk of one": dict(chunk_size=1, top_k=5),
    # Chunks of one are attended to query by query, eights chunk by chunk, whatever the dtype on a CPU.
    "everything, ones": dict(
        heads=8, kv_heads=4, retrieval_heads=2, score_scale=True, sink=True, chunk_size=1, top_k=5
    ),
    "everything, eights": dict(
        heads=8, kv_heads=4, retrieval_heads=2, score_scale=True, sink=True, chunk_size=8
    ),
    "packed ones": dict(lengths=[13, 0, 3, 40, 1, 22], score_scale=True, sink=True, chunk_size=1),
    "packed eights": dict(lengths=[13, 0, 3, 40, 1, 22], score_scale=True, sink=True, chunk_size=8),
    "wide pairs": dict(head_dim=203, chunk_size=2),
    "many pairs": dict(batch=3, queries=300, context=310, chunk_size=2, retrieval_heads=2),
    "odd chunk": dict(chunk_size=7, top_k=2, head_dim=33),
    "large chunk": dict(queries=300, context=640, chunk_size=150, top_k=2),
    "chunk beyond context": dict(chunk_size=100),
    "more slots than chunks": dict(top_k=40),
    "wide head": dict(head_dim=256, chunk_size=3),
    "narrow head": dict(head_dim=1),
    "no queries": dict(queries=0),
    "no batch": dict(batch=0),
    "no context": dict(queries=0, context=0),
    "one row": dict(queries=1),
    "several ranges": dict(batch=1, queries=2500, context=2600, chunk_size=16, top_k=2, head_dim=8),
    "mixed dtypes": dict(embedding_dtype=torch.bfloat16, score_scale=True),
}


def run(function, arguments, weights):
    """Outputs and the gradients of a random linear function of out, lse and scores."""
    arguments = dict(arguments)
    leaves = {}
    for name, t in arguments.items():
        if isinstance(t, torch.Tensor) and t.is_floating_point():
            arguments[name] = leaves[name] = t.detach().clone().requires_grad_()
    out, lse, indices, scores = function(**arguments)
    loss = (out.double() * weights["out"]).sum()
    loss = loss + (torch.where(lse.isfinite(), lse, 0.0).double() * weights["lse"]).sum()
    loss = loss + (torch.where(scores.isfinite(), scores, 0.0).double() * weights["scores"]).sum()
    loss.backward()
    gradients = {name: t.grad for name, t in leaves.items()}
    return (out, lse, indices, scores), gradients


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=name_of)
@pytest.mark.parametrize("case", PROBLEMS)
def test_fused_values_and_gradients(case, dtype):
    p = Problem(dtype=dtype, **PROBLEMS[case])
    weights = {
        "out": torch.randn(p.batch, p.queries, p.heads, p.head_dim).double(),
        "lse": torch.randn(p.batch, p.queries, p.heads).double(),
        "scores": torch.randn(p.batch, p.queries, p.retrieval_heads, p.top_k).double(),
    }
    got, grads = run(ops.fused_retrieve_attend, p.arguments(), weights)
    plain, plain_grads = run(reference.fused_retrieve_attend, p.arguments(), weights)
    assert torch.equal(got[2], plain[2]) and torch.equal(got[3], plain[3]), "selection differs"

    # The truth keeps the selection: float64 embeddings could choose otherwise.
    def truth_function(**a):
        return _with_selection(plain[2], **a)

    truth, truth_grads = run(truth_function, p.doubled(), weights)
    for i, name in ((0, "out"), (1, "lse")):
        assert_no_worse(name, got[i], plain[i], truth[i])
    assert got[0].dtype == dtype and got[1].dtype == accumulation_dtype(dtype)
    for name, grad in grads.items():
        assert grad is not None and grad.dtype == p.tensors[name].dtype
        summed = grad.dim() == 1  # sink and score_scale: one number per head out of all rows
        rounding = (
            torch.finfo(dtype).eps * math.sqrt(p.batch * p.queries * p.heads) if summed else 0
        )
        assert_no_worse(f"d {name}", grad, plain_grads[name], truth_grads[name], rounding)


def _with_selection(indices, query, key, value, query_embedding, context_embedding, chunk_size, top_k,
                    score_scale=None, sink=None, cu_seqlens=None):  # fmt: skip
    """The fused operator with given indices: scores of those chunks, then attention."""
    chunks = reference.pool_chunks(context_embedding, chunk_size, cu_seqlens)
    every = reference.similarity(query_embedding, chunks).transpose(1, 2)  # [B, T, R, C]
    at = indices.long().clamp_min(0)
    if cu_seqlens is not None:
        lengths = cu_seqlens.diff() // chunk_size
        first = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])[:-1].repeat_interleave(
            cu_seqlens.diff()
        )
        at = at + first[None, :, None, None]
    every = torch.nn.functional.pad(every, (0, 1))  # something to gather where there is no chunk
    scores = torch.where(indices >= 0, every.gather(-1, at), -math.inf)
    bias = None
    if score_scale is not None:
        bias = score_scale[:, None] * torch.where(indices >= 0, scores, 0.0)
    out, lse = reference.attend(query, key, value, indices, chunk_size, bias, sink, cu_seqlens)
    return out, lse, indices, scores


def test_fused_is_the_composition():
    p = Problem(heads=8, kv_heads=4, retrieval_heads=2, sink=True, score_scale=True)
    a = p.tensors
    out, lse, indices, scores = ops.fused_retrieve_attend(**p.arguments())
    chunks = ops.pool_chunks(a["context_embedding"], p.chunk_size)
    again = ops.retrieve(a["query_embedding"], chunks, p.chunk_size, p.top_k, p.context)
    assert torch.equal(indices, again[0]) and torch.equal(scores, again[1])
    bias = torch.where(indices >= 0, scores, 0.0) * a["score_scale"][:, None]
    composed = ops.attend(a["query"], a["key"], a["value"], indices, p.chunk_size, bias, a["sink"])
    torch.testing.assert_close((out, lse), composed, rtol=1e-6, atol=1e-6)


def attend_both(p, indices, bias=None, **options):
    a = p.tensors
    common = (
        a["query"],
        a["key"],
        a["value"],
        indices,
        p.chunk_size,
        bias,
        a["sink"],
        a["cu_seqlens"],
    )
    got = ops.attend(*common, **options)
    expected = reference.attend(*common, **{k: v for k, v in options.items() if k == "scale"})
    torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-5, equal_nan=True)
    return got


# On a CPU chunks of one are attended to query by query.
either_way = pytest.mark.parametrize("chunk_size", [4, 1])


@either_way
def test_indices_in_any_order_give_the_same_rows(chunk_size):
    p = Problem(chunk_size=chunk_size)
    indices = selection(p)
    out, _ = attend_both(p, indices)
    flipped, _ = attend_both(p, indices.flip(-1))
    torch.testing.assert_close(out, flipped)


@either_way
def test_a_repeated_index_counts_each_time(chunk_size):
    p = Problem(chunk_size=chunk_size, top_k=1, sink=True)
    once = selection(p)
    assert not torch.allclose(attend_both(p, once.repeat(1, 1, 1, 2))[0], attend_both(p, once)[0])
    two = torch.cat([once, once], dim=-1)
    bias = torch.full(two.shape, -math.log(2.0))
    torch.testing.assert_close(attend_both(p, two, bias)[0], attend_both(p, once)[0])


@pytest.mark.parametrize("scale", [None, 0.0, 0.3, -0.5, 20.0])
@either_way
def test_scale(scale, chunk_size):
    p = Problem(chunk_size=chunk_size)
    attend_both(p, selection(p), scale=scale)


@either_way
def test_bias_of_unused_slots_is_ignored_and_minus_infinity_drops_the_chunk(chunk_size):
    p = Problem(chunk_size=chunk_size, top_k=3)
    indices = selection(p)
    bias = torch.randn(indices.shape)
    poisoned = torch.where(indices < 0, math.nan, bias)
    torch.testing.assert_close(attend_both(p, indices, bias), attend_both(p, indices, poisoned))
    dropped = bias.clone()
    dropped[..., 1] = -math.inf
    without = torch.where(torch.arange(3) == 1, -1, indices).int()
    assert all(map(torch.equal, attend_both(p, indices, dropped), attend_both(p, without, bias)))


@either_way
def test_rows_with_nothing_eligible(chunk_size):
    p = Problem(chunk_size=chunk_size, sink=True)
    indices = torch.full((p.batch, p.queries, 1, 2), -1, dtype=torch.int32)
    out, lse = attend_both(p, indices)
    assert torch.count_nonzero(out) == 0
    torch.testing.assert_close(lse, p.tensors["sink"].expand_as(lse), rtol=1e-6, atol=1e-6)
    p.tensors["sink"] = None
    out, lse = attend_both(p, indices)
    assert torch.count_nonzero(out) == 0 and lse.eq(-math.inf).all()


@either_way
def test_a_sink_of_minus_infinity_is_no_sink(chunk_size):
    p = Problem(chunk_size=chunk_size, sink=True)
    indices = selection(p)
    p.tensors["sink"] = torch.full((p.heads,), -math.inf)
    with_sink = attend_both(p, indices)
    p.tensors["sink"] = None
    assert all(map(torch.equal, with_sink, attend_both(p, indices)))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["query", "key", "value"])
@either_way
def test_nan_and_infinity_reach_only_rows_that_read_them(where, bad, chunk_size):
    p = Problem(batch=1, queries=61, context=61, chunk_size=chunk_size)
    p.tensors[where][0, 9, :, 0] = bad
    attend_both(p, selection(p))


@either_way
def test_large_logits_do_not_overflow(chunk_size):
    p = Problem(chunk_size=chunk_size, dtype=torch.float32)
    p.tensors["query"] *= 1e4
    p.tensors["key"] *= 1e4
    out, _ = attend_both(p, selection(p))
    assert out.isfinite().all()


def test_chunks_that_nobody_selects_and_the_ragged_tail_get_exact_zeros():
    p = Problem(batch=1, queries=30, context=30, chunk_size=4, top_k=1)
    key = p.tensors["key"].requires_grad_()
    value = p.tensors["value"].requires_grad_()
    indices = torch.where(selection(p) == 3, -1, selection(p))
    out, _ = ops.attend(p.tensors["query"], key, value, indices, p.chunk_size)
    out.square().sum().backward()
    for grad in (key.grad, value.grad):
        assert torch.count_nonzero(grad[:, 12:16]) == 0 and torch.count_nonzero(grad[:, 28:]) == 0
        assert torch.count_nonzero(grad[:, 0:4]) > 0


def test_hard_mask_gives_embeddings_no_gradient():
    p = Problem()
    a = p.arguments()
    a["query"].requires_grad_()
    for name in ("query_embedding", "context_embedding"):
        a[name].requires_grad_()
    out = ops.fused_retrieve_attend(**a)[0]
    out.sum().backward()
    assert a["query"].grad is not None
    assert a["query_embedding"].grad is None and a["context_embedding"].grad is None


def test_unused_slots_send_no_gradient_to_scores():
    """score_scale times -inf must not reach the gradient."""
    p = Problem(top_k=40, score_scale=True)
    a = p.arguments()
    for name in ("query_embedding", "context_embedding", "score_scale"):
        a[name].requires_grad_()
    ops.fused_retrieve_attend(**a)[0].square().sum().backward()
    for name in ("query_embedding", "context_embedding", "score_scale"):
        assert a[name].grad.isfinite().all() and a[name].grad.abs().sum() > 0


def test_unused_slots_get_zero_bias_gradient_even_in_rows_of_nan():
    p = Problem(batch=1, queries=61, context=61)
    indices = selection(p)
    indices[..., 1] = -1
    p.tensors["query"][0, 30] = math.nan
    bias = torch.randn(indices.shape).requires_grad_()
    a = p.tensors
    ops.attend(a["query"], a["key"], a["value"], indices, p.chunk_size, bias)[
        0
    ].square().sum().backward()
    assert bias.grad[0, 30, 0, 0].isnan() and torch.count_nonzero(bias.grad[indices < 0]) == 0


def test_zero_norm_rows_get_zero_gradient():
    p = Problem(batch=1, score_scale=True)
    a = p.arguments()
    with torch.no_grad():
        a["query_embedding"][0, 20:25] = 0
        a["context_embedding"][0, 8:12] = 0
    for name in ("query_embedding", "context_embedding"):
        a[name].requires_grad_()
    ops.fused_retrieve_attend(**a)[0].square().sum().backward()
    assert torch.count_nonzero(a["query_embedding"].grad[0, 20:25]) == 0
    assert torch.count_nonzero(a["context_embedding"].grad[0, 8:12]) == 0


@pytest.mark.parametrize(
    "level", [1e2, 1e4, 1e6, -1e6, -1e9, float(torch.finfo(torch.float32).min)]
)
@pytest.mark.parametrize("sink", [False, True])
def test_gradients_under_a_large_common_bias(level, sink):
    """A bias of all slots leaves the weights as they are; the rounding of lse must not reach them."""
    p = Problem(heads=4, kv_heads=2, retrieval_heads=2)
    indices = selection(p)
    bias = torch.full(indices.shape, level) + torch.randn(indices.shape)
    sinks = torch.full((p.heads,), level) if sink else None
    weights = torch.randn(p.batch, p.queries, p.heads, p.head_dim).double()

    def gradients(function, dtype):
        rows = [p.tensors[k].to(dtype).requires_grad_() for k in ("query", "key", "value")]
        extras = [t.to(dtype).requires_grad_() for t in (bias, sinks) if t is not None]
        out, _ = function(*rows, indices, p.chunk_size, *extras)
        return torch.autograd.grad((out.double() * weights).sum(), [*rows, *extras])

    got, plain = (gradients(f, torch.float32) for f in (ops.attend, reference.attend))
    truth = gradients(reference.attend, torch.float64)
    for name, *grads in zip(
        ("query", "key", "value", "bias", "sink"), got, plain, truth, strict=False
    ):
        rounding = 2e-6 * math.sqrt(p.batch * p.queries * p.heads) if name == "sink" else 2e-6
        assert_no_worse(f"d {name}", *grads, rounding=rounding)


@pytest.mark.parametrize(
    "case",
    ["everything", "packed", "several ranges", "everything, ones", "packed ones", "many pairs"],
)
def test_same_bits_for_any_number_of_threads(case, threads):
    results = []
    p = Problem(**PROBLEMS[case])
    weights = {
        "out": torch.randn(p.batch, p.queries, p.heads, p.head_dim).double(),
        "lse": torch.randn(p.batch, p.queries, p.heads).double(),
        "scores": torch.randn(p.batch, p.queries, p.retrieval_heads, p.top_k).double(),
    }
    for count in (1, 2, 3, 7):
        threads(count)
        outputs, gradients = run(ops.fused_retrieve_attend, p.arguments(), weights)
        results.append([*outputs, *gradients.values()])
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@either_way
def test_rows_do_not_depend_on_the_batch_around_them(chunk_size):
    p = Problem(chunk_size=chunk_size, batch=3, score_scale=True, sink=True)
    whole = ops.fused_retrieve_attend(**p.arguments())
    for b in range(3):
        one = {
            k: t[b : b + 1] if isinstance(t, torch.Tensor) and t.dim() == 4 else t
            for k, t in p.arguments().items()
        }
        assert all(
            torch.equal(w[b : b + 1], o)
            for w, o in zip(whole, ops.fused_retrieve_attend(**one), strict=True)
        )


def test_outputs_are_contiguous_for_any_strides():
    p = Problem(retrieval_dim=6)
    plain = ops.fused_retrieve_attend(**p.arguments())
    strided = {
        k: t.transpose(1, 2).contiguous().transpose(1, 2)
        if isinstance(t, torch.Tensor) and t.dim() == 4
        else t
        for k, t in p.arguments().items()
    }
    strided["value"] = torch.stack([p.tensors["value"]] * 2, dim=-1)[
        ..., 0
    ]  # stride 2 in the last dimension
    again = ops.fused_retrieve_attend(**strided)
    assert all(t.is_contiguous() for t in again)
    assert all(map(torch.equal, plain, again))
