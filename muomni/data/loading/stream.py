"""Training samples from tars without an index, read sequentially: pipes and foreign URLs.

The shards of an epoch are shuffled by (seed, epoch) and distributed over ranks and their workers. A worker
at the end of its shards starts over, so all ranks run the same number of steps. Order and resuming are
approximate: samples of a shard stay together, some are repeated or missed in an epoch, and the position
is valid only for the same number of ranks and workers and correct sample counts. Shards with manifest
and index have none of these limits (`loader.py`).
"""

import itertools
import logging
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from braceexpand import braceexpand
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from muomni.data.loading.bad_samples import BadSample
from muomni.data.loading.loader import (
    AUGMENT_KEY,
    CountedBatches,
    LoadedBatch,
    end_with_rank,
    start_fork_server,
)
from muomni.data.sampling.order import generator
from muomni.data.shards.manifest import hash64
from muomni.data.views.base import Example, View
from muomni.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

# Part of a stream's digest: increase it if the same settings yield another order.
STREAM_VERSION = 1

_SHARD_KEY = 5
_PIPE = "pipe:"

Sample = dict[str, Any]


@dataclass(frozen=True, slots=True)
class StreamShard:
    """A tar, by URL (of fsspec), path, or `pipe:COMMAND`, and its number of samples."""

    url: str
    num_samples: int


@dataclass(frozen=True, slots=True)
class Reader:
    """The reading rank: `rank` of `num_ranks`."""

    rank: int = 0
    num_ranks: int = 1


def stream_shards(patterns: Iterable[str], samples_per_shard: int) -> list[StreamShard]:
    """Expand brace patterns such as `s3://bucket/x-{000000..000099}.tar` to shards, in order.

    Raises `ConfigError` if there are none or one is repeated.
    """
    urls = [url for pattern in patterns for url in braceexpand(pattern)]
    if not urls or samples_per_shard < 1:
        raise ConfigError("data.stream needs at least one shard and at least one sample per shard")
    if repeated := sorted({url for url in urls if urls.count(url) > 1}):
        raise ConfigError(f"data.stream.shards lists {repeated[0]} twice; list each shard once")
    return [StreamShard(url, samples_per_shard) for url in urls]


def fingerprint(shards: Iterable[StreamShard]) -> str:
    """A string that changes with the shards or their numbers of samples; reads nothing."""
    return "stream:" + "+".join(f"{shard.url}:{shard.num_samples}" for shard in shards)


def check_local(shards: Iterable[StreamShard]) -> None:
    """Raise `DataError` if a shard given by path does not exist; URLs and pipes are not checked."""
    for shard in shards:
        is_path = "://" not in shard.url and not shard.url.startswith(_PIPE)
        if is_path and not Path(shard.url).is_file():
            raise DataError(
                f"shard {shard.url} of data.stream does not exist; correct data.stream.shards"
            )


class StreamOrder:
    """Assigns samples to the micro-batches of a rank, from sample counts alone.

    An epoch of a rank has `batches_per_epoch` micro-batches of `batch_size` samples: complete steps of
    `accumulation` micro-batches, with all samples divided by the ranks. Batch k of a rank, numbered
    through all epochs, comes from worker k mod `num_workers`.
    """

    def __init__(
        self,
        shards: Sequence[StreamShard],
        batch_size: int,
        seed: int,
        reader: Reader,
        num_workers: int = 1,
        accumulation: int = 1,
    ) -> None:
        self.shards = shards
        self.batch_size = batch_size
        self.seed = seed
        self.reader = reader
        self.num_workers = num_workers
        self.accumulation = accumulation
        num_samples = sum(shard.num_samples for shard in shards)
        samples_per_step = batch_size * accumulation * reader.num_ranks
        self.steps_per_epoch = max(num_samples // samples_per_step, 1)

    @property
    def batches_per_epoch(self) -> int:
        return self.steps_per_epoch * self.accumulation

    def shards_of(self, epoch: int, worker: int) -> list[StreamShard]:
        """The shards that a worker of this rank reads in an epoch, in order; never empty."""
        order = generator(self.seed, epoch, _SHARD_KEY).permutation(len(self.shards)).tolist()
        number = worker * self.reader.num_ranks + self.reader.rank
        num_readers = self.num_workers * self.reader.num_ranks
        # With more readers than shards, some read the same shard.
        mine = order[number::num_readers] or [order[number % len(order)]]
        return [self.shards[index] for index in mine]

    def start(self, epoch: int, worker: int, num_batches: int) -> tuple[int, int]:
        """The position of a worker after `num_batches` of an epoch.

        Returns the number of its next shard, counted through repetitions, and the samples to skip in it.
        """
        shards = self.shards_of(epoch, worker)
        num_samples = num_batches * self.batch_size
        passes, rest = divmod(num_samples, sum(shard.num_samples for shard in shards))
        number = passes * len(shards)
        for shard in shards:
            if rest < shard.num_samples:
                break
            rest -= shard.num_samples
            number += 1
        return number, rest


class StreamDataset(IterableDataset[LoadedBatch]):
    """Endless micro-batches of one rank, from batch `first_batch` on.

    Each sample is one sequence: without known lengths, nothing is packed or bucketed.
    """

    def __init__(self, order: StreamOrder, view: View[Example], first_batch: int = 0) -> None:
        self.order = order
        self.view = view
        self.first_batch = first_batch

    def __iter__(self) -> Iterator[LoadedBatch]:
        info = get_worker_info()
        # The loader asks its workers in turn, starting with worker 0.
        number = self.first_batch + (info.id if info is not None else 0)
        while True:
            epoch, within = divmod(number, self.order.batches_per_epoch)
            samples = self._samples(number)
            for _ in range(within, self.order.batches_per_epoch, self.order.num_workers):
                yield self._batch(epoch, self._take(samples))
                number += self.order.num_workers

    def read(self, number: int) -> tuple[LoadedBatch, list[Sample]]:
        """Batch `number` of this rank, numbered through all epochs, and its samples."""
        samples = self._take(self._samples(number))
        return self._batch(number // self.order.batches_per_epoch, samples), samples

    def _samples(self, number: int) -> Iterator[Sample]:
        """Endless samples of the worker that reads batch `number`, from that batch on in its epoch."""
        order = self.order
        epoch = number // order.batches_per_epoch
        worker, first_of_epoch = number % order.num_workers, epoch * order.batches_per_epoch
        # Earlier batches of this epoch by the same worker.
        first = first_of_epoch + (worker - first_of_epoch) % order.num_workers
        num_before = len(range(first, number, order.num_workers))
        shards = order.shards_of(epoch, worker)
        start, skip = order.start(epoch, worker, num_before)
        for index in itertools.count(start):
            yield from itertools.islice(read_shard(shards[index % len(shards)]), skip, None)
            skip = 0

    def _take(self, samples: Iterator[Sample]) -> list[Sample]:
        return list(itertools.islice(samples, self.order.batch_size))

    def _batch(self, epoch: int, samples: list[Sample]) -> LoadedBatch:
        bad = []
        sequences = []
        for sample in samples:
            key = sample["__key__"]
            random = None
            if self.view.augments:
                random = generator(self.order.seed, epoch, hash64(key), AUGMENT_KEY)
            try:
                sequences.append([self.view.example(sample, random)])
            except DataError as error:
                sequences.append([])
                bad.append(BadSample(f"sample {key} of {sample['__url__']}", str(error)))
                logger.warning("dropped %s: %s", *bad[-1])
        return LoadedBatch(self.view.collate(sequences), len(samples), tuple(bad), {})


class StreamLoader(CountedBatches):
    """Endless micro-batches of one rank, from optimizer step `step` on."""

    def __init__(
        self,
        order: StreamOrder,
        view: View[Example],
        step: int = 0,
        num_workers: int = 0,
        prefetch: int = 4,
        pin_memory: bool = False,
    ) -> None:
        if order.num_workers != max(num_workers, 1):
            raise ValueError(
                f"order has {order.num_workers} workers, got num_workers={num_workers}"
            )
        if num_workers:
            start_fork_server()
        loader = DataLoader(
            StreamDataset(order, view, step * order.accumulation),
            batch_size=None,
            num_workers=num_workers,
            prefetch_factor=prefetch if num_workers else None,
            pin_memory=pin_memory,
            generator=torch.Generator(),  # the global one belongs to the model
            multiprocessing_context="forkserver" if num_workers else None,
            worker_init_fn=end_with_rank,
        )
        super().__init__(loader)


def read_shard(shard: StreamShard) -> Iterator[Sample]:
    """The samples of a tar in order: "__key__", "__url__", and extension -> undecoded bytes.

    Raises `DataError` if it cannot be opened or read. Logs a warning if the number of samples differs
    from the declared one, since a truncated tar can look like a shorter one.
    """
    from webdataset.tariterators import group_by_keys, tar_file_expander

    num_samples = 0
    try:
        with _open(shard.url) as stream:
            members = tar_file_expander(iter([{"url": shard.url, "stream": stream}]))
            for sample in group_by_keys(members):
                num_samples += 1
                yield {
                    name: value
                    for name, value in sample.items()
                    if name in ("__key__", "__url__") or not name.startswith("__")
                }
    except (OSError, EOFError, ValueError, ImportError, tarfile.TarError) as error:
        raise DataError(
            f"cannot read {shard.url} after {num_samples} samples ({type(error).__name__}: {error}); check "
            "the URL or command, or remove the shard from data.stream.shards"
        ) from error
    if num_samples != shard.num_samples:
        logger.warning(
            "%s has %d samples, expected %d; it may be truncated",
            shard.url, num_samples, shard.num_samples,
        )  # fmt: skip
    if num_samples == 0:
        raise DataError(f"{shard.url} has no samples; remove it from data.stream.shards")


def _open(url: str) -> Any:
    """Open a URL or pipe as a binary stream (a context manager)."""
    if url.startswith(_PIPE):
        from webdataset.gopen import gopen_pipe

        return gopen_pipe(url)
    import fsspec

    files, path = fsspec.url_to_fs(url)
    return files.open(path, "rb")
