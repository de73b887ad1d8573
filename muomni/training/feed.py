"""Where the micro-batches of a run come from: planned from shards with an index, or streamed without one."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from muomni.config.run import RunConfig, StreamSection
from muomni.data.loading.loader import CountedBatches, Loader, PlannedDataset
from muomni.data.loading.stream import (
    Reader,
    StreamDataset,
    StreamLoader,
    StreamOrder,
    StreamShard,
    fingerprint,
)
from muomni.data.sampling.plan import Batching, Plan
from muomni.data.shards.source import Source
from muomni.data.views.base import Batch, View
from muomni.distributed.discovery import Ranks
from muomni.errors import ConfigError
from muomni.training.shared_counts import SharedCounts


@dataclass(frozen=True, slots=True)
class Reading:
    """Who reads for which run: what feeds of both kinds need to know."""

    config: RunConfig
    view: View[Any]
    ranks: Ranks
    device: torch.device
    micro_batches_per_step: int

    @property
    def num_accumulation(self) -> int:
        return self.micro_batches_per_step // self.ranks.world_size

    @property
    def loader_options(self) -> dict[str, Any]:
        data = self.config.data
        return {
            "num_workers": data.num_workers,
            "prefetch": data.prefetch,
            "pin_memory": self.device.type == "cuda",
            "max_bad_samples": data.max_bad_samples,
        }


@dataclass(frozen=True, slots=True)
class ReadBatch:
    """A micro-batch on the host, and where each of its samples comes from, for people."""

    batch: Batch
    origins: list[dict[str, Any]]


class Feed(ABC):
    """The training micro-batches of this rank, step by step and equally many on every rank.

    `digest` changes when the order of samples would, `fingerprint` when the samples do (of a stream, whose
    bytes are not known, when its addresses or counts do); both are the same on any number of ranks.
    """

    def __init__(self, reading: Reading, digest: str, fingerprint: str, num_samples: int) -> None:
        self.reading = reading
        self.digest = digest
        self.fingerprint = fingerprint
        self.num_samples = num_samples

    @property
    def micro_batches_per_step(self) -> int:
        return self.reading.micro_batches_per_step

    @property
    def num_accumulation(self) -> int:
        return self.reading.num_accumulation

    @abstractmethod
    def num_steps(self, num_epochs: int) -> int:
        """Optimizer steps of so many epochs."""

    @abstractmethod
    def loader(self, step: int) -> CountedBatches:
        """The endless micro-batches of this rank after `step` finished steps."""

    @abstractmethod
    def read(self, step: int, max_batches: int | None = None) -> list[ReadBatch]:
        """The first micro-batches of this rank in the step after `step` finished ones, by this process."""

    @abstractmethod
    def count_epochs(self, num_epochs: int) -> None:
        """Find out together how many steps the first epochs have; every rank must call it."""

    @abstractmethod
    def count_ahead(self, step: int, num_steps: int) -> None:
        """Find out together what a loader may need during a step of `num_steps`; every rank must call it."""

    def _num_read(self, max_batches: int | None) -> int:
        return min(self.num_accumulation, max_batches or self.num_accumulation)


class PlannedFeed(Feed):
    """Exactly what a plan says, on any number of ranks."""

    def __init__(self, reading: Reading, digest: str, source: Source, plan: Plan) -> None:
        super().__init__(reading, digest, source.fingerprint, source.num_included)
        self.source = source
        self.plan = plan
        self._counts = SharedCounts(plan, reading.config.data, reading.num_accumulation)

    def num_steps(self, num_epochs: int) -> int:
        return self.plan.num_steps(num_epochs)

    def loader(self, step: int) -> CountedBatches:
        ranks = self.reading.ranks
        batches = self.plan.rank_batches(step, ranks.rank, ranks.world_size)
        return Loader(self._dataset(), batches, **self.reading.loader_options)

    def read(self, step: int, max_batches: int | None = None) -> list[ReadBatch]:
        dataset = self._dataset()
        ranks = self.reading.ranks
        numbers = self.plan.rank_batches(step, ranks.rank, ranks.world_size)
        planned = [next(numbers) for _ in range(self._num_read(max_batches))]
        return [
            ReadBatch(_without_count(dataset[micro]), [self.source.origin(i) for i in micro.ids])
            for micro in planned
        ]

    def count_epochs(self, num_epochs: int) -> None:
        self._counts.count_epochs(num_epochs)

    def count_ahead(self, step: int, num_steps: int) -> None:
        self._counts.count_ahead(step, num_steps)

    def _dataset(self) -> PlannedDataset:
        return PlannedDataset(self.source, self.reading.view, self.reading.config.seed)


class StreamFeed(Feed):
    """Tars from front to back; approximate, see `muomni/data/loading/stream.py`."""

    def __init__(
        self,
        reading: Reading,
        digest: str,
        shards: Sequence[StreamShard],
        batch_size: int,
    ) -> None:
        num_samples = sum(shard.num_samples for shard in shards)
        super().__init__(reading, digest, fingerprint(shards), num_samples)
        ranks, num_workers = reading.ranks, max(reading.config.data.num_workers, 1)
        self.order = StreamOrder(
            shards, batch_size, reading.config.seed, Reader(ranks.rank, ranks.world_size),
            num_workers, reading.num_accumulation,
        )  # fmt: skip

    def num_steps(self, num_epochs: int) -> int:
        return num_epochs * self.order.steps_per_epoch

    def loader(self, step: int) -> CountedBatches:
        return StreamLoader(self.order, self.reading.view, step, **self.reading.loader_options)

    def read(self, step: int, max_batches: int | None = None) -> list[ReadBatch]:
        dataset = StreamDataset(self.order, self.reading.view)
        first = step * self.num_accumulation
        read = []
        for number in range(first, first + self._num_read(max_batches)):
            batch, samples = dataset.read(number)
            origins = [{"key": s["__key__"], "shard": s["__url__"]} for s in samples]
            read.append(ReadBatch(_without_count(batch), origins))
        return read

    def count_epochs(self, num_epochs: int) -> None:
        """Nothing: the counts of samples that were given say it."""

    def count_ahead(self, step: int, num_steps: int) -> None:
        """Nothing: a stream has no windows."""


def stream_batch_size(stream: StreamSection, batching: Batching, stage: str) -> int:
    """Samples of a streamed micro-batch: one a row, or as `data.stream.samples_per_batch` says.

    Raises ConfigError when a stage that batches by length is not told, or another one is.
    """
    given = stream.samples_per_batch
    if batching.mode == "bucket":
        if given is None:
            raise ConfigError(
                f"stage {stage} batches by seconds, and a stream knows no lengths; give "
                f"data.stream.samples_per_batch"
            )
        return given
    if given is not None:
        raise ConfigError(
            f"stage {stage} takes {batching.num_items} samples a micro-batch from a stream, by "
            f"batch.{'size' if batching.mode == 'fixed' else 'rows'}; leave data.stream.samples_per_batch out"
        )
    return batching.num_items


def _without_count(batch: Batch) -> Batch:
    """A batch without the number of samples that could not be decoded, which loaders take out."""
    del batch["num_bad"]
    return batch
