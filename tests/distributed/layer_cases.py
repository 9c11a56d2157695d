"""What the processes run: the layer and its cache over ranks against the layer in one process."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from resona_ext import Resona
from resona_ext.distributed import Layout, ShardedChunkCache, shard

WIDTH, HEADS = 16, 4
EVERYTHING = {
    "trainable_retrieval": True,
    "eligibility": "inclusive",
    "key_conv": 3,
    "rope_base": 100.0,
    "normalize_key_value": True,
    "mlp_dim": 8,
}


class LastToken(nn.Module):
    """A context encoder that looks at the order of tokens: [B, chunks, S, d] -> [B, chunks, E]."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(WIDTH, 8, dtype=torch.float64)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.map(tokens[:, :, -1] + 0.5 * tokens[:, :, 0])


@dataclass(frozen=True)
class LayerCase:
    name: str
    length: int = 45
    batch: int = 1
    layout: str = "balanced"  # "balanced", "contiguous", "announced"
    cu_seqlens: tuple[int, ...] | None = None
    settings: dict = field(default_factory=dict)
    device: str = "cpu"


TABLE = (
    LayerCase("hard mask", batch=2),
    LayerCase("everything", batch=2, settings=EVERYTHING),
    LayerCase("everything, lengths announced", 48, layout="announced", settings=EVERYTHING),
    LayerCase("everything, packed", 61, cu_seqlens=(0, 17, 18, 18, 40, 61), settings=EVERYTHING),
    LayerCase(
        "several retrieval heads, tied to W_q",
        settings={
            "retrieval_heads": 2,
            "query_encoder": "query",
            "trainable_retrieval": True,
            "mix": "additive",
            "key_conv": 2,
        },
    ),
    LayerCase("taps longer than a piece", 9, layout="contiguous", settings={"key_conv": 7}),
    LayerCase("ranks without tokens", 3, settings=EVERYTHING),
    LayerCase("no tokens", 0, settings=EVERYTHING),
    LayerCase("an encoder of one's own", batch=2, settings={"encoder": LastToken}),
    LayerCase(
        "an encoder of one's own, packed",
        61,
        cu_seqlens=(0, 17, 18, 18, 40, 61),
        settings={"encoder": LastToken, "trainable_retrieval": True},
    ),
)


def dtype_on(device: str) -> torch.dtype:
    return torch.float32 if device == "cuda" else torch.float64  # which CUDA does not have


def make_layer(settings: dict, device: str = "cpu") -> Resona:
    torch.manual_seed(3)
    shared = {"chunk_size": 4, "top_k": 3, "retrieval_dim": 8, "dtype": torch.float64}
    if settings.get("query_encoder") == "query":
        shared.pop("retrieval_dim")
    if "encoder" in settings:
        settings = settings | {"encoder": settings["encoder"]()}
    layer = Resona(WIDTH, HEADS, **(shared | settings))
    with torch.no_grad():
        for parameter in layer.parameters():  # what starts at zero would hide mistakes
            parameter.add_(0.1 * torch.randn_like(parameter))
    return layer.to(device, dtype_on(device))


def draw(*shape: int, seed: int = 4, device: str = "cpu") -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    whole = torch.randn(shape, generator=generator, dtype=torch.float64)
    return whole.to(device, dtype_on(device))


def layout_of(case: LayerCase, ranks: int) -> Layout:
    make = Layout.balanced if case.layout == "balanced" else Layout.contiguous
    return make(case.length, ranks, 4, case.cu_seqlens)


def check_layer(case: LayerCase, rank: int, ranks: int, mesh) -> None:
    shape, device = (case.batch, case.length, WIDTH), case.device
    whole = [draw(*shape, seed=i, device=device) for i in range(3)]
    weight = draw(*shape, seed=9, device=device)
    layout = layout_of(case, ranks)

    one, inputs = make_layer(case.settings, device), [t.clone().requires_grad_() for t in whole]
    borders = None
    if case.cu_seqlens is not None:
        borders = torch.tensor(case.cu_seqlens, dtype=torch.int32, device=device)
    out = one(*inputs, cu_seqlens=borders)
    (out * weight).sum().backward()

    layer = make_layer(case.settings, device)
    mine = [shard(t, layout, rank).requires_grad_() for t in whole]
    got = layer(*mine, mesh=mesh, layout=None if case.layout == "announced" else layout)
    (got * shard(weight, layout, rank)).sum().backward()
    _assert_close("out", got, shard(out, layout, rank))
    for name, a, b in zip("xey", mine, inputs, strict=True):
        _assert_close(name, a.grad, shard(b.grad, layout, rank))
    for (name, a), b in zip(layer.named_parameters(), one.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None:
            dist.all_reduce(a.grad)
            _assert_close(name, a.grad, b.grad)


def _assert_close(name: str, got: torch.Tensor, expected: torch.Tensor) -> None:
    close = {} if got.dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(got, expected, **close, msg=lambda text: f"{name}: {text}")


def check_layers(rank: int, ranks: int, device: str = "cpu") -> dict[str, str]:
    return failures(TABLE, check_layer, rank, ranks, device)


def failures(table, check, rank: int, ranks: int, device: str) -> dict[str, str]:
    """The cases that failed, and how."""
    mesh, found = init_device_mesh(device, (ranks,)), {}
    for case in table:
        try:
            check(replace(case, device=device), rank, ranks, mesh)
        except Exception as error:
            found[case.name] = f"{type(error).__name__}: {error}"
            if not isinstance(error, AssertionError):
                break  # the ranks may be out of step
    return found


# --- The cache


@dataclass(frozen=True)
class CacheCase:
    name: str
    prompt: int = 26
    steps: tuple[int, ...] = (1, 1, 1, 5, 1, 9, 1)
    layout: str = "balanced"
    settings: dict = field(default_factory=dict)
    device: str = "cpu"


CACHES = (
    CacheCase("hard mask"),
    CacheCase("everything", settings=EVERYTHING),
    CacheCase("a prompt of whole chunks", prompt=32, layout="announced", settings=EVERYTHING),
    CacheCase("a prompt shorter than a chunk", prompt=3, settings=EVERYTHING),
    CacheCase("no prompt", prompt=0, settings={"key_conv": 2, "trainable_retrieval": True}),
    CacheCase("nothing but a prompt", steps=(0,), layout="contiguous"),
)


@torch.no_grad()
def check_cache(case: CacheCase, rank: int, ranks: int, mesh) -> None:
    batch, length = 2, case.prompt + sum(case.steps)
    layer = make_layer(case.settings, case.device)
    whole = [draw(batch, length, WIDTH, seed=i, device=case.device) for i in range(3)]
    expected = layer(*whole)
    cache = layer.make_cache(batch, length, mesh=mesh)

    layout = layout_of(LayerCase("", case.prompt, layout=case.layout), ranks)
    given = None if case.layout == "announced" else layout
    mine = [shard(t[:, : case.prompt], layout, rank) for t in whole]
    if case.prompt:
        got = layer(*mine, cache=cache, mesh=mesh, layout=given)
        _assert_close("prompt", got, shard(expected[:, : case.prompt], layout, rank))
    at = case.prompt
    for count in case.steps:
        rows = slice(at, at + count)
        got = layer(*(t[:, rows] for t in whole), cache=cache)
        _assert_close(f"step at {at}", got, expected[:, rows])
        every = [torch.empty_like(got) for _ in range(ranks)]
        dist.all_gather(every, got)
        assert all(torch.equal(got, other) for other in every), "all ranks have the same bits"
        at += count
    assert cache.get_seq_length() == length
    counts = torch.zeros(ranks, dtype=torch.long, device=case.device)
    counts[rank] = (cache._place[:-1] >= 0).sum()
    dist.all_reduce(counts)
    assert counts.sum() == -(-length // 4), "every chunk stands on one rank"
    assert case.prompt or counts.max() - counts.min() <= 1, "and they are spread evenly"


def check_caches(rank: int, ranks: int, device: str = "cpu") -> dict[str, str]:
    return failures(CACHES, check_cache, rank, ranks, device)


def check_beams(rank: int, ranks: int) -> dict:
    """Sequences change places, and a forgotten cache serves again."""
    mesh, layer = init_device_mesh("cpu", (ranks,)), make_layer(EVERYTHING)
    whole = [draw(3, 20, WIDTH, seed=i) for i in range(3)]
    with torch.no_grad():
        cache = layer.make_cache(3, 20, mesh=mesh)
        for _ in range(2):
            layout = Layout.contiguous(14, ranks, 4)
            parts = [shard(t[:, :14], layout, rank) for t in whole]
            layer(*parts, cache=cache, mesh=mesh, layout=layout)
            cache.reorder(torch.tensor([2, 0, 0]))
            moved = [t[[2, 0, 0]] for t in whole]
            got = layer(*(t[:, 14:] for t in moved), cache=cache)
            torch.testing.assert_close(got, layer(*moved)[:, 14:])
            cache.reset()
    return {}


# --- Mistakes: on one rank, an error on all


def _forward(layer, mesh, rank, change, **arguments):
    tensors = [draw(1, 8, WIDTH, seed=i) for i in range(3)]
    settings = {"mesh": mesh} | arguments
    if rank == 1:
        tensors, settings = change(tensors, settings)
    return layer(*tensors, **settings)


def _step(layer, mesh, rank, change):
    cache = layer.make_cache(1, 8, mesh=mesh)
    tensors = [draw(1, 3, WIDTH, seed=i) for i in range(3)]
    if rank == 1:
        tensors = change(tensors)
    with torch.no_grad():
        return layer(*tensors, cache=cache)


MISTAKES = {
    "a mask": (
        lambda *a: _forward(*a, lambda t, s: (t, s | {"attention_mask": torch.ones(1, 8).int()})),
        "attention_mask must be None with a mesh",
    ),
    "another width": (
        lambda *a: _forward(*a, lambda t, s: ([x[..., :3] for x in t], s)),
        "hidden_states must be [B, T, 16]",
    ),
    "another dtype": (
        lambda *a: _forward(*a, lambda t, s: ([t[0].float(), *t[1:]], s)),
        "dtype of hidden_states: expected one value on all ranks",
    ),
    "on another device": (
        lambda *a: _forward(*a, lambda t, s: ([x.to("meta") for x in t], s)),
        "hidden_states: expected a tensor on cpu, got meta",
    ),
    "another layout": (
        lambda *a: _forward(
            *a, lambda t, s: (t, s | {"layout": Layout.balanced(16, 2, 4)}), layout=_CONTIGUOUS
        ),
        "layout and borders (checksum): expected one value on all ranks",
    ),
    "a cache without a mesh": (
        lambda layer, mesh, rank: _forward(
            layer, mesh, rank, lambda t, s: (t, s), cache=layer.make_cache(1, 16)
        ),
        "cache must be a cache of `make_cache` with the same mesh",
    ),
    "a prompt that is too long": (
        lambda layer, mesh, rank: _no_grad(
            layer, mesh, rank, lambda t, s: (t, s), cache=layer.make_cache(1, 15, mesh=mesh)
        ),
        "expected at most max_length = 15 tokens, got 16",
    ),
    "a cache for a search in two levels": (
        lambda layer, mesh, rank: make_layer({"search": "two_level"}).make_cache(1, 8, mesh=mesh),
        'ShardedChunkCache: search: expected "exact", as nothing else is searched over several ranks',
    ),
    "an exact cache for a search in two levels": (
        lambda layer, mesh, rank: _no_grad(
            make_layer({"search": "two_level", "superchunk_size": 2}),
            mesh,
            rank,
            lambda t, s: (t, s),
            cache=layer.make_cache(1, 16, mesh=mesh),
        ),
        "cache must be one of `make_cache` with {",
    ),
    "another number of new tokens": (
        lambda *a: _step(*a, lambda tensors: [t[:, :2] for t in tensors]),
        "expected as many tokens on every rank, got [3, 2]",
    ),
}
_CONTIGUOUS = Layout.contiguous(16, 2, 4)
_no_grad = torch.no_grad()(_forward)


def make_layer_mistakes(rank: int, ranks: int) -> dict[str, str]:
    mesh, layer, texts = init_device_mesh("cpu", (ranks,)), make_layer({}), {}
    for name, (make, _) in MISTAKES.items():
        try:
            make(layer, mesh, rank)
            texts[name] = "no error"
        except ValueError as error:
            texts[name] = str(error)
    _forward(layer, mesh, rank, lambda t, s: (t, s))  # and the ranks are still in step
    return texts


def refuse_planes(rank: int, ranks: int) -> list[str]:
    """A mesh of two dimensions is none of ours, wherever it is given."""
    from resona_ext.distributed import on_whole_sequence

    mesh, layer, texts = init_device_mesh("cpu", (1, ranks)), make_layer({}), []
    x = draw(1, 8, WIDTH)
    for call in (
        lambda: layer(x, x, x, mesh=mesh),
        lambda: layer.make_cache(1, 8, mesh=mesh),
        lambda: on_whole_sequence(layer, mesh),
        lambda: ShardedChunkCache(1, 8, 1, 4, 1, 4, 4, mesh=mesh),
    ):
        try:
            call()
            texts.append("no error")
        except ValueError as error:
            texts.append(str(error))
    return texts
