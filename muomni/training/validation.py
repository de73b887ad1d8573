"""Held-out metrics, in which each sample counts exactly once on any number of ranks.

The training loop and the evaluator share both steps: `SplitBatches` distributes a split, `validate` sums the
logs of forward passes over it.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch

from muomni.config.run import RunConfig
from muomni.data.loading.bad_samples import check_split
from muomni.data.loading.loader import Loader, PlannedDataset, to_device
from muomni.data.sampling.order import Bijection
from muomni.data.sampling.plan import MicroBatch, batching_of, cover
from muomni.data.shards.source import Source
from muomni.data.views.base import Batch
from muomni.distributed import collectives
from muomni.io.hashing import sha256_bytes
from muomni.training.feed import loader_options
from muomni.training.outputs import StageOutput
from muomni.training.stage import Stage
from muomni.training.step_reduction import RunningSums

# A batch on the device, and the ids of its samples.
LocatedBatch = tuple[MicroBatch, Batch]

_SUBSET_KEY = 6


class SplitBatches:
    """This rank's prepared micro-batches of samples of a split, each with the ids of its samples.

    `ids` are the samples, by default all; `digest` identifies them. Groups of `group_size` micro-batches are
    distributed round-robin. A group has one, or the samples that the stage compares with each other
    (`Stage.num_compared`). Ranks that run out take empty micro-batches with denominator 0, so that all ranks
    run the same number of forward passes (otherwise ZeRO-3 collectives deadlock). Iterating is a collective;
    at its end, it raises DataError if more samples were bad than `data.max_bad_fraction` allows.
    """

    def __init__(
        self,
        stage: Stage,
        source: Source,
        device: torch.device,
        ids: np.ndarray | None = None,
    ) -> None:
        self.stage = stage
        self.source = source
        self.device = device
        self.num_bad = 0  # of this rank, known after iterating
        view = stage.view()
        if ids is None:
            ids = first_samples(source, None)
        self.digest = sha256_bytes(source.fingerprint.encode() + ids.tobytes())
        self._num_samples = len(ids)
        lengths, batching = view.lengths(source), batching_of(stage.config.batch)
        if stage.num_compared is None:
            groups = [[batch] for batch in cover(ids, lengths[ids], batching)]
        else:
            starts = range(stage.num_compared, len(ids), stage.num_compared)
            groups = [cover(part, lengths[part], batching) for part in np.split(ids, starts)]
        self.group_size = max(map(len, groups), default=1)
        width = len(groups[0][0].sequences) if groups and batching.mode != "bucket" else 0
        empty = MicroBatch(((),) * width)
        for group in groups:
            group += [empty] * (self.group_size - len(group))
        ranks = collectives.world_size()
        groups += [[empty] * self.group_size] * (-len(groups) % ranks)
        self._batches = [batch for group in groups[collectives.rank() :: ranks] for batch in group]
        self._loader = Loader(
            PlannedDataset(source, view, stage.config.seed),
            self._batches,
            **loader_options(stage.config.data, device),
        )

    @property
    def num_batches(self) -> int:
        """Micro-batches of this rank."""
        return len(self._batches)

    def __iter__(self) -> Iterator[LocatedBatch]:
        for micro, batch in zip(self._batches, self._loader, strict=True):
            yield micro, self.stage.prepare(to_device(batch, self.device))
        _, own = self._loader.take_read()
        self.num_bad = len(own)
        bad = [sample for share in collectives.gather_objects(own) for sample in share]
        max_fraction = self.stage.config.data.max_bad_fraction
        check_split(max_fraction, self._num_samples, bad, self.source.split)


def first_samples(source: Source, max_samples: int | None) -> np.ndarray:
    """Ids of the first `max_samples` included samples of a split (None: of all), int64."""
    num_samples = min(source.num_included, max_samples or source.num_included)
    return source.all_included[np.arange(num_samples)]


def validation_subset(source: Source, config: RunConfig) -> np.ndarray:
    """Ids of the samples to validate on, in ascending order, int64.

    `training.validate_samples` of them are drawn from the entire split by the seed, so that every
    validation of a run, on any number of ranks, measures the same ones.
    """
    num_samples, size = config.training.validate_samples, source.num_included
    if num_samples is None or num_samples >= size:
        return first_samples(source, None)
    drawn = Bijection(size, config.seed, _SUBSET_KEY)(np.arange(num_samples))
    return source.all_included[np.sort(drawn)]


def subset_batches(stage: Stage, source: Source, device: torch.device) -> SplitBatches:
    """This rank's micro-batches of the validation subset."""
    return SplitBatches(stage, source, device, validation_subset(source, stage.config))


def validate(
    stage: Stage,
    forward: Callable[[Batch], StageOutput],
    batches: Iterable[LocatedBatch],
    group_size: int = 1,
) -> dict[str, float]:
    """Metrics of the stage over the `batches` of all ranks; every rank must call it, without gradient.

    The stage sees `group_size` batches at a time (`SplitBatches.group_size`).
    """
    sums, remaining = RunningSums(), iter(batches)
    while group := [batch for _, batch in itertools.islice(remaining, group_size)]:
        for batch in stage.begin_step(forward, group, over_ranks=False):
            # A long fp32 sum would lose precision and depend on the number of ranks.
            sums.add({name: pair.double() for name, pair in forward(batch).logs.items()})
    return stage.metrics(sums.take())
