"""One sequence over several processes: train a copier, then let it foresee with a sharded cache.

    torchrun --nproc-per-node 2 examples/context_parallel.py
    python examples/context_parallel.py                          # one process, the same numbers

Each sequence is a random passage and then the same passage again; the second half is to be predicted. Each
process holds an early and a late piece of every sequence, and only the retrieval looks across. There is no
recurrent mixer here: one that is not sequence-parallel itself would need
`resona_ext.distributed.on_whole_sequence`.
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from resona_ext import Resona
from resona_ext.distributed import Layout, shard

VOCABULARY, WIDTH, CHUNK = 512, 64, 8


class Copier(nn.Module):
    """Embedding, retrieval, head. A key knows its left neighbour, so a query finds what followed it."""

    def __init__(self) -> None:
        super().__init__()
        place = {"dtype": torch.float64}  # so that the same numbers are the same to the last digit
        self.embedding = nn.Embedding(VOCABULARY, WIDTH, **place)
        settings = {"top_k": 4, "key_conv": 2, "trainable_retrieval": True, "mix": "additive"}
        self.resona = Resona(WIDTH, 1, chunk_size=CHUNK, **settings, **place)
        self.head = nn.Linear(WIDTH, VOCABULARY, **place)

    def forward(self, ids: Tensor, **where) -> Tensor:
        """ids [B, T] -> logits [B, T, vocabulary]; `where`: mesh, layout and cache of `Resona.forward`."""
        e = self.embedding(ids)
        return self.head(self.resona(e, e, **where))


def passages(batch: int, length: int, generator: torch.Generator) -> Tensor:
    """[batch, 2 * length]: a passage of distinct tokens, twice."""
    order = torch.rand(batch, VOCABULARY, generator=generator).argsort(dim=1)
    return order[:, :length].repeat(1, 2)


def train(mesh: DeviceMesh, steps: int, length: int, batch: int = 8) -> tuple[Copier, list[float]]:
    """The model, the same on every rank, and its losses."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = Copier().to(mesh.device_type)
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    rank, ranks = mesh.get_local_rank(), mesh.size()
    layout = Layout.balanced(2 * length - 1, ranks, CHUNK)
    losses = []
    for _ in range(steps):
        ids = passages(batch, length, generator).to(mesh.device_type)
        target = ids[:, 1:].clone()
        target[:, : length - 1] = -100  # the first half cannot be known
        logits = wrapped(shard(ids[:, :-1], layout, rank), mesh=mesh, layout=layout)
        own = shard(target, layout, rank)
        loss = F.cross_entropy(logits.flatten(0, 1), own.flatten(), reduction="sum")
        loss = loss / (batch * length)
        optimizer.zero_grad()
        (loss * ranks).backward()  # DDP averages over ranks, and the sum is wanted
        optimizer.step()
        loss = loss.detach()
        dist.all_reduce(loss)
        losses.append(loss.item())
    return model, losses


@torch.no_grad()
def follow(model: Copier, mesh: DeviceMesh, length: int) -> tuple[Tensor, Tensor]:
    """A new passage as a sharded prompt, then it again token by token: (foreseen, right), [length - 1]."""
    ids = passages(1, length, torch.Generator().manual_seed(1)).to(mesh.device_type)
    layout = Layout.balanced(length, mesh.size(), CHUNK)
    cache = model.resona.make_cache(1, 2 * length, mesh=mesh)
    prompt = shard(ids[:, :length], layout, mesh.get_local_rank())
    model(prompt, mesh=mesh, layout=layout, cache=cache)
    # From here on every rank has the same token, and computes the same next one.
    steps = ids[:, length:-1].split(1, dim=1)
    foreseen = [model(token, cache=cache).argmax(-1) for token in steps]
    return torch.cat(foreseen, dim=1)[0], ids[0, length + 1 :]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--length", type=int, default=64, help="tokens of the passage")
    arguments = parser.parse_args(argv)
    if "RANK" not in os.environ:  # not started by torchrun
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    # A GPU has no float64 in these kernels: the example stays on the CPU.
    mesh = init_device_mesh("cpu", (int(os.environ["WORLD_SIZE"]),), mesh_dim_names=("context",))
    model, losses = train(mesh, arguments.steps, arguments.length)
    foreseen, right = follow(model, mesh, arguments.length)
    if mesh.get_rank() == 0:
        for step in range(0, len(losses), max(1, len(losses) // 5)):
            print(f"step {step:4d}  loss {losses[step]:.10f}")
        print(f"last       loss {losses[-1]:.10f}")
        print(f"foreseen   {' '.join(map(str, foreseen[:12].tolist()))} ...")
        print(f"right      {(foreseen == right).double().mean():.1%} of the tokens, by the cache")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
