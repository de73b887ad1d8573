"""Collectives that also work on a single rank without a process group."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from muomni.errors import StorageError

_simulated_ranks: int | None = None


def is_distributed() -> bool:
    """Whether a process group with several ranks is initialized."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


@contextmanager
def simulated(num_ranks: int) -> Iterator[None]:
    """Simulate rank 0 of `num_ranks` identical ranks in this process, for dry runs.

    Gathered tensors have their real sizes; nothing is communicated. Must not be used in a process group.
    """
    global _simulated_ranks
    assert not is_distributed(), "cannot simulate ranks within a process group"
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
    """Sum `tensor` over all ranks in place and return it."""
    if is_distributed():
        dist.all_reduce(tensor)
    return tensor


def start_sum_over_ranks(tensor: torch.Tensor) -> dist.Work | None:
    """Start to sum `tensor` over all ranks in place.

    `tensor` holds the sum after `wait()` on the returned work. Returns None on a single rank.
    """
    return dist.all_reduce(tensor, async_op=True) if is_distributed() else None


def gather_rows(tensor: torch.Tensor, group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """Concatenate the tensors [n, ...] of all ranks (of `group`) in rank order, without gradient.

    n must be the same on each rank.
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
    """Return the object of rank 0 on every rank."""
    if not is_distributed():
        return value
    holder = [value]
    dist.broadcast_object_list(holder, src=0)
    return holder[0]


def gather_objects(value: Any) -> list[Any]:
    """Return the picklable objects of all ranks, in rank order, on every rank."""
    if not is_distributed():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


@contextmanager
def writing(what: str) -> Iterator[None]:
    """Write files in the block; every rank must call it, and the block must not communicate after a write.

    If a write fails on any rank, for example because the disk is full, StorageError is raised on all. Otherwise
    the others would wait for a rank that has ended.
    """
    failure = None
    try:
        yield
    except OSError as error:
        failure = f"{error.strerror or error} on rank {rank()}"
    failures = [text for text in gather_objects(failure) if text is not None]
    if failures:
        raise StorageError(write_error(what, failures[0]))


def write_error(what: str, reason: str) -> str:
    """The sentence for a file that cannot be written."""
    return (
        f"cannot write {what}: {reason}; what was saved before is unchanged: free some space, then rerun the "
        f"same command"
    )
