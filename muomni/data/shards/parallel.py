"""Process the samples of a split in parallel, in ranges of consecutive samples."""

from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import TypeVar

from muomni.errors import MachineError

R = TypeVar("R")

# Samples of a range: enough to make up for starting it, few enough for the results to fit into memory.
_RANGE = 2048


def map_ranges(
    function: Callable[[int, int], R], num_samples: int, num_workers: int = 1
) -> Iterator[R]:
    """Yield `function(first, stop)` for consecutive ranges that cover all samples, in order.

    `function` must be picklable; with one worker, it runs in this process. Raises MachineError if a worker
    process is killed.
    """
    firsts = range(0, num_samples, _RANGE)
    stops = [min(first + _RANGE, num_samples) for first in firsts]
    num_workers = min(num_workers, len(firsts))
    if num_workers <= 1:
        yield from map(function, firsts, stops)
        return
    with ProcessPoolExecutor(num_workers, get_context("spawn")) as pool:
        try:
            yield from pool.map(function, firsts, stops)
        except BrokenProcessPool as error:
            raise MachineError(
                "a worker process was killed (out of memory?); run again with fewer --workers"
            ) from error
