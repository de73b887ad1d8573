"""Sums over the samples of all ranks, from which metrics are computed.

Ranks may have different samples, or none. `reduce` adds the sums in rank order, so the metrics do not
depend on the number of ranks.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

from muomni.data.views.base import Batch
from muomni.distributed import collectives
from muomni.training.validation import LocatedBatch

Item = TypeVar("Item", bound=Hashable)


class Tally:
    """Named float64 sums of any shape, on the CPU."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, name: str, value: Tensor | float) -> None:
        """Add to a sum, which starts at zero with the shape of its first value."""
        value = torch.as_tensor(value).detach().double().cpu()
        self._sums[name] = self._sums[name] + value if name in self._sums else value.clone()

    def reduce(self) -> dict[str, Tensor]:
        """Return the sums over all ranks; a collective."""
        total = Tally()
        for part in collectives.gather_objects(self._sums):
            for name, value in part.items():
                total.add(name, value)
        return total._sums


def sum_counts(counts: Counter[Item]) -> Counter[Item]:
    """Return the counts over all ranks; a collective."""
    total: Counter[Item] = Counter()
    for part in collectives.gather_objects(counts):
        total.update(part)
    return total


def most_common(counts: Counter[Item]) -> Item | None:
    """Return the most frequent item, ties broken by the smallest; None if there is none."""
    return min(counts, key=lambda value: (-counts[value], str(value)), default=None)


def watch(
    batches: Iterable[LocatedBatch], observe: Callable[[Batch], None]
) -> Iterator[LocatedBatch]:
    """Yield the batches, calling `observe` on each one first."""
    for micro, batch in batches:
        observe(batch)
        yield micro, batch


def ratio(pair: Tensor | None) -> float:
    """Return value / weight of a sum [2] of both; NaN if the weight is zero."""
    if pair is None or pair[1] == 0:
        return float("nan")
    return float(pair[0] / pair[1])
