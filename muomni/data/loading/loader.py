"""Plan + source + view = a stream of batches for one rank.

A map-style dataset gets micro-batches of sample ids from the plan; PyTorch's DataLoader hands them to its
workers and returns them in order, so the stream is the same for any number of workers and needs no
worker state. A sample that cannot be decoded is left out of its micro-batch, counted and named: the
number of batches never changes, so ranks cannot drift apart.
"""

import logging
import time
from collections.abc import Iterable, Iterator

import torch
from torch.utils.data import DataLoader, Dataset

from muomni.data.loading.look_ahead import LookAhead
from muomni.data.sampling.order import generator
from muomni.data.sampling.plan import MicroBatch
from muomni.data.shards.source import Source
from muomni.data.views.base import Batch, View
from muomni.errors import DataError

logger = logging.getLogger(__name__)

AUGMENT_KEY = 4


class PlannedDataset(Dataset[Batch]):
    """Decodes the samples of a micro-batch and collates them."""

    def __init__(self, source: Source, view: View, seed: int) -> None:
        self.source = source
        self.view = view
        self.seed = seed
        self.reader = view.reader(source)

    def __getitem__(self, batch: MicroBatch) -> Batch:
        num_bad = 0
        rows = []
        epochs = batch.epochs or [[None] * len(row) for row in batch.rows]
        for row, row_epochs in zip(batch.rows, epochs, strict=True):
            examples = []
            for index, epoch in zip(row, row_epochs, strict=True):
                random = None
                if epoch is not None and self.view.augments:  # making one takes its time
                    random = generator(self.seed, epoch, index, AUGMENT_KEY)
                try:
                    examples.append(self.reader(index, random))
                except DataError as error:
                    num_bad += 1
                    logger.warning("left out %s: %s", self.source.describe(index), error)
            rows.append(examples)
        tensors = self.view.collate(rows)
        tensors["num_bad"] = torch.tensor(num_bad)
        return tensors


class CountedBatches:
    """Iterates batches and keeps the time that the caller waited for them (`wait_s`).

    Each batch says in `num_bad` how many of its samples could not be decoded; raises DataError when
    they add up to more than `max_bad_samples`.
    """

    def __init__(self, loader: DataLoader[Batch], max_bad_samples: int) -> None:
        self.wait_s = 0.0
        self.num_bad = 0
        self.max_bad_samples = max_bad_samples
        self._loader = loader

    def __iter__(self) -> Iterator[Batch]:
        batches = iter(self._loader)
        while True:
            start = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self.wait_s += time.perf_counter() - start
            self.num_bad += int(batch.pop("num_bad"))
            if self.num_bad > self.max_bad_samples:
                raise DataError(
                    f"{self.num_bad} samples could not be decoded, more than data.max_bad_samples="
                    f"{self.max_bad_samples}; see the warnings above, or run "
                    f"'python -m data_prep verify --decode 1' on the dataset"
                )
            yield batch


class Loader(CountedBatches):
    """The planned batches of one rank, decoded in `num_workers` processes."""

    def __init__(
        self,
        dataset: PlannedDataset,
        batches: Iterable[MicroBatch],
        num_workers: int = 0,
        prefetch: int = 4,
        pin_memory: bool = False,
        max_bad_samples: int = 0,
    ) -> None:
        loader = DataLoader(
            dataset,
            # One "index" is one micro-batch.
            sampler=LookAhead(batches, dataset.reader) if dataset.source.is_remote else batches,  # type: ignore[arg-type]
            batch_size=None,
            num_workers=num_workers,
            prefetch_factor=prefetch if num_workers else None,
            pin_memory=pin_memory,
            # The global generator belongs to the model: drawing from it here would shift the dropout
            # of a resumed run.
            generator=torch.Generator(),
            # Workers must not inherit the threads and locks of a process that runs collectives.
            multiprocessing_context="forkserver" if num_workers else None,
        )
        super().__init__(loader, max_bad_samples)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Copy a batch to the device without waiting for it (pinned memory makes the copy asynchronous)."""
    if device.type == "cpu":
        return batch
    return {key: tensor.to(device, non_blocking=True) for key, tensor in batch.items()}


class DeviceCopies:
    """Copies batches to a device; on a GPU by a stream of its own.

    The host queues a step while the GPU still works on the one before. In the stream of that work a copy
    would wait for all of it; here it runs beside it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, batch: Batch) -> Batch:
        """The batch on the device; what the current stream does from now on sees it whole."""
        if self._stream is None:
            return to_device(batch, self.device)
        with torch.cuda.stream(self._stream):
            copied = to_device(batch, self.device)
        compute = torch.cuda.current_stream(self.device)
        compute.wait_stream(self._stream)
        for tensor in copied.values():
            tensor.record_stream(compute)  # its memory is not given away before that work is done
        return copied
