"""Loads the batches of one rank from plan, source, and view.

A map-style dataset decodes micro-batches of sample ids from the plan. PyTorch's DataLoader returns them in
order, so the stream is the same for any number of workers and needs no worker state. A sample that
cannot be decoded is dropped from its micro-batch, counted, and logged; the number of batches never
changes, so ranks stay in step.
"""

import logging
import multiprocessing
import os
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from multiprocessing import forkserver, resource_tracker
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from muomni.data.loading.bad_samples import BadSample
from muomni.data.sampling.order import generator
from muomni.data.sampling.plan import MicroBatch
from muomni.data.shards.source import Source
from muomni.data.views.base import HOST_KEYS, Batch, ExampleReader, View
from muomni.errors import DataError

logger = logging.getLogger(__name__)

AUGMENT_KEY = 4
_NUM_AHEAD = 256
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
_ANNOUNCE_EVERY = 32


class LoadedBatch(NamedTuple):
    """The tensors of a micro-batch, and what was read for it: `bad` of `num_samples` were dropped.

    `num_of_dataset` counts the samples of each dataset by its number, without the dropped ones.
    """

    tensors: Batch
    num_samples: int
    bad: tuple[BadSample, ...]
    num_of_dataset: dict[int, int]


class PlannedDataset(Dataset[LoadedBatch]):
    """Decodes and collates the samples of a micro-batch."""

    def __init__(self, source: Source, view: View, seed: int) -> None:
        self.source = source
        self.view = view
        self.seed = seed
        self.reader = view.reader(source)

    def __getitem__(self, batch: MicroBatch) -> LoadedBatch:
        bad, used = [], []
        sequences = []
        epochs = batch.epochs or [[None] * len(sequence) for sequence in batch.sequences]
        for sequence, sequence_epochs in zip(batch.sequences, epochs, strict=True):
            examples = []
            for index, epoch in zip(sequence, sequence_epochs, strict=True):
                random = None
                if epoch is not None and self.view.augments:  # a generator is slow to create
                    random = generator(self.seed, epoch, index, AUGMENT_KEY)
                try:
                    examples.append(self.reader(index, random))
                    used.append(index)
                except DataError as error:
                    bad.append(BadSample(self.source.describe(index), str(error)))
                    logger.warning("dropped %s: %s", *bad[-1])
            sequences.append(examples)
        tensors = self.view.collate(sequences)
        return LoadedBatch(tensors, len(batch.ids), tuple(bad), self._count_datasets(used))

    def _count_datasets(self, ids: list[int]) -> dict[int, int]:
        numbers = self.source.datasets_of(np.array(ids, dtype=np.int64))
        return dict(Counter(numbers.tolist()))


class LookAhead:
    """Iterates micro-batches and announces the samples of the next ones to the reader for prefetching.

    Looks 256 micro-batches ahead and announces every 32.
    """

    def __init__(self, batches: Iterable[MicroBatch], reader: ExampleReader[Any]) -> None:
        self.batches = batches
        self.reader = reader

    def __iter__(self) -> Iterator[MicroBatch]:
        upcoming: deque[MicroBatch] = deque()
        batches = iter(self.batches)
        num_yielded = 0
        is_end = False
        while True:
            while not is_end and len(upcoming) < _NUM_AHEAD:
                batch = next(batches, None)
                is_end = batch is None
                if batch is not None:
                    upcoming.append(batch)
            if not upcoming:
                return
            if num_yielded % _ANNOUNCE_EVERY == 0:
                ids = [index for batch in upcoming for index in batch.ids]
                self.reader.expect(np.array(ids, dtype=np.int64))
            num_yielded += 1
            yield upcoming.popleft()


class CountedBatches:
    """Iterates batches and measures the time spent waiting for them (`wait_s`).

    `take_read` and `take_num_of_dataset` return what was read for the batches since their last call.
    """

    def __init__(self, loader: DataLoader[LoadedBatch]) -> None:
        self.wait_s = 0.0
        self._num_samples = 0
        self._bad: list[BadSample] = []
        self._num_of_dataset: Counter[int] = Counter()
        self._loader = loader

    def take_read(self) -> tuple[int, list[BadSample]]:
        """Number of samples, dropped ones included, and the dropped ones."""
        taken = self._num_samples, self._bad
        self._num_samples, self._bad = 0, []
        return taken

    def take_num_of_dataset(self, num_datasets: int) -> list[float]:
        """Number of samples of each dataset, without the dropped ones."""
        taken, self._num_of_dataset = self._num_of_dataset, Counter()
        return [float(taken[number]) for number in range(num_datasets)]

    def __iter__(self) -> Iterator[Batch]:
        batches = iter(self._loader)
        while True:
            start = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self.wait_s += time.perf_counter() - start
            self._num_samples += batch.num_samples
            self._bad += batch.bad
            self._num_of_dataset.update(batch.num_of_dataset)
            yield batch.tensors


class Loader(CountedBatches):
    """The planned batches of one rank, decoded by `num_workers` processes."""

    def __init__(
        self,
        dataset: PlannedDataset,
        batches: Iterable[MicroBatch],
        num_workers: int = 0,
        prefetch: int = 4,
        pin_memory: bool = False,
    ) -> None:
        if num_workers:
            start_fork_server()
        loader = DataLoader(
            dataset,
            # One "index" is one micro-batch.
            sampler=LookAhead(batches, dataset.reader) if dataset.source.is_remote else batches,  # type: ignore[arg-type]
            batch_size=None,
            num_workers=num_workers,
            prefetch_factor=prefetch if num_workers else None,
            pin_memory=pin_memory,
            # Sampling from the model's global generator here would change the dropout of a resumed run.
            generator=torch.Generator(),
            # Workers must not inherit threads and locks of a process that runs collectives.
            multiprocessing_context="forkserver" if num_workers else None,
            worker_init_fn=end_with_rank,
        )
        super().__init__(loader)


def start_fork_server() -> None:
    """Start the process that loader workers are forked from, so that stop signals do not reach them.

    DeepSpeed's launcher and Ctrl-C signal the processes below a rank, too, and without its workers a rank could
    not finish the step and save. Workers inherit the blocked signals, and end with their rank.
    """
    resource_tracker.ensure_running()  # its start, which the next one includes, unblocks signals
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with_rank(worker: int) -> None:
    """End this worker when its rank has ended in any way; the `worker_init_fn` of loaders.

    torch watches the parent process, which is the fork server; and that one waits for its workers.
    """
    rank = multiprocessing.parent_process()
    assert rank is not None

    def watch() -> None:
        rank.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Copy a batch to the device, except `HOST_KEYS`; asynchronous if it is in pinned memory."""
    if device.type == "cpu":
        return batch
    return {
        key: tensor if key in HOST_KEYS else tensor.to(device, non_blocking=True)
        for key, tensor in batch.items()
    }


class DeviceCopies:
    """Copies batches to a device, on a GPU in a separate CUDA stream.

    The host queues a step while the GPU still computes the previous one. A copy in the compute stream
    would wait for that step; in its own stream it overlaps.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, batch: Batch) -> Batch:
        """The batch on the device, ordered before all later work of the current stream."""
        if self._stream is None:
            return to_device(batch, self.device)
        with torch.cuda.stream(self._stream):
            copied = to_device(batch, self.device)
        compute = torch.cuda.current_stream(self.device)
        compute.wait_stream(self._stream)
        for key, tensor in copied.items():
            if key not in HOST_KEYS:
                tensor.record_stream(compute)  # keeps the memory until that work is done
        return copied
