"""The order of micro-batches: a pure function of (seed, order of samples, lengths, batching).

No sample is read here. The endless stream of samples (`order`) is split into shuffle windows. Within a
window, samples become *items*: packed sequences (`pack`), buckets of similar length (`bucket`), or single
samples (`fixed`). The items of all windows and epochs form an endless stream again: a micro-batch is the
next few items, an optimizer step the next G micro-batches, and rank r of W takes r, r+W, ... of them.
So no sample is dropped, no step is short, every rank has the same number of steps, and the steps are the
same for every W that divides G (contract *Plan* in docs/architecture.md).

Seeking needs the number of items in each window (`count_windows`): known for `fixed`, otherwise counted
once per epoch. Only the window at the position is then built.
"""

import os
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from muomni.data.sampling.lengths import MAX_FULL_SCAN, Lengths
from muomni.data.sampling.order import EvenWindows, Order, SampleOrder, shuffled
from muomni.data.sampling.packing import bucket_ends, pack_best_fit
from muomni.data.shards.exclusion_mask import IncludedSamples
from muomni.errors import ConfigError, DataError
from muomni.io.atomic_write import open_atomic

# Part of a plan's digest: increase it if the same settings yield another order.
ORDER_VERSION = 2

_ITEMS_KEY = 3
_MAX_CACHED_WINDOWS = 8
_MAX_CACHED_EPOCHS = 4
# Fewer windows are faster to count than to read from a file.
_MIN_CACHED_COUNTS = 256


@dataclass(frozen=True, slots=True)
class Batching:
    """How a shuffle window of samples becomes micro-batches.

    `fixed`: `size` samples. `bucket`: samples of similar length whose count times longest length is at
    most `size`. `pack`: `num_sequences` sequences of at most `size` length units, each packed with samples.
    """

    mode: Literal["fixed", "bucket", "pack"]
    size: int
    num_sequences: int = 1
    shuffle_window: int = 2048

    @property
    def size_key(self) -> str:
        """The config key that sets `size`."""
        keys = {"fixed": "batch_size", "bucket": "max_seconds", "pack": "seq_len"}
        return f"batch.{keys[self.mode]}"

    @property
    def num_items(self) -> int:
        """Items per micro-batch: samples, sequences, or one bucket."""
        return {"fixed": self.size, "bucket": 1, "pack": self.num_sequences}[self.mode]

    @property
    def depends_on(self) -> str:
        """All fields, for digests; checkpoints store those, so this text must not change."""
        return (
            f"Batching(mode={self.mode!r}, size={self.size}, num_sequences={self.num_sequences}, "
            f"window={self.shuffle_window})"
        )


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """The sample ids of each sequence of one forward pass.

    `epochs` holds the epoch of each sample, which seeds its augmentation together with seed and sample id;
    None (in evaluation) means no augmentation.
    """

    sequences: tuple[tuple[int, ...], ...]
    epochs: tuple[tuple[int, ...], ...] | None = None

    @property
    def ids(self) -> list[int]:
        return [sample for sequence in self.sequences for sample in sequence]


@dataclass(frozen=True, slots=True)
class _Window:
    """Sample ids and epochs of a window, int64 [n], and the indices into them of each item."""

    ids: np.ndarray
    epochs: np.ndarray
    items: list[list[int]]


class CountCache:
    """Number of items of each window, cached beside the shards as `.counts-DIGEST-EPOCH.npy`.

    Counting the windows of 10^9 samples takes minutes; a resumed run reads the counts instead. `digest`
    covers everything that determines the counts. If `folder` is read-only, nothing is cached.
    """

    def __init__(self, folder: Path, digest: str) -> None:
        self.folder = folder
        self.digest = digest

    def find(self, epoch: int) -> np.ndarray | None:
        """Counts of an epoch, int32 [num_windows], or None if not cached."""
        path = self._path(epoch)
        return np.load(path) if path.is_file() else None

    def save(self, epoch: int, counts: np.ndarray) -> None:
        """Cache the counts of an epoch, unless there are too few to be worth a file."""
        if len(counts) >= _MIN_CACHED_COUNTS and os.access(self.folder, os.W_OK):
            with open_atomic(self._path(epoch)) as file:
                np.save(file, counts)

    def _path(self, epoch: int) -> Path:
        return self.folder / f".counts-{self.digest[:16]}-{epoch}.npy"


class Plan:
    """The micro-batches of all epochs; `micro_batches_per_step` is G.

    `lengths` holds the length of each sample in the unit of `batching.size` (ignored for `fixed`).
    `order` defaults to each sample once per epoch. `describe` names a sample in error messages.

    Raises DataError if there is no sample, fewer than one step needs, or one longer than a sequence or
    bucket. Above `MAX_FULL_SCAN` samples, a sample that is too long is found only with its window.
    """

    def __init__(
        self,
        lengths: Lengths | np.ndarray,
        batching: Batching,
        micro_batches_per_step: int,
        seed: int,
        describe: Callable[[int], str] = "sample {}".format,
        order: Order | None = None,
        cache: CountCache | None = None,
    ) -> None:
        if len(lengths) == 0:
            raise DataError("the plan has no samples; check the split and the filters")
        self.lengths = Lengths.of_array(lengths) if isinstance(lengths, np.ndarray) else lengths
        self.batching = batching
        self.micro_batches_per_step = micro_batches_per_step
        self.seed = seed
        self.describe = describe
        window_size = batching.shuffle_window
        self.order = order or SampleOrder(IncludedSamples(len(lengths)), seed, window_size)
        self.windows = EvenWindows(self.order.epoch_size, window_size)
        self.cache = cache
        self._ends: list[int] = [0]  # items in the stream before each counted epoch
        self._starts: OrderedDict[int, np.ndarray] = OrderedDict()  # epoch -> starts of its windows
        self._built: OrderedDict[tuple[int, int], _Window] = OrderedDict()
        if batching.mode != "fixed" and self.order.epoch_size <= MAX_FULL_SCAN:
            ids = self.order.sample_ids()
            self._check_longest(ids, self.lengths[ids])
        self._check_enough()

    # -- steps and micro-batches -------------------------------------------------------------------
    def num_steps(self, num_epochs: int) -> int:
        """Optimizer steps in `num_epochs` epochs; the next epoch completes the last step."""
        return -(-self._num_items(num_epochs) // self._items_per_step)

    def step(self, step: int) -> list[MicroBatch]:
        """The G micro-batches of optimizer step `step` (from 0)."""
        group = self.micro_batches_per_step
        return [self.micro_batch(number) for number in range(step * group, (step + 1) * group)]

    def rank_batches(self, start_step: int, rank: int, world_size: int) -> Iterator[MicroBatch]:
        """Endless micro-batches of one rank, from optimizer step `start_step` (from 0)."""
        check_world_size(self.micro_batches_per_step, world_size)
        number = start_step * self.micro_batches_per_step + rank
        while True:  # G is a multiple of W, so stride W stays on this rank's micro-batches
            yield self.micro_batch(number)
            number += world_size

    def micro_batch(self, number: int) -> MicroBatch:
        """Micro-batch `number` of the endless stream."""
        width = self.batching.num_items
        if self.batching.mode == "fixed":
            ids, epochs = self.order.samples(number * width, (number + 1) * width)
            return MicroBatch(_singles(ids.tolist()), _singles(epochs.tolist()))
        sequences, sequence_epochs = [], []
        for item in range(number * width, (number + 1) * width):
            epoch, window_number, index = self._locate(item)
            window = self._window(epoch, window_number)
            members = window.items[index]
            sequences.append(window.ids[members].tolist())
            sequence_epochs.append(window.epochs[members].tolist())
        if self.batching.mode == "bucket":
            return MicroBatch(_singles(sequences[0]), _singles(sequence_epochs[0]))
        return MicroBatch(tuple(map(tuple, sequences)), tuple(map(tuple, sequence_epochs)))

    # -- item counts -------------------------------------------------------------------------------
    def count_windows(self, epoch: int, start: int, stop: int) -> np.ndarray:
        """Items of the windows [start, stop) of an epoch, int32 [stop - start]."""
        counts = [self._count(self._samples(epoch, number)[2]) for number in range(start, stop)]
        return np.array(counts, dtype=np.int32)

    def uncounted_epoch(self, num_epochs: int | None = None, step: int = 0) -> int | None:
        """The next epoch to count before the length of `num_epochs` epochs, or all micro-batches of the
        first `step` steps, are known; None if there is none."""
        known = len(self._ends) - 1
        if self.batching.mode == "fixed":
            return None
        if num_epochs is not None:
            return known if known < num_epochs else None
        return known if self._ends[-1] < step * self._items_per_step else None

    def set_counts(self, epoch: int, counts: np.ndarray) -> None:
        """Set the counts of all windows of an epoch: one that is counted already, or the next."""
        starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        if epoch == len(self._ends) - 1:
            self._ends.append(self._ends[-1] + int(starts[-1]))
        if len(self._starts) == _MAX_CACHED_EPOCHS:
            self._starts.popitem(last=False)
        self._starts[epoch] = starts

    @property
    def _items_per_step(self) -> int:
        return self.micro_batches_per_step * self.batching.num_items

    def _num_items(self, num_epochs: int) -> int:
        if self.batching.mode == "fixed":
            return num_epochs * self.order.epoch_size
        while len(self._ends) <= num_epochs:
            self._window_starts(len(self._ends) - 1)
        return self._ends[num_epochs]

    def _window_starts(self, epoch: int) -> np.ndarray:
        """Items of an epoch before each of its windows, then the total: int64 [num_windows + 1]."""
        if epoch not in self._starts:
            counts = self.cache.find(epoch) if self.cache is not None else None
            if counts is None:
                counts = self.count_windows(epoch, 0, self.windows.count)
                if self.cache is not None:
                    self.cache.save(epoch, counts)
            self.set_counts(epoch, counts)
        self._starts.move_to_end(epoch)
        return self._starts[epoch]

    def _locate(self, item: int) -> tuple[int, int, int]:
        """Epoch, window, and index within the window of an item of the stream."""
        while self._ends[-1] <= item:
            self._window_starts(len(self._ends) - 1)
        epoch = int(np.searchsorted(self._ends, item, side="right")) - 1
        starts = self._window_starts(epoch)
        within = item - self._ends[epoch]
        window = int(np.searchsorted(starts, within, side="right")) - 1
        return epoch, window, within - int(starts[window])

    # -- windows -----------------------------------------------------------------------------------
    def _window(self, epoch: int, number: int) -> _Window:
        if (epoch, number) not in self._built:
            if len(self._built) == _MAX_CACHED_WINDOWS:
                self._built.popitem(last=False)
            self._built[epoch, number] = self._build(epoch, number)
        self._built.move_to_end((epoch, number))
        return self._built[epoch, number]

    def _build(self, epoch: int, number: int) -> _Window:
        ids, epochs, lengths = self._samples(epoch, number)
        random = (self.seed, epoch, number, _ITEMS_KEY)
        if self.batching.mode == "pack":
            items = pack_best_fit(lengths, self.batching.size)
            order = shuffled(len(items), *random).tolist()
        else:
            items = _buckets(lengths, self.batching.size)
            first = self._ends[epoch] + int(self._window_starts(epoch)[number])
            order = group_similar_costs(len(items), first, self.micro_batches_per_step, random)
        return _Window(ids, epochs, [items[index] for index in order])

    def _samples(self, epoch: int, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Sample ids, epochs, and lengths of a window, int64 [n]."""
        start, stop = (epoch * self.order.epoch_size + x for x in self.windows.bounds(number))
        ids, epochs = self.order.samples(start, stop)
        lengths = self.lengths[ids]
        self._check_longest(ids, lengths)
        return ids, epochs, lengths

    def _count(self, lengths: np.ndarray) -> int:
        if self.batching.mode == "pack":
            return len(pack_best_fit(lengths, self.batching.size))
        return len(bucket_ends(np.sort(lengths).tolist(), self.batching.size))

    # -- checks ------------------------------------------------------------------------------------
    def _check_longest(self, ids: np.ndarray, lengths: np.ndarray) -> None:
        worst = int(lengths.argmax())
        if lengths[worst] > self.batching.size:
            unit = " mel frames (10 ms each)" if self.batching.mode == "bucket" else ""
            raise DataError(
                f"{self.describe(int(ids[worst]))} has length {int(lengths[worst])}{unit}, but "
                f"{self.batching.size_key} allows {self.batching.size}; raise it or remove the sample from "
                f"the corpus"
            )

    def _check_enough(self) -> None:
        """Check that an epoch has enough items for one step; counts as few windows as possible."""
        if self.batching.mode == "fixed":
            num_items = self.order.epoch_size
        else:
            num_items = window = 0
            while num_items < self._items_per_step and window < self.windows.count:
                num_items += int(self.count_windows(0, window, window + 1)[0])
                window += 1
        if num_items < self._items_per_step:
            raise DataError(
                f"{self.order.epoch_size} samples make {num_items // self.batching.num_items} micro-batches, "
                f"but one step needs {self.micro_batches_per_step}; lower {self.batching.size_key} or "
                f"batch.micro_batches_per_step, or add data"
            )


def check_world_size(micro_batches_per_step: int, world_size: int) -> None:
    """Raise ConfigError, listing the valid numbers of ranks, unless they divide a step evenly."""
    if micro_batches_per_step % world_size:
        legal = [n for n in range(1, micro_batches_per_step + 1) if micro_batches_per_step % n == 0]
        raise ConfigError(
            f"{world_size} ranks cannot share batch.micro_batches_per_step={micro_batches_per_step}; "
            f"start {' or '.join(map(str, legal))} ranks, or set it to a multiple of {world_size}"
        )


def cover(ids: np.ndarray, lengths: np.ndarray, batching: Batching) -> list[MicroBatch]:
    """Micro-batches that contain each of the samples `ids` exactly once, in a fixed order, for evaluation.

    `lengths` are the lengths of `ids`.
    """
    if batching.mode == "bucket":
        buckets = _buckets(lengths, batching.size)
        return [MicroBatch(_singles(ids[indices].tolist())) for indices in buckets]
    if batching.mode == "pack":
        packed = pack_best_fit(lengths, batching.size)
        sequences = [tuple(ids[indices].tolist()) for indices in packed]
    else:
        sequences = list(_singles(ids.tolist()))
    width = batching.num_items
    starts = range(0, len(sequences), width)
    return [MicroBatch(tuple(sequences[start : start + width])) for start in starts]


def group_similar_costs(num: int, first: int, group: int, random: tuple[int, ...]) -> list[int]:
    """An order of the `num` items of a window, which are sorted by cost and start at `first` in the stream.

    Each complete step of `group` items gets items of similar cost; the steps are in random order. Steps
    at the ends of the window, shared with neighboring windows, get items of medium cost.
    """
    head = min(num, -first % group)
    num_steps = (num - head) // group
    num_shared = num - num_steps * group
    low = num_steps // 2 * group  # items below those of the shared steps
    shared = low + shuffled(num_shared, *random, 0)
    runs = [range(i, i + group) for i in range(0, low, group)]
    runs += [range(i, i + group) for i in range(low + num_shared, num, group)]
    middle = [i for run in shuffled(num_steps, *random, 1) for i in runs[run]]
    return [*shared[:head].tolist(), *middle, *shared[head:].tolist()]


def _buckets(lengths: np.ndarray, budget: int) -> list[list[int]]:
    """The indices into `lengths` of each bucket, by ascending length."""
    ascending = np.argsort(lengths, kind="stable")
    ends = bucket_ends(lengths[ascending].tolist(), budget)
    indices = ascending.tolist()
    return [indices[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def _singles(values: list[int]) -> tuple[tuple[int, ...], ...]:
    return tuple((value,) for value in values)
