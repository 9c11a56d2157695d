"""The collectives of torch.distributed that this package uses. Every rank of the group makes every call.

Those with gradients leave with the exchange under way: torch waits when a result is first read.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import Tensor

# torch 2.13 gave both a new name and complains of the old one.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def all_gather(own: Tensor, group) -> Tensor:
    """[...] of every rank -> [ranks, ...]. Without gradients."""
    every = own.new_empty(dist.get_world_size(group), *own.shape)
    _all_gather(every, own.detach().contiguous().unsqueeze(0), group=group)
    return every


class AllGather(torch.autograd.Function):
    """The same with gradients. Backward: to each rank the sum of what all have for it."""

    @staticmethod
    def forward(ctx, own: Tensor, group) -> Tensor:
        ctx.group = group
        return all_gather(own, group)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        wide = gradient.float() if gradient.element_size() < 4 else gradient
        own = torch.empty_like(wide[:1], memory_format=torch.contiguous_format)
        _reduce_scatter(own, wide.contiguous(), group=ctx.group)
        return own[0].to(gradient.dtype), None


def send(x: Tensor, here: list[int], there: list[int], group) -> Tensor:
    """Without gradients: `there[r]` rows of x go to rank r, `here[r]` come from it."""
    received = x.new_empty(sum(here), *x.shape[1:])
    dist.all_to_all_single(received, x.contiguous(), here, there, group=group)
    return received


def send_with_gradient(x: Tensor, here: list[int], there: list[int], group) -> Tensor:
    return functional.all_to_all_single_autograd(x.contiguous(), here, there, group)


def send_counts(counts: Tensor, group) -> list[int]:
    """What each rank is going to send here. Waits for the device."""
    received = torch.empty_like(counts)
    dist.all_to_all_single(received, counts, group=group)
    return received.tolist()
