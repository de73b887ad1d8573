"""The few collectives that training needs, identical for one rank and for many."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

_simulated_ranks: int | None = None


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


@contextmanager
def simulated(num_ranks: int) -> Iterator[None]:
    """Let this process count as rank 0 of `num_ranks` that all hold what it holds, for plans.

    Gathered tensors then have their real sizes, and nothing is sent. No process group may be running.
    """
    global _simulated_ranks
    assert not is_distributed(), "ranks that run need no pretence"
    _simulated_ranks = num_ranks
    try:
        yield
    finally:
        _simulated_ranks = None


def world_size() -> int:
    return dist.get_world_size() if is_distributed() else _simulated_ranks or 1


def rank() -> int:
    return dist.get_rank() if is_distributed() else 0


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """Sum `tensor` over all ranks, in place; returns it."""
    if is_distributed():
        dist.all_reduce(tensor)
    return tensor


def start_sum_over_ranks(tensor: torch.Tensor) -> dist.Work | None:
    """Begin to sum `tensor` over all ranks, in place; it holds the sum once the work was waited for.

    None when there is nothing to wait for.
    """
    return dist.all_reduce(tensor, async_op=True) if is_distributed() else None


def gather_rows(tensor: torch.Tensor, group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """Concatenate `[n, ...]` of all ranks in rank order, without gradient; n is the same on each.

    With `group`, of its ranks.
    """
    tensor = tensor.detach().contiguous()
    if _simulated_ranks is not None:
        return torch.cat([tensor] * _simulated_ranks)
    if not is_distributed():
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, tensor, group=group)
    return torch.cat(parts)


def barrier() -> None:
    if is_distributed():
        dist.barrier()


def broadcast_object(value: Any) -> Any:
    """Give every rank the object that rank 0 holds."""
    if not is_distributed():
        return value
    holder = [value]
    dist.broadcast_object_list(holder, src=0)
    return holder[0]


def gather_objects(value: Any) -> list[Any]:
    """Collect a small picklable object of every rank, in rank order, on every rank."""
    if not is_distributed():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values
