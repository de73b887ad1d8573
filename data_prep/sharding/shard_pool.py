"""The same function over many shards, in this process or in several; results in order."""

from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import TypeVar

from muomni.errors import MachineError

T = TypeVar("T")
R = TypeVar("R")


def map_shards(function: Callable[[T], R], shards: Sequence[T], num_workers: int) -> list[R]:
    """`function` of each shard; it and the shards must be picklable.

    Raises `MachineError` when a worker process is killed.
    """
    if num_workers <= 1 or len(shards) <= 1:
        return [function(shard) for shard in shards]
    with ProcessPoolExecutor(min(num_workers, len(shards)), get_context("spawn")) as pool:
        try:
            return list(pool.map(function, shards))
        except BrokenProcessPool as error:
            raise MachineError(
                "a worker process was killed (out of memory?); run again with fewer --workers"
            ) from error
