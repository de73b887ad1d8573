"""Sources of training micro-batches: planned from indexed shards, or streamed from tars without an index."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from muomni.checkpoint import file_list
from muomni.checkpoint.store import TrainState
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
from muomni.data.sampling.mix import MixSegment, configured_quotas, open_order
from muomni.data.sampling.plan import ORDER_VERSION, Batching, CountCache, Plan, batching_of
from muomni.data.shards.source import Source
from muomni.data.views.base import Batch, View
from muomni.distributed import collectives
from muomni.distributed.discovery import Ranks, cores_of_rank
from muomni.errors import CheckpointError, ConfigError
from muomni.io.hashing import sha256_bytes

# Each one imports torch, and its batches wait in memory.
_MOST_WORKERS = 16


@dataclass(frozen=True, slots=True)
class Reading:
    """Settings that both kinds of feeds need."""

    config: RunConfig
    view: View[Any]
    ranks: Ranks
    device: torch.device

    @property
    def loader_options(self) -> dict[str, Any]:
        return loader_options(self.config.data, self.device)


def loader_options(data: DataSection, device: torch.device) -> dict[str, Any]:
    """Options of the loaders of a rank, for training and validation."""
    return {
        "num_workers": num_workers(data, device),
        "prefetch": data.prefetch,
        "pin_memory": device.type == "cuda",
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
        # The digest of the checkpoint to resume from: another one, if this start changes the mix.
        self.resumed_digest = digest
        self.mix: list[dict[str, Any]] = []  # the segments of a mix, for checkpoints

    @property
    def dataset_names(self) -> list[str]:
        """Names of the datasets that batches count; empty for a stream."""
        return []

    @abstractmethod
    def num_micro_batches(self, step: int) -> int:
        """Micro-batches of each rank in optimizer step `step` (from 0)."""

    @property
    @abstractmethod
    def max_ranks(self) -> int:
        """The number of units in a global batch, on average; more ranks would have nothing to do."""

    @property
    @abstractmethod
    def accumulates(self) -> bool:
        """Whether some steps may have several micro-batches per rank."""

    @abstractmethod
    def num_steps(self, num_epochs: int) -> int:
        """Number of optimizer steps in `num_epochs`."""

    @abstractmethod
    def loader(self, step: int) -> CountedBatches:
        """The endless micro-batches of this rank after `step` finished steps."""

    @abstractmethod
    def read(self, step: int, max_batches: int | None = None) -> list[ReadBatch]:
        """Read the micro-batches of this rank in step `step` (from 0), or the first ones, without workers."""

    @abstractmethod
    def count_epochs(self, num_epochs: int) -> None:
        """Count the steps of the first epochs; every rank must call it."""

    @abstractmethod
    def count_ahead(self, step: int, num_steps: int) -> None:
        """Count what the loader may need during step `step` of `num_steps`; every rank must call it."""


class SharedCounts:
    """Counts the packing windows of each epoch of a plan on all ranks together, ahead of training.

    Each rank counts an equal part, and all exchange their counts. This happens between steps, before the
    loader's prefetching reaches the epoch: inside the loader, ranks would reach it at different times. Every
    rank must make the same calls.
    """

    def __init__(self, plan: Plan, num_read_ahead: int) -> None:
        self.plan = plan
        # Steps that workers may be ahead if a step has one micro-batch, plus the one in progress.
        self._ahead = num_read_ahead + 2

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
        self._counts = SharedCounts(plan, options["num_workers"] * options["prefetch"])

    @property
    def dataset_names(self) -> list[str]:
        return [manifest.name for manifest in self.source.manifests]

    def num_micro_batches(self, step: int) -> int:
        return self.plan.num_micro_batches(step, self.reading.ranks.world_size)

    @property
    def max_ranks(self) -> int:
        return self.plan.units_per_step

    @property
    def accumulates(self) -> bool:
        return self.plan.batching.units_per_step is None or self.num_micro_batches(0) > 1

    def num_steps(self, num_epochs: int) -> int:
        return self.plan.num_steps(num_epochs)

    def loader(self, step: int) -> CountedBatches:
        ranks = self.reading.ranks
        batches = self.plan.rank_batches(step, ranks.rank, ranks.world_size)
        return Loader(self._dataset(), batches, **self.reading.loader_options)

    def read(self, step: int, max_batches: int | None = None) -> list[ReadBatch]:
        dataset = self._dataset()
        ranks = self.reading.ranks
        planned = self.plan.rank_step(step, ranks.rank, ranks.world_size)[:max_batches]
        return [
            ReadBatch(dataset[micro].tensors, [self.source.origin(i) for i in micro.ids])
            for micro in planned
        ]

    def count_epochs(self, num_epochs: int) -> None:
        self._counts.count_epochs(num_epochs)

    def count_ahead(self, step: int, num_steps: int) -> None:
        self._counts.count_ahead(step, num_steps)

    def _dataset(self) -> PlannedDataset:
        return PlannedDataset(self.source, self.reading.view, self.reading.config.seed)


def open_plan(
    reading: Reading,
    tokenizer_digest: str,
    train: Source,
    checkpoint: Path | None,
    allow_mix_change: bool,
) -> PlannedFeed:
    """Open sharded datasets, whose order of samples is exact, with the mix that a checkpoint continues.

    Raises CheckpointError for another mix, unless `allow_mix_change`: then it applies to later steps.
    """
    config = reading.config
    lengths, batching = reading.view.lengths(train), batching_of(config.batch)

    def opened(segments: Sequence[MixSegment]) -> PlannedFeed:
        order = open_order(train, config.data, config.seed, batching.shuffle_window, segments)
        order_digest = digest_of(
            ORDER_VERSION, train.fingerprint, train.exclusion_digest, lengths.depends_on,
            tokenizer_digest, batching.depends_on, config.seed, order.depends_on,
        )  # fmt: skip
        cache = CountCache(train.manifests[0].root / train.split, order_digest)
        plan = Plan(lengths, batching, config.seed, train.describe, order, cache)
        feed = PlannedFeed(reading, order_digest, train, plan)
        feed.mix = [{**asdict(part), "quotas": list(part.quotas)} for part in segments]
        return feed

    if config.data.mix is None:
        return opened([])
    own = MixSegment(0, 0, configured_quotas(train, lengths, config.data.mix))
    if checkpoint is None:
        return opened([own])
    # If it is damaged, an earlier one is loaded, whose order is the same up to this one's step.
    state = TrainState.of(file_list.verify(checkpoint, with_hashes=False))
    segments = [MixSegment(m["step"], m["start"], tuple(m["quotas"])) for m in state.mix]
    if not segments:
        return opened([own])
    before = opened(segments)
    if before.digest != state.plan_digest or segments[-1].quotas == own.quotas:
        return before
    if not allow_mix_change:
        raise CheckpointError(
            f"data.mix differs from that of checkpoint {checkpoint}; restore it, or add --allow-mix-change to "
            f"continue with the new mix after step {state.step}"
        )
    start = before.plan.position_after(state.step)
    changed = opened([*segments, MixSegment(state.step, start, own.quotas)])
    changed.resumed_digest = before.digest
    return changed


class StreamFeed(Feed):
    """Tars read sequentially, in an approximate order; see `muomni/data/loading/stream.py`."""

    def __init__(
        self,
        reading: Reading,
        digest: str,
        shards: Sequence[StreamShard],
        samples_per_step: int,
        samples_per_micro_batch: int,
    ) -> None:
        num_samples = sum(shard.num_samples for shard in shards)
        super().__init__(reading, digest, fingerprint(shards), num_samples)
        ranks, num_readers = reading.ranks, max(reading.loader_options["num_workers"], 1)
        # Rounded up, so that all ranks read the same number of samples.
        of_rank = -(-samples_per_step // ranks.world_size)
        self._num_micro_batches = -(-of_rank // samples_per_micro_batch)
        self._samples_per_step = samples_per_step
        self.order = StreamOrder(
            shards, -(-of_rank // self._num_micro_batches), reading.config.seed,
            Reader(ranks.rank, ranks.world_size), num_readers, self._num_micro_batches,
        )  # fmt: skip

    def num_micro_batches(self, step: int) -> int:
        return self._num_micro_batches

    @property
    def max_ranks(self) -> int:
        return self._samples_per_step

    @property
    def accumulates(self) -> bool:
        return self._num_micro_batches > 1

    def num_steps(self, num_epochs: int) -> int:
        return num_epochs * self.order.steps_per_epoch

    def loader(self, step: int) -> CountedBatches:
        return StreamLoader(self.order, self.reading.view, step, **self.reading.loader_options)

    def read(self, step: int, max_batches: int | None = None) -> list[ReadBatch]:
        dataset = StreamDataset(self.order, self.reading.view)
        first = step * self._num_micro_batches
        read = []
        for number in range(first, first + self._num_micro_batches)[:max_batches]:
            batch, samples = dataset.read(number)
            origins = [{"key": s["__key__"], "shard": s["__url__"]} for s in samples]
            read.append(ReadBatch(batch.tensors, origins))
        return read

    def count_epochs(self, num_epochs: int) -> None:
        """Nothing to do: the config has the sample counts."""

    def count_ahead(self, step: int, num_steps: int) -> None:
        """Nothing to do: a stream has no windows."""


def digest_of(*parts: object) -> str:
    """Hash of what determines the order of samples."""
    return sha256_bytes("|".join(map(str, parts)).encode())


def stream_sizes(stream: StreamSection, batching: Batching, stage: str) -> tuple[int, int]:
    """Streamed samples per optimizer step and, at most, per micro-batch.

    Without lengths, a packed sequence holds one sample, and a bucket as many as the config says. Raises
    ConfigError if a stage that batches by length lacks these settings, or another stage has them.
    """
    sizes = (stream.samples_per_step, stream.samples_per_micro_batch)
    if batching.mode == "bucket":
        if None in sizes:
            raise ConfigError(
                f"stage {stage} batches by seconds, but a stream has no lengths; set "
                f"data.stream.samples_per_step and data.stream.samples_per_micro_batch"
            )
        return sizes  # type: ignore[return-value]
    if sizes != (None, None):
        raise ConfigError(
            f"stage {stage} takes {batching.global_size} samples per step from a stream, as section batch "
            f"says; remove data.stream.samples_per_step and data.stream.samples_per_micro_batch"
        )
    return batching.global_size, batching.micro_size


def dataset_facts(feed: Feed, val: Source | None) -> list[dict[str, Any]]:
    """Name, digest, source, split, and number of samples of each dataset; a stream counts as one."""
    facts: list[dict[str, Any]] = []
    if isinstance(feed, PlannedFeed):
        sources = [feed.source]
    else:
        stream, sources = feed.reading.config.data.stream, []
        facts.append({
            "name": "stream",
            "digest": sha256_bytes(feed.fingerprint.encode()),
            "source": ", ".join(stream.shards if stream else ()),
            "split": "train",
            "num_samples": feed.num_samples,
        })  # fmt: skip
    for source in [*sources, *([] if val is None else [val])]:
        facts += (
            {
                "name": manifest.name,
                "digest": manifest.fingerprint,
                "source": manifest.location,
                "split": source.split,
                "num_samples": manifest.splits[source.split].num_samples,
            }
            for manifest in source.manifests
        )
    return facts
