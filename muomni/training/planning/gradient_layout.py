"""The inputs of a memory plan, and how DeepSpeed lays out gradients in buckets and shards."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from muomni.training.engine.ds_config import ZeroSettings
from muomni.training.planning.step_trace import Stretch


@dataclass(frozen=True, slots=True)
class Sizes:
    """Elements of each trained parameter by optimizer group, and of each frozen parameter.

    `order` has the position in the model of each parameter of the concatenated groups. `num_moments` is the
    number of fp32 values per element that the optimizer keeps for a group.
    """

    groups: tuple[tuple[int, ...], ...]
    num_moments: tuple[int, ...]
    order: tuple[int, ...]
    frozen: tuple[int, ...]
    buffer_bytes: int

    @property
    def trained(self) -> list[int]:
        """Elements of the trained parameters in model order."""
        sizes = [size for group in self.groups for size in group]
        return [size for _, size in sorted(zip(self.order, sizes, strict=True))]


@dataclass(frozen=True, slots=True)
class Setup:
    """The setup to predict for.

    `weight_bytes` is the size of an element in the compute dtype, `sum_bytes` of a gradient that is added up
    over micro-batches, and `reduce_bytes` of one that is reduced over ranks.
    On a GPU (`is_gpu`), reserved but unwritten memory counts, and host memory is separate.
    """

    num_ranks: int
    accumulates: bool
    weight_bytes: int
    sum_bytes: int
    reduce_bytes: int
    has_average: bool
    is_gpu: bool


class Buckets:
    """The buffers of finished gradients that wait to be reduced; counts elements."""

    def __init__(self, zero: ZeroSettings, setup: Setup, num_buffers: int) -> None:
        self._size = zero.reduce_bucket
        self._written = [0] * num_buffers
        self._is_gpu = setup.is_gpu
        self._waiting = 0

    @property
    def reserved(self) -> int:
        """Elements of all buffers: reserved on GPUs, written on CPUs."""
        return self._size * len(self._written) if self._is_gpu else sum(self._written)

    def touch(self, size: int) -> None:
        """Write up to `size` elements into the buffer in use."""
        self._written[0] = max(self._written[0], min(size, self._size))

    def follow(self, stretches: Sequence[Stretch], trained: list[int]) -> Iterator[tuple[int, int]]:
        """Yield for each stretch the elements finished before it, and those reduced at its end."""
        finished = 0
        for stretch in stretches:
            size = 0 if stretch.parameter is None else trained[stretch.parameter]
            sent = 0
            if stretch.parameter is None or self._waiting + size > self._size:
                sent, self._waiting = self._waiting, 0
                self._written.reverse()
            self._waiting += size
            self.touch(self._waiting)
            yield finished, sent
            finished += size


def overlap_by_rank(
    group: tuple[int, ...], share: int, num_ranks: int, measure: Callable[[int], int]
) -> list[int]:
    """Sum `measure` over the parameters of a group that overlap each rank's shard."""
    sums = [0] * num_ranks
    start = 0
    for size in group:
        for rank in range(start // share, (start + size - 1) // share + 1):
            sums[rank] += measure(size)
        start += size
    return sums
