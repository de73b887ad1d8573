"""Sums over the samples of all ranks: what every metric is made of.

Ranks may see different samples, even none at all; sums are added in rank order when they are asked
for, so that one rank and several give the same numbers.
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
    """Named float64 sums of any shape, kept on the CPU."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, name: str, value: Tensor | float) -> None:
        """Add to a sum; it starts at zero with the shape of its first value."""
        value = torch.as_tensor(value).detach().double().cpu()
        self._sums[name] = self._sums[name] + value if name in self._sums else value.clone()

    def reduce(self) -> dict[str, Tensor]:
        """The sums over all ranks; every rank must call it."""
        total = Tally()
        for part in collectives.gather_objects(self._sums):
            for name, value in part.items():
                total.add(name, value)
        return total._sums


def sum_counts(counts: Counter[Item]) -> Counter[Item]:
    """The counts over all ranks; every rank must call it."""
    total: Counter[Item] = Counter()
    for part in collectives.gather_objects(counts):
        total.update(part)
    return total


def most_common(counts: Counter[Item]) -> Item | None:
    """The most frequent value, the smallest among equals; None without values."""
    return min(counts, key=lambda value: (-counts[value], str(value)), default=None)


def watch(batches: Iterable[LocatedBatch], look: Callable[[Batch], None]) -> Iterator[LocatedBatch]:
    """Pass batches on and let `look` see each of them first."""
    for micro, batch in batches:
        look(batch)
        yield micro, batch


def ratio(pair: Tensor | None) -> float:
    """The quotient of a sum [2] of (value, weight), NaN without weight."""
    if pair is None or pair[1] == 0:
        return float("nan")
    return float(pair[0] / pair[1])
