"""The collectives of torch.distributed that this package uses. Every rank of the group makes every call.

A `Trip` is an exchange that other work may overlap, in both directions:

    forward     depart: rows leave          ... work ...   arrive: wait for what came
    backward    arrive: gradients leave     ... work ...   depart: wait for what came

Autograd runs what was made last first. So what is done between depart and arrive in forward has its backward
between arrive's and depart's, while the gradients are under way.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
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


class Trip:
    """One exchange of rows: `there[r]` rows go to rank r, `here[r]` come from it. With gradients."""

    def __init__(self, here: list[int], there: list[int], group) -> None:
        self.here, self.there, self.group = here, there, group

    def depart(self, x: Tensor) -> Trip:
        self._cargo = _Depart.apply(x, self)
        return self

    def arrive(self) -> Tensor:
        cargo, self._cargo = self._cargo, None  # or autograd and this would hold each other
        return _Arrive.apply(cargo, self)

    def exchange(self, x: Tensor, here: list[int], there: list[int]) -> Tensor:
        """Under way when it returns; `wait` before reading."""
        x, received = x.detach().contiguous(), x.new_empty(sum(here), *x.shape[1:])
        work = dist.all_to_all_single(received, x, here, there, self.group, async_op=True)
        self._under_way = (work, x)
        return received

    def wait(self) -> None:
        work, _ = self._under_way
        work.wait()
        self._under_way = None


class _Depart(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, trip: Trip) -> Tensor:
        ctx.trip = trip
        return trip.exchange(x, trip.here, trip.there)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        trip, came_back = ctx.trip, ctx.trip.came_back
        trip.wait()
        trip.came_back = None
        return came_back, None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx, cargo: Tensor, trip: Trip) -> Tensor:
        ctx.trip = trip
        trip.wait()
        return cargo.view_as(cargo)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        trip = ctx.trip
        trip.came_back = trip.exchange(gradient, trip.there, trip.here)
        return gradient, None  # only to wake _Depart: what comes back has the shape of what left


def send_with_gradient(x: Tensor, here: list[int], there: list[int], group) -> Tensor:
    return Trip(here, there, group).depart(x).arrive()


def send_counts(counts: Tensor, group) -> list[int]:
    """What each rank is going to send here. Waits for the device."""
    received = torch.empty_like(counts)
    dist.all_to_all_single(received, counts, group=group)
    return received.tolist()
