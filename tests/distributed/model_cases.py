"""What the processes run: training steps of whole models, wrapped as users wrap them."""

from __future__ import annotations

import itertools
from functools import partial

import torch
import torch.distributed as dist
from layer_cases import EVERYTHING, WIDTH, make_layer
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from resona_ext.distributed import Layout, on_whole_sequence, shard

VOCABULARY = 17


class RunningMean(nn.Module):
    """A mixer that needs the whole of the past, and knows nothing of ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(WIDTH, WIDTH, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        count = torch.arange(1, x.shape[1] + 1, device=x.device).unsqueeze(-1)
        return torch.tanh(self.map(x)).cumsum(dim=1) / count


class Model(nn.Module):
    """Embedding, two blocks of a mixer and a Resona, head."""

    def __init__(self, checkpointing: bool = False) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.embedding = nn.Embedding(VOCABULARY, WIDTH, dtype=torch.float64)
        self.mixers = nn.ModuleList(RunningMean() for _ in range(2))
        self.resonas = nn.ModuleList(make_layer(EVERYTHING) for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCABULARY, dtype=torch.float64)
        self.checkpointing = checkpointing

    def share_sequences(self, mesh: DeviceMesh) -> None:
        for mixer in self.mixers:
            on_whole_sequence(mixer, mesh)

    def forward(self, ids: Tensor, mesh: DeviceMesh | None = None) -> Tensor:
        """ids [B, T] of this rank -> logits [B, T, V]."""
        e = x = self.embedding(ids)
        for mixer, resona in zip(self.mixers, self.resonas, strict=True):
            block = partial(self._block, mixer, resona, mesh)
            x = checkpoint(block, x, e, use_reentrant=False) if self.checkpointing else block(x, e)
        return self.head(x)

    @staticmethod
    def _block(mixer, resona, mesh, x: Tensor, e: Tensor) -> Tensor:
        return x + resona(x, e, mixer(x), mesh=mesh)


def _wrapped(model: Model, how: str, mesh: DeviceMesh) -> nn.Module:
    if how == "ddp":
        return DistributedDataParallel(model, process_group=mesh.get_group())
    for block in (*model.resonas, *model.mixers):
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def _loss(logits: Tensor, ids: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="sum")


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    return {
        name.removeprefix("module."): p.grad.full_tensor()
        if hasattr(p.grad, "full_tensor")
        else p.grad
        for name, p in model.named_parameters()
        if p.grad is not None
    }


def _expected(ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    model = Model()
    logits = model(ids)
    _loss(logits, ids).backward()
    return logits, _gradients(model)


def _check(name: str, logits, ids, expected, gradients, model, ranks: int) -> None:
    """Wrappers average over the ranks; the sum over all tokens is wanted."""
    torch.testing.assert_close(logits, expected, msg=lambda m: f"{name}: {m}")
    (_loss(logits, ids) * ranks).backward()
    got = _gradients(model)
    assert got.keys() == gradients.keys(), name
    for key, value in gradients.items():
        torch.testing.assert_close(got[key], value, msg=lambda m: f"{name}: {key}: {m}")  # noqa: B023


def check_wrapped(rank: int, ranks: int) -> str:
    """DDP and FSDP2, sharded by batch or by sequence, with and without checkpointing."""
    mesh = init_device_mesh("cpu", (ranks,))
    ids = torch.randint(VOCABULARY, (2 * ranks, 21), generator=torch.Generator().manual_seed(6))
    expected, gradients = _expected(ids)
    layout = Layout.contiguous(21, ranks, chunk_size=4)
    table = itertools.product(("batch", "sequence"), ("ddp", "fsdp"), (False, True))
    for by, how, checkpointing in table:
        model = Model(checkpointing)
        if by == "batch":
            part, context = (lambda t: t.chunk(ranks)[rank]), None
        else:
            part, context = (lambda t: shard(t, layout, rank)), mesh
            model.share_sequences(mesh)
        model = _wrapped(model, how, mesh)
        name = f"{how}, by {by}, checkpointing {checkpointing}"
        logits = model(part(ids), context)
        _check(name, logits, part(ids), part(expected), gradients, model, ranks)
    return "equal"


def check_plane(rank: int, ranks: int) -> str:
    """Batch along one dimension of the mesh, sequence along the other, parameters over both."""
    mesh = init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=("data", "context"))
    ids = torch.randint(VOCABULARY, (4, 21), generator=torch.Generator().manual_seed(6))
    expected, gradients = _expected(ids)
    context = mesh["context"]
    layout = Layout.contiguous(21, context.size(), chunk_size=4)

    def part(t: Tensor) -> Tensor:
        own = t.chunk(2)[mesh["data"].get_local_rank()]
        return shard(own, layout, context.get_local_rank())

    model = Model(checkpointing=True)
    model.share_sequences(context)
    model = _wrapped(model, "fsdp", init_device_mesh("cpu", (ranks,)))
    logits = model(part(ids), context)
    _check("fsdp over both", logits, part(ids), part(expected), gradients, model, ranks)
    return "equal"


def check_augmented(rank: int, ranks: int) -> str:
    """A Mamba-2 of transformers: retrieval over the ranks, its mixers on the whole."""
    import transformers

    from resona_ext import augment

    def make():
        torch.manual_seed(2)
        config = transformers.Mamba2Config(
            vocab_size=VOCABULARY,
            hidden_size=32,
            num_hidden_layers=3,
            state_size=8,
            num_heads=4,
            head_dim=16,
            n_groups=1,
            chunk_size=16,
            use_cache=False,
        )
        model = transformers.Mamba2ForCausalLM(config).double()
        return model.train(), augment(model, chunk_size=4, top_k=2, zero_init_output=False)

    ids = torch.randint(VOCABULARY, (2, 29), generator=torch.Generator().manual_seed(6))
    one, _ = make()
    expected = one(ids).logits
    _loss(expected, ids).backward()
    gradients = _gradients(one)

    mesh = init_device_mesh("cpu", (ranks,))
    layout = Layout.contiguous(29, ranks, chunk_size=4)
    part = shard(ids, layout, rank)
    for checkpointing in (False, True):
        model, augmentation = make()
        augmentation.mesh = mesh
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        for block in model.backbone.layers:
            on_whole_sequence(block.mixer, mesh)
        logits = model(part).logits
        torch.testing.assert_close(logits, shard(expected, layout, rank))
        _loss(logits, part).backward()
        close = {"rtol": 1e-3, "atol": 1e-5}  # transformers scans in float32 whatever it is given
        for key, value in _gradients(model).items():
            dist.all_reduce(value)
            torch.testing.assert_close(value, gradients[key], **close, msg=lambda m: f"{key}: {m}")  # noqa: B023
    model.eval()
    with torch.no_grad():
        before = model(part, use_cache=True)  # a whole forward works, what would follow it does not
        try:
            model(part[:, :1], cache_params=before.cache_params, use_cache=True)
            return "no error"
        except ValueError as error:
            assert "a mesh, whose ranks hold parts of the sequence" in str(error), error
    return "equal"
