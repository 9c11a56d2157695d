"""Modules that cannot work on a part of the sequence: each rank runs them on the whole and keeps its part.

For mixers that are not sequence-parallel themselves. It is right, and it saves nothing: every rank computes
and stores what a single one would. Everything else of the model stays sharded.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from .agreement import agree, bits, check_device, number_of
from .collectives import AllGather
from .layout import Layout, require, shard, unshard

NAMES = ("batch", "width", "dtype", "requires_grad")


def on_whole_sequence(module: nn.Module, mesh: DeviceMesh) -> None:
    """From now on `module` gets the tokens of all ranks, and returns those of this rank.

    Its first argument, or `hidden_states`, is x [B, T, d]; what it returns, or the first of a tuple, is
    [B, T, ...]. Consecutive tokens in the order of the ranks; T may differ. Parameters get gradients of
    this rank's rows: add them up over the ranks, as with any other sharded batch.

    Args:
        module: changed in place: its `forward`.
        mesh: of one dimension, the ranks that share the sequence. Every rank has to call.

    Raises:
        ValueError: from the module, on every rank, where shapes or dtypes do not match.
    """
    require(mesh.ndim == 1, "mesh", 'one of one dimension, as mesh["context"]', mesh)
    inner, group = module.forward, mesh.get_group()
    rank = dist.get_rank(group)

    def forward(*args, **kwargs):
        x = args[0] if args else kwargs.pop("hidden_states")
        whole, layout = _gathered(x, mesh, group)
        output = inner(whole, *args[1:], **kwargs)
        if isinstance(output, tuple):
            return (shard(output[0], layout, rank), *output[1:])
        return shard(output, layout, rank)

    module.forward = forward


def _gathered(x: Tensor, mesh: DeviceMesh, group) -> tuple[Tensor, Layout]:
    own, error = None, ""
    try:
        require(x.dim() == 3, "hidden_states", "[B, T, d]", list(x.shape))
        check_device(x, "hidden_states", mesh)
        wanted = bits([torch.is_grad_enabled() and x.requires_grad])
        values = (x.shape[0], x.shape[2], number_of(x, "hidden_states"), wanted)
        own = dict(zip(NAMES, values, strict=True))
    except (ValueError, RuntimeError) as problem:
        error = str(problem)
    lengths = agree(own, error, x.shape[1] if x.dim() == 3 else 0, mesh, group, NAMES)
    layout = Layout.of_lengths(lengths, chunk_size=1)
    most = max(lengths)
    own_rows = torch.nn.functional.pad(x, (0, 0, 0, most - x.shape[1]))
    every = AllGather.apply(own_rows, group)
    rows = [part[:, :length] for part, length in zip(every, lengths, strict=True)]
    return unshard(rows, layout), layout
