"""What the processes run: operators on DTensors against the same on the whole."""

from __future__ import annotations

import itertools

import torch
import torch.distributed as dist
from layer_cases import EVERYTHING, WIDTH, draw, make_layer
from sharded_cases import Case, inputs
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.experimental import implicit_replication

import resona_ext
import resona_ext.distributed  # registers the sharding rules

ops = torch.ops.resona
SETTINGS = {"chunk_size": 4, "top_k": 3, "return_aux": True}
HEADS = {
    "sink": 0,
    "score_scale": 0,
    "open_sum": 1,
    "superchunk_sum": 1,
    "state": 1,
    "normalizer": 1,
}
HEADS |= {"initial_state": 1, "initial_normalizer": 1}
SEARCH = ("query_embedding", "context_embedding", "score_scale", "chunk_embedding", "open_sum")
SEARCH += ("history",)
WHOLE = {
    "batch": ("sink", "score_scale", "cu_seqlens"),
    "heads": ("mask", "prefix_lengths", "lengths", "cu_seqlens"),
}


def _placement(name: str, by: str, retrieval_heads: int = 1):
    shares_search = by == "heads" and name in SEARCH and retrieval_heads == 1
    if name in WHOLE[by] or shares_search:
        return Replicate()
    return Shard(0) if by == "batch" else Shard(HEADS.get(name, 2))


def _distributed(tensors: dict[str, Tensor], mesh, by: str, retrieval_heads: int = 1) -> dict:
    return {
        name: distribute_tensor(t.clone(), mesh, [_placement(name, by, retrieval_heads)])
        for name, t in tensors.items()
    }


def _loss(out, aux):
    return out.square().sum() + aux.lse[:, 8:].sum()


def check_retrieval(rank: int, ranks: int) -> str:
    mesh = init_device_mesh("cpu", (ranks,))
    for by, heads, has_scale in itertools.product(("batch", "heads"), (1, 2), (False, True)):
        case = Case("", length=33, batch=2, retrieval_heads=heads, score_scale=has_scale, sink=True)
        tensors = {name: t for name, t in inputs(case).items() if t is not None}
        whole = {name: t.clone().requires_grad_() for name, t in tensors.items()}
        out, aux = resona_ext.retrieve_attend(**whole, **SETTINGS)
        _loss(out, aux).backward()

        parts = _distributed(tensors, mesh, by, heads)
        parts = {name: t.requires_grad_() for name, t in parts.items()}
        got, got_aux = resona_ext.retrieve_attend(**parts, **SETTINGS)
        assert got.placements == parts["query"].placements, "nothing is gathered"
        _loss(got, got_aux).backward()
        torch.testing.assert_close(got.full_tensor(), out)
        assert torch.equal(got_aux.indices.full_tensor(), aux.indices)
        for name, t in whole.items():
            if t.grad is not None:
                torch.testing.assert_close(parts[name].grad.full_tensor(), t.grad)
    return "equal"


def check_packed(rank: int, ranks: int) -> str:
    """One row cannot be split by batch, and what is whole stays whole."""
    mesh = init_device_mesh("cpu", (ranks,))
    case = Case("", length=30, retrieval_heads=2, sink=True)
    tensors = {name: t for name, t in inputs(case).items() if t is not None}
    tensors["cu_seqlens"] = torch.tensor([0, 11, 30], dtype=torch.int32)
    out, aux = resona_ext.retrieve_attend(**tensors, **SETTINGS)
    for placement in (Replicate(), Shard(2)):
        parts = _distributed(tensors, mesh, "heads", 2)
        if placement == Replicate():
            parts = {n: distribute_tensor(t, mesh, [Replicate()]) for n, t in tensors.items()}
        got, got_aux = resona_ext.retrieve_attend(**parts, **SETTINGS)
        assert got.placements == (placement,)
        torch.testing.assert_close(got.full_tensor(), out)
        assert torch.equal(got_aux.indices.full_tensor(), aux.indices)
    return "equal"


def _prefix() -> dict[str, Tensor]:
    torch.manual_seed(0)
    f, v, features = 3, 5, 13
    rows = lambda n, d: torch.randn(2, n, 2, d, dtype=torch.float64)  # noqa: E731
    return {
        "query": rows(9, f),
        "key": rows(9, f),
        "value": rows(9, v),
        "prefix_key": rows(6, f),
        "prefix_value": rows(6, v),
        "prefix_lengths": torch.tensor([4, 6], dtype=torch.int32),
        "mask": torch.rand(2, 9) > 0.2,
        "initial_state": torch.rand(2, 2, features, v, dtype=torch.float64),
        "initial_normalizer": 9 + torch.rand(2, 2, features, dtype=torch.float64),
    }


def check_prefix(rank: int, ranks: int) -> str:
    mesh = init_device_mesh("cpu", (ranks,))
    for by, optional in itertools.product(("batch", "heads"), (False, True)):
        tensors = _prefix()
        if not optional:
            tensors = dict(list(tensors.items())[:5])

        def leaves(tensors):
            return {
                n: t.requires_grad_() if t.is_floating_point() else t for n, t in tensors.items()
            }

        whole = leaves({n: t.clone() for n, t in tensors.items()})
        out, state, normalizer = ops.prefix_linear_attention(**whole)
        (out.square().sum() + state.sum() + normalizer.sum()).backward()
        parts = leaves(_distributed(tensors, mesh, by))
        got = ops.prefix_linear_attention(**parts)
        assert got[0].placements == parts["query"].placements, "nothing is gathered"
        (got[0].square().sum() + got[1].sum() + got[2].sum()).backward()
        for a, b in zip(got, (out, state, normalizer), strict=True):
            torch.testing.assert_close(a.full_tensor(), b)
        for name, t in whole.items():
            if t.grad is not None:
                torch.testing.assert_close(parts[name].grad.full_tensor(), t.grad)
    return "equal"


def _steps() -> dict[str, tuple]:
    """For each operator that writes in place: itself, its tensors, other arguments, what it writes."""
    torch.manual_seed(0)
    row = lambda heads, dim: torch.randn(2, 1, heads, dim)  # noqa: E731

    def decode(heads: int) -> dict[str, Tensor]:
        return {
            "query": row(4, 8),
            "key": row(2, 8),
            "value": row(2, 8),
            "query_embedding": row(heads, 5),
            "context_embedding": row(heads, 5),
            "key_cache": torch.randn(2, 12, 2, 8),
            "value_cache": torch.randn(2, 12, 2, 8),
            "chunk_embedding": torch.randn(2, 4, heads, 5),
            "open_sum": torch.randn(2, heads, 5),
            "history": torch.randn(2, 4, heads, 5),
            "lengths": torch.tensor([5, 10], dtype=torch.int32),
            "score_scale": torch.rand(heads),
            "sink": torch.rand(4),
        }

    written = ("key_cache", "value_cache", "chunk_embedding", "open_sum", "history", "lengths")
    settings = {"chunk_size": 3, "top_k": 2}
    upper = {
        "superchunk_embedding": torch.randn(2, 2, 2, 5),
        "superchunk_sum": torch.randn(2, 2, 5),
    }
    two_level = settings | {"superchunk_size": 2, "probes": 1}
    step = {"query": row(2, 3), "key": row(2, 3), "value": row(2, 5)}
    step |= {"state": torch.rand(2, 2, 13, 5), "normalizer": 9 + torch.rand(2, 2, 13)}
    step |= {"mask": torch.tensor([[True], [False]])}
    return {
        "one selection": (ops.decode_step, decode(1), settings, written, 1),
        "two selections": (ops.decode_step, decode(2), settings, written, 2),
        "two levels": (
            ops.decode_step_two_level,
            decode(2) | upper,
            two_level,
            (*written, *upper),
            2,
        ),
        "prefix": (ops.prefix_linear_attention_step, step, {}, ("state", "normalizer"), 1),
    }


def check_steps(rank: int, ranks: int) -> str:
    mesh = init_device_mesh("cpu", (ranks,))
    for by, (name, step) in itertools.product(("batch", "heads"), _steps().items()):
        op, tensors, settings, written, heads = step
        parts = _distributed(tensors, mesh, by, heads)
        got = op(**parts, **settings)
        expected = op(**tensors, **settings)
        if isinstance(got, DTensor):
            got, expected = (got,), (expected,)
        assert got[0].placements == parts["query"].placements, "nothing is gathered"
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a.full_tensor(), b, msg=lambda m: f"{name}: {m}")  # noqa: B023
        for key in written:
            assert torch.equal(parts[key].full_tensor(), tensors[key]), (by, name, key)
    return "equal"


def refuse_to_move_caches(rank: int, ranks: int) -> list[str]:
    mesh, texts = init_device_mesh("cpu", (ranks,)), []
    for op, tensors, settings, written, heads in _steps().values():
        parts = _distributed(tensors, mesh, "heads", heads)
        parts[written[0]] = distribute_tensor(tensors[written[0]], mesh, [Shard(0)])
        try:
            op(**parts, **settings)
            texts.append("no error")
        except Exception as error:
            texts.append(str(error))
    return texts


# --- The layer


def _split_by_heads(layer) -> None:
    """As docs/scaling.md says it: heads over the ranks, the rest whole."""
    several = layer.retrieval_heads > 1
    rows = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "sink")
    rows += ("score_scale", "encoders.query_map.weight") if several else ()

    def place(name: str):
        if name == "o_proj.weight":
            return Shard(1)
        return Shard(0) if name in rows else Replicate()

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for name, parameter in list(layer.named_parameters()):
        owner, _, own_name = name.rpartition(".")
        split = nn.Parameter(
            distribute_tensor(parameter.detach(), mesh, [place(name)]),
            requires_grad=parameter.requires_grad,
        )
        setattr(layer.get_submodule(owner), own_name, split)


def check_layer(rank: int, ranks: int) -> str:
    mesh = init_device_mesh("cpu", (ranks,))
    heads = {"retrieval_heads": 2, "num_kv_heads": 2}
    for settings in ({}, {"trainable_retrieval": True}, EVERYTHING | heads):
        whole = [draw(2, 21, WIDTH, seed=i) for i in range(3)]
        one, inputs = make_layer(settings), [t.clone().requires_grad_() for t in whole]
        out = one(*inputs)
        out.square().sum().backward()

        layer = make_layer(settings)
        _split_by_heads(layer)
        parts = [distribute_tensor(t, mesh, [Replicate()]).requires_grad_() for t in whole]
        # Positions and the like are plain tensors, the same on every rank.
        with implicit_replication(), CommDebugMode() as moved:
            got = layer(*parts)
            moved_forward = {str(op): n for op, n in moved.get_comm_counts().items()}
            got.square().sum().backward()
        # Each rank's share of the output, and with several retrieval heads the indices of the first,
        # which say for all of them which rows are empty.
        gathers = int(layer.retrieval_heads > 1)
        assert moved_forward.pop("c10d_functional.all_gather_into_tensor", 0) == gathers
        assert set(moved_forward) == {"c10d_functional.all_reduce"}, moved_forward
        torch.testing.assert_close(got.full_tensor(), out)
        pairs = [*zip(layer.parameters(), one.parameters(), strict=True)]
        pairs += zip(parts, inputs, strict=True)
        for a, b in pairs:
            if b.grad is not None:
                torch.testing.assert_close(a.grad.full_tensor(), b.grad)
    return "equal"
