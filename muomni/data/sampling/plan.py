"""The order of samples and optimizer steps: a pure function of (seed, order of samples, lengths, batching).

No sample is read here. The endless stream of samples (`order`) is split into shuffle windows. Within a
window, samples become *units*, the smallest parts that ranks can share: packed sequences (`pack`), single
samples (`fixed`), or single samples of similar length (`bucket`). A global batch, the units of an optimizer
step, is the next `global_size` units of the stream, or one bucket of about `global_size` length units.

Ranks and micro-batches only divide a global batch: `num_micro_batches` and `rank_step` spread its units
evenly over the ranks and over as few micro-batches as fit `micro_size`. So no sample is dropped, every rank
has the same number of micro-batches, and steps are the same for any number of ranks and any size of
micro-batches (contract *Plan* in docs/architecture.md).

Seeking needs the number of items in each window (`count_windows`), packed sequences or buckets: known for
`fixed`, otherwise counted once per epoch. Only the window at the position is then built.
"""

import itertools
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from muomni.config.models import MEL_RATE_HZ
from muomni.config.run import BatchSection, DurationBatch, PackedBatch, SampleBatch
from muomni.data.sampling.lengths import MAX_FULL_SCAN, Lengths
from muomni.data.sampling.order import EvenWindows, Order, SampleOrder, shuffled
from muomni.data.sampling.packing import bucket_ends, pack_best_fit
from muomni.data.shards.exclusion_mask import IncludedSamples
from muomni.errors import DataError
from muomni.io.atomic_write import open_atomic

# Part of a plan's digest: increase it if the same settings yield another order.
ORDER_VERSION = 3

# The samples of each sequence: ids, or epochs.
Sequences = tuple[tuple[int, ...], ...]

_ITEMS_KEY = 3
_MAX_CACHED_WINDOWS = 8
_MAX_CACHED_EPOCHS = 4
# Fewer windows are faster to count than to read from a file.
_MIN_CACHED_COUNTS = 256


@dataclass(frozen=True, slots=True)
class Batching:
    """How a shuffle window of samples becomes global batches and micro-batches.

    `fixed`: a global batch is `global_size` samples, a micro-batch at most `micro_size` samples. `pack`: the
    same with sequences of at most `seq_len` length units, each packed with samples. `bucket`: a global
    batch is samples of similar length, about `global_size` length units; the number of samples of a
    micro-batch times the longest is at most `micro_size`.

    `micro_size` has no effect on the order of samples.
    """

    mode: Literal["fixed", "bucket", "pack"]
    global_size: int
    micro_size: int
    seq_len: int = 0  # `pack` only
    shuffle_window: int = 2048

    @property
    def units_per_step(self) -> int | None:
        """Units of a global batch; None if it varies (`bucket`)."""
        return None if self.mode == "bucket" else self.global_size

    @property
    def depends_on(self) -> str:
        """All that determines the order, for digests; checkpoints store those, so this text must not change."""
        return (
            f"mode={self.mode} global_size={self.global_size} seq_len={self.seq_len} "
            f"shuffle_window={self.shuffle_window}"
        )


def batching_of(batch: BatchSection) -> Batching:
    """The batching that section `batch` of a run config describes; its type decides the mode."""
    window = batch.shuffle_window
    if isinstance(batch, PackedBatch):
        size, micro_size = batch.global_sequences, batch.micro_sequences
        return Batching("pack", size, micro_size, batch.seq_len, shuffle_window=window)
    if isinstance(batch, SampleBatch):
        return Batching("fixed", batch.global_samples, batch.micro_samples, shuffle_window=window)
    assert isinstance(batch, DurationBatch)
    sizes = (seconds * MEL_RATE_HZ for seconds in (batch.global_seconds, batch.micro_seconds))
    return Batching("bucket", *sizes, shuffle_window=window)


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """The sample ids of each sequence of one forward pass; empty sequences pad it to a constant shape.

    `epochs` holds the epoch of each sample, which seeds its augmentation together with seed and sample id;
    None (in evaluation) means no augmentation.
    """

    sequences: Sequences
    epochs: Sequences | None = None

    @property
    def ids(self) -> list[int]:
        return [sample for sequence in self.sequences for sample in sequence]


@dataclass(frozen=True, slots=True)
class _Window:
    """Sample ids, epochs, and lengths of a window, int64 [n], and the indices into them of each item."""

    ids: np.ndarray
    epochs: np.ndarray
    lengths: np.ndarray
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
    """The global batches of all epochs, and the share of each rank.

    `lengths` holds the length of each sample (ignored for `fixed`). `order` defaults to each sample once
    per epoch. `describe` names a sample in error messages.

    Raises DataError if there is no sample, fewer than one step needs, or one longer than a sequence or
    micro-batch. Above `MAX_FULL_SCAN` samples, a sample that is too long is found only with its window.
    """

    def __init__(
        self,
        lengths: Lengths | np.ndarray,
        batching: Batching,
        seed: int,
        describe: Callable[[int], str] = "sample {}".format,
        order: Order | None = None,
        cache: CountCache | None = None,
    ) -> None:
        if len(lengths) == 0:
            raise DataError("the plan has no samples; check the split and the filters")
        self.lengths = Lengths.of_array(lengths) if isinstance(lengths, np.ndarray) else lengths
        self.batching = batching
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

    @property
    def units_per_step(self) -> int:
        """Units of a global batch; the mean in the first window if it varies."""
        if self.batching.units_per_step is not None:
            return self.batching.units_per_step
        lengths = self._samples(0, 0)[2]
        return max(1, len(lengths) // self._count(lengths))

    def num_micro_batches(self, step: int, num_ranks: int) -> int:
        """Micro-batches per rank in optimizer step `step` (from 0), the same on each of `num_ranks`."""
        num_units, most = self._size(step)
        return -(-num_units // (most * num_ranks))

    def position_after(self, step: int) -> int:
        """The position of the stream after the last shuffle window, or sample if `fixed`, of `step` steps."""
        if self.batching.mode == "fixed" or step == 0:
            return step * self.batching.global_size
        item = step * self._items_per_step - 1
        self._item(item)
        epoch = int(np.searchsorted(self._ends, item, side="right")) - 1
        starts = self._window_starts(epoch)
        window = int(np.searchsorted(starts, item - self._ends[epoch], side="right")) - 1
        return epoch * self.order.epoch_size + self.windows.bounds(window)[1]

    def rank_step(self, step: int, rank: int, num_ranks: int) -> list[MicroBatch]:
        """The micro-batches of one rank in optimizer step `step` (from 0).

        Micro-batch k of rank r is part k * num_ranks + r of the global batch, whose parts differ by one unit
        at most. Packed and fixed micro-batches of a step have one shape, padded with empty sequences.
        """
        num_units, _ = self._size(step)
        num_parts = self.num_micro_batches(step, num_ranks) * num_ranks
        width = 0 if self.batching.mode == "bucket" else -(-num_units // num_parts)
        micro_batches = []
        for part in range(rank, num_parts, num_ranks):
            start, stop = (num_units * (part + end) // num_parts for end in range(2))
            sequences, epochs = self._units(step, start, stop)
            padding = ((),) * (width - len(sequences))
            micro_batches.append(MicroBatch(sequences + padding, epochs + padding))
        return micro_batches

    def rank_batches(self, start_step: int, rank: int, num_ranks: int) -> Iterator[MicroBatch]:
        """Endless micro-batches of one rank, from optimizer step `start_step` (from 0)."""
        for step in itertools.count(start_step):
            yield from self.rank_step(step, rank, num_ranks)

    def _size(self, step: int) -> tuple[int, int]:
        """Units of the global batch of a step, and the most of them that a micro-batch may have."""
        batching = self.batching
        if batching.mode != "bucket":
            return batching.global_size, batching.micro_size
        window, members = self._item(step)
        return len(members), batching.micro_size // int(window.lengths[members[0]])

    def _units(self, step: int, start: int, stop: int) -> tuple[Sequences, Sequences]:
        """Sample ids and epochs of the units [start, stop) of the global batch of a step."""
        if self.batching.mode == "bucket":
            window, members = self._item(step)
            chosen = members[start:stop]
            return _singles(window.ids[chosen]), _singles(window.epochs[chosen])
        first = step * self.batching.global_size
        if self.batching.mode == "fixed":
            ids, epochs = self.order.samples(first + start, first + stop)
            return _singles(ids), _singles(epochs)
        found = [self._item(number) for number in range(first + start, first + stop)]
        sequences = tuple(tuple(window.ids[members].tolist()) for window, members in found)
        epochs_of = tuple(tuple(window.epochs[members].tolist()) for window, members in found)
        return sequences, epochs_of

    # -- item counts -------------------------------------------------------------------------------
    def count_windows(self, epoch: int, start: int, stop: int) -> np.ndarray:
        """Items of the windows [start, stop) of an epoch, int32 [stop - start]."""
        counts = [self._count(self._samples(epoch, number)[2]) for number in range(start, stop)]
        return np.array(counts, dtype=np.int32)

    def uncounted_epoch(self, num_epochs: int | None = None, step: int = 0) -> int | None:
        """The next epoch to count before the length of `num_epochs` epochs, or the first `step` steps, are
        known; None if there is none."""
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
        return self.batching.units_per_step or 1  # one bucket

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

    def _item(self, item: int) -> tuple[_Window, list[int]]:
        """The window of an item of the stream, and the indices of its samples in the window."""
        while self._ends[-1] <= item:
            self._window_starts(len(self._ends) - 1)
        epoch = int(np.searchsorted(self._ends, item, side="right")) - 1
        starts = self._window_starts(epoch)
        within = item - self._ends[epoch]
        window = int(np.searchsorted(starts, within, side="right")) - 1
        built = self._window(epoch, window)
        return built, built.items[within - int(starts[window])]

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
            items = pack_best_fit(lengths, self.batching.seq_len)
        else:
            items = even_buckets(lengths, self._count(lengths))
        order = shuffled(len(items), *random).tolist()
        return _Window(ids, epochs, lengths, [items[index] for index in order])

    def _samples(self, epoch: int, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Sample ids, epochs, and lengths of a window, int64 [n]."""
        start, stop = (epoch * self.order.epoch_size + x for x in self.windows.bounds(number))
        ids, epochs = self.order.samples(start, stop)
        lengths = self.lengths[ids]
        self._check_longest(ids, lengths)
        return ids, epochs, lengths

    def _count(self, lengths: np.ndarray) -> int:
        if self.batching.mode == "pack":
            return len(pack_best_fit(lengths, self.batching.seq_len))
        total = int(lengths.sum())
        # No bucket may be empty, so the mean of the buckets is at least the longest sample.
        return max(1, min(round(total / self.batching.global_size), total // int(lengths.max())))

    # -- checks ------------------------------------------------------------------------------------
    def _check_longest(self, ids: np.ndarray, lengths: np.ndarray) -> None:
        worst = int(lengths.argmax())
        key, limit, unit = "batch.seq_len", self.batching.seq_len, ""
        if self.batching.mode == "bucket":
            key, limit, unit = (
                "batch.micro_seconds", self.batching.micro_size, " mel frames (10 ms each)",
            )  # fmt: skip
        if lengths[worst] > limit:
            raise DataError(
                f"{self.describe(int(ids[worst]))} has length {int(lengths[worst])}{unit}, but "
                f"{key} allows {limit}; raise it or remove the sample from the corpus"
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
            what = {"fixed": ("samples", "global_samples"), "pack": ("sequences", "global_tokens")}
            name, key = what[self.batching.mode]
            raise DataError(
                f"{self.order.epoch_size} samples make {num_items} {name}, but one step needs "
                f"{self._items_per_step}; lower batch.{key}, or add data"
            )


def cover(ids: np.ndarray, lengths: np.ndarray, batching: Batching) -> list[MicroBatch]:
    """Micro-batches that contain each of the samples `ids` exactly once, in a fixed order, for evaluation.

    `lengths` are the lengths of `ids`. Packed and fixed micro-batches have one shape, padded with empty
    sequences.
    """
    if batching.mode == "bucket":
        buckets = _buckets(lengths, batching.micro_size)
        return [MicroBatch(_singles(ids[indices])) for indices in buckets]
    if batching.mode == "pack":
        packed = pack_best_fit(lengths, batching.seq_len)
        sequences = [tuple(ids[indices].tolist()) for indices in packed]
    else:
        sequences = list(_singles(ids))
    width = min(batching.micro_size, len(sequences))
    sequences += [()] * (-len(sequences) % max(1, width))
    starts = range(0, len(sequences), max(1, width))
    return [MicroBatch(tuple(sequences[start : start + width])) for start in starts]


def even_buckets(lengths: np.ndarray, num: int) -> list[list[int]]:
    """Split samples by length into `num` buckets with sums of lengths as equal as possible.

    Returns the indices into `lengths` of each bucket, by descending length; none is empty if `num` times the
    longest is at most the sum.
    """
    descending = np.argsort(-lengths, kind="stable")
    sums = np.cumsum(lengths[descending])
    ends = np.searchsorted(sums * num, sums[-1] * np.arange(1, num + 1)) + 1
    indices = descending.tolist()
    return [indices[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def _buckets(lengths: np.ndarray, budget: int) -> list[list[int]]:
    """The indices into `lengths` of each bucket of `bucket_ends`, by ascending length."""
    ascending = np.argsort(lengths, kind="stable")
    ends = bucket_ends(lengths[ascending].tolist(), budget)
    indices = ascending.tolist()
    return [indices[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def _singles(values: np.ndarray) -> Sequences:
    return tuple((value,) for value in values.tolist())
