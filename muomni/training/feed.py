"""Sources of training micro-batches: planned from indexed shards, or streamed from tars without an index."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from muomni.config.run import DataSection, RunConfig, StreamSection
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
from muomni.distributed import collectives
from muomni.distributed.discovery import Ranks, cores_of_rank
from muomni.errors import ConfigError

# Each one imports torch, and its batches wait in memory.
_MOST_WORKERS = 16


@dataclass(frozen=True, slots=True)
class Reading:
    """Settings that both kinds of feeds need."""

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
        return loader_options(self.config.data, self.device)


def loader_options(data: DataSection, device: torch.device) -> dict[str, Any]:
    """Options of the loaders of a rank, for training and validation."""
    return {
        "num_workers": num_workers(data, device),
        "prefetch": data.prefetch,
        "pin_memory": device.type == "cuda",
        "max_bad_samples": data.max_bad_samples,
    }


def num_workers(data: DataSection, device: torch.device) -> int:
    """Worker processes of a rank. CPU ranks need their cores for training."""
    if data.num_workers != "auto":
        return data.num_workers
    return min(cores_of_rank() - 1, _MOST_WORKERS) if device.type == "cuda" else 0


@dataclass(frozen=True, slots=True)
class ReadBatch:
    """A micro-batch on the host, and the readable origin of each of its samples."""

    batch: Batch
    origins: list[dict[str, Any]]


class Feed(ABC):
    """The training micro-batches of this rank, the same number per step on every rank.

    `digest` identifies the order of samples, `fingerprint` the samples (for streams, their addresses and
    counts); both are the same for any number of ranks.
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
        """Number of optimizer steps in `num_epochs`."""

    @abstractmethod
    def loader(self, step: int) -> CountedBatches:
        """The endless micro-batches of this rank after `step` finished steps."""

    @abstractmethod
    def read(self, step: int, max_batches: int | None = None) -> list[ReadBatch]:
        """Read the first micro-batches of this rank after `step` finished steps, without workers."""

    @abstractmethod
    def count_epochs(self, num_epochs: int) -> None:
        """Count the steps of the first epochs; every rank must call it."""

    @abstractmethod
    def count_ahead(self, step: int, num_steps: int) -> None:
        """Count what the loader may need during step `step` of `num_steps`; every rank must call it."""

    def _num_read(self, max_batches: int | None) -> int:
        return min(self.num_accumulation, max_batches or self.num_accumulation)


class SharedCounts:
    """Counts the packing windows of each epoch of a plan on all ranks together, ahead of training.

    Each rank counts an equal part, and all exchange their counts. This happens between steps, before the
    loader's prefetching reaches the epoch: inside the loader, ranks would reach it at different times. Every
    rank must make the same calls.
    """

    def __init__(self, plan: Plan, num_read_ahead: int, num_accumulation: int) -> None:
        self.plan = plan
        # Steps that workers may be ahead, rounded up, plus the one in progress.
        self._ahead = -(-num_read_ahead // num_accumulation) + 2

    def count_epochs(self, num_epochs: int) -> None:
        """Count the first `num_epochs` epochs."""
        while (epoch := self.plan.uncounted_epoch(num_epochs=num_epochs)) is not None:
            self._count(epoch)

    def count_ahead(self, step: int, num_steps: int) -> None:
        """Count what workers may fetch while step `step` of `num_steps` runs."""
        wanted = min(step + self._ahead, num_steps)
        while (epoch := self.plan.uncounted_epoch(step=wanted)) is not None:
            self._count(epoch)

    def _count(self, epoch: int) -> None:
        cache = self.plan.cache
        is_main = collectives.rank() == 0
        found = cache.find(epoch) if cache is not None and is_main else None
        counts = collectives.broadcast_object(found)
        if counts is None:
            windows, ranks = self.plan.windows.count, collectives.world_size()
            start, stop = (windows * (collectives.rank() + i) // ranks for i in range(2))
            shares = collectives.gather_objects(self.plan.count_windows(epoch, start, stop))
            counts = np.concatenate(shares)
            if cache is not None and is_main:
                cache.save(epoch, counts)
        self.plan.set_counts(epoch, counts)


class PlannedFeed(Feed):
    """The exact samples of a plan, on any number of ranks."""

    def __init__(self, reading: Reading, digest: str, source: Source, plan: Plan) -> None:
        super().__init__(reading, digest, source.fingerprint, source.num_included)
        self.source = source
        self.plan = plan
        options = reading.loader_options
        num_read_ahead = options["num_workers"] * options["prefetch"]
        self._counts = SharedCounts(plan, num_read_ahead, reading.num_accumulation)

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
    """Tars read sequentially, in an approximate order; see `muomni/data/loading/stream.py`."""

    def __init__(
        self,
        reading: Reading,
        digest: str,
        shards: Sequence[StreamShard],
        batch_size: int,
    ) -> None:
        num_samples = sum(shard.num_samples for shard in shards)
        super().__init__(reading, digest, fingerprint(shards), num_samples)
        ranks = reading.ranks
        num_readers = max(reading.loader_options["num_workers"], 1)
        self.order = StreamOrder(
            shards, batch_size, reading.config.seed, Reader(ranks.rank, ranks.world_size),
            num_readers, reading.num_accumulation,
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
        """Nothing to do: the config has the sample counts."""

    def count_ahead(self, step: int, num_steps: int) -> None:
        """Nothing to do: a stream has no windows."""


def stream_batch_size(stream: StreamSection, batching: Batching, stage: str) -> int:
    """Samples per streamed micro-batch: `batch.batch_size`, or `data.stream.samples_per_batch`.

    Raises ConfigError if a stage that batches by length lacks that setting, or another stage has it.
    """
    num_samples = stream.samples_per_batch
    if batching.mode == "bucket":
        if num_samples is None:
            raise ConfigError(
                f"stage {stage} batches by seconds, but a stream has no lengths; set "
                f"data.stream.samples_per_batch"
            )
        return num_samples
    if num_samples is not None:
        raise ConfigError(
            f"stage {stage} takes {batching.num_items} samples per micro-batch from a stream, as "
            f"batch.batch_size says; remove data.stream.samples_per_batch"
        )
    return batching.num_items


def _without_count(batch: Batch) -> Batch:
    """Drop the number of samples that failed to decode, as loaders do."""
    del batch["num_bad"]
    return batch
