"""Held-out metrics, in which each sample counts exactly once on any number of ranks.

The training loop and the evaluator share both steps: `SplitBatches` distributes a split, `validate` sums the
logs of forward passes over it.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch

from muomni.data.loading.loader import Loader, PlannedDataset, to_device
from muomni.data.sampling.plan import MicroBatch, cover
from muomni.data.shards.source import Source
from muomni.data.views.base import Batch
from muomni.distributed import collectives
from muomni.training.feed import loader_options
from muomni.training.outputs import StageOutput
from muomni.training.stage import Stage
from muomni.training.step_reduction import RunningSums

# A batch on the device, and the ids of its samples.
LocatedBatch = tuple[MicroBatch, Batch]

_EMPTY = MicroBatch(sequences=())


class SplitBatches:
    """This rank's prepared micro-batches of a split, each with the ids of its samples.

    Micro-batches are distributed round-robin. Ranks that run out take empty ones with denominator 0, so that
    all ranks run the same number of forward passes (otherwise ZeRO-3 collectives deadlock).
    """

    def __init__(
        self,
        stage: Stage,
        source: Source,
        device: torch.device,
        max_batches: int | None = None,
        max_samples: int | None = None,
    ) -> None:
        self.stage = stage
        self.device = device
        view = stage.view()
        num_samples = min(source.num_included, max_samples or source.num_included)
        ids = source.all_included[np.arange(num_samples)]
        batches = cover(ids, view.lengths(source)[ids], stage.batching())[:max_batches]
        ranks = collectives.world_size()
        padded = batches + [_EMPTY] * (-len(batches) % ranks)
        self._batches = list(itertools.islice(padded, collectives.rank(), None, ranks))
        self._loader = Loader(
            PlannedDataset(source, view, stage.config.seed),
            self._batches,
            **loader_options(stage.config.data, device),
        )

    @property
    def num_bad(self) -> int:
        """Samples of this rank that failed to decode in the last iteration."""
        return self._loader.num_bad

    def __iter__(self) -> Iterator[LocatedBatch]:
        self._loader.num_bad = 0
        for micro, batch in zip(self._batches, self._loader, strict=True):
            yield micro, self.stage.prepare(to_device(batch, self.device))


def validate(
    stage: Stage,
    forward: Callable[[Batch], StageOutput],
    batches: Iterable[LocatedBatch],
) -> dict[str, float]:
    """Metrics of the stage over the `batches` of all ranks; every rank must call it, without gradient."""
    sums = RunningSums()
    for _, batch in batches:
        (seen,) = stage.begin_step(forward, [batch])
        # A long fp32 sum would lose precision and depend on the number of ranks.
        sums.add({name: pair.double() for name, pair in forward(seen).logs.items()})
    return stage.metrics(sums.take())
