"""The order of micro-batches: a pure function of (seed, order of samples, lengths, batching).

Nothing here reads a sample. The endless stream of samples (`order`) is cut into windows; inside a window
samples become *items*: they are packed into rows (`pack`), put into buckets of similar length (`bucket`)
or stay single (`fixed`). The items of all windows and epochs form one endless stream again: a micro-batch
is the next few items, an optimizer step the next G micro-batches, of which rank r of W takes r, r+W, ...
So no sample is left out, no step is short, every rank has the same number of steps, and any W that
divides G sees the same steps (contract *Plan* in docs/architecture.md).

Any place of the stream is found from the number of items in each window (`count_windows`), which is
known for `fixed` and counted once an epoch otherwise; then one window is built.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from muomni.data.sampling.count_cache import CountCache
from muomni.data.sampling.lengths import WHOLE_LIMIT, Lengths
from muomni.data.sampling.order import EvenWindows, Order, SampleOrder, shuffled
from muomni.data.sampling.packing import best_fit_rows, buckets
from muomni.data.shards.exclusion_mask import KeptSamples
from muomni.errors import ConfigError, DataError

# Enters the digest of a plan: to be raised when the same settings give another order.
ORDER_VERSION = 2

_ITEMS_KEY = 3
_KEPT_WINDOWS = 8
_KEPT_EPOCHS = 4


@dataclass(frozen=True, slots=True)
class Batching:
    """How a window of samples becomes micro-batches.

    `fixed`: `size` samples. `bucket`: samples of similar length whose count times longest length stays
    within `size`. `pack`: `rows` rows of at most `size` length units, each filled with several samples.
    """

    mode: Literal["fixed", "bucket", "pack"]
    size: int
    rows: int = 1
    window: int = 2048

    @property
    def num_items(self) -> int:
        """Items of a micro-batch: samples, rows, or one bucket."""
        return {"fixed": self.size, "bucket": 1, "pack": self.rows}[self.mode]


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """What one forward pass sees: the sample ids of each row.

    `epochs` says for each sample which epoch of its source it is in; with seed and sample id that
    seeds augmentation. None (evaluation) means none.
    """

    rows: tuple[tuple[int, ...], ...]
    epochs: tuple[tuple[int, ...], ...] | None = None

    @property
    def ids(self) -> list[int]:
        return [sample for row in self.rows for sample in row]


@dataclass(frozen=True, slots=True)
class _Window:
    """The samples of a window with their epochs, int64 [n], and the places of each item's samples."""

    ids: np.ndarray
    epochs: np.ndarray
    items: list[list[int]]


class Plan:
    """All steps of all epochs; `micro_batches_per_step` is G.

    `lengths` holds the cost of each sample in the unit of `batching.size` (ignored for `fixed`);
    `order` is the stream of samples, by default each once an epoch; `describe` names a sample in
    messages; `cache` keeps counts of windows. Raises DataError when there is no
    sample, too few for one step, or one is longer than a row or bucket may be. Large corpora are not
    looked through for that: there the error comes with the window that holds the sample.
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
        self.order = order or SampleOrder(KeptSamples(len(lengths)), seed, batching.window)
        self.windows = EvenWindows(self.order.round_size, batching.window)
        self.cache = cache
        self._ends: list[int] = [0]  # items in the stream before each epoch that was counted
        self._starts: OrderedDict[int, np.ndarray] = OrderedDict()  # epoch -> of its windows
        self._built: OrderedDict[tuple[int, int], _Window] = OrderedDict()
        if batching.mode != "fixed" and self.order.round_size <= WHOLE_LIMIT:
            ids = self.order.samples()
            self._check_longest(ids, self.lengths[ids])
        self._check_enough()

    # -- what is asked of it -----------------------------------------------------------------------
    def num_steps(self, num_epochs: int) -> int:
        """Optimizer steps until all samples of so many epochs were seen; the last step is completed
        by the beginning of the next epoch."""
        return -(-self._num_items(num_epochs) // self._items_per_step)

    def step(self, step: int) -> list[MicroBatch]:
        """The G micro-batches of the optimizer step that follows `step` finished ones."""
        group = self.micro_batches_per_step
        return [self.micro_batch(number) for number in range(step * group, (step + 1) * group)]

    def rank_batches(self, start_step: int, rank: int, world_size: int) -> Iterator[MicroBatch]:
        """Endless micro-batches of one rank, from the step after `start_step` finished ones."""
        check_world_size(self.micro_batches_per_step, world_size)
        number = start_step * self.micro_batches_per_step + rank
        while True:  # G is a multiple of W, so a stride of W never leaves the rank's share
            yield self.micro_batch(number)
            number += world_size

    def micro_batch(self, number: int) -> MicroBatch:
        """Micro-batch `number` of the endless stream."""
        width = self.batching.num_items
        if self.batching.mode == "fixed":
            ids, epochs = self.order.draws(number * width, (number + 1) * width)
            return MicroBatch(_singles(ids.tolist()), _singles(epochs.tolist()))
        rows, row_epochs = [], []
        for item in range(number * width, (number + 1) * width):
            epoch, window, place = self._locate(item)
            built = self._window(epoch, window)
            places = built.items[place]
            rows.append(built.ids[places].tolist())
            row_epochs.append(built.epochs[places].tolist())
        if self.batching.mode == "bucket":
            return MicroBatch(_singles(rows[0]), _singles(row_epochs[0]))
        return MicroBatch(tuple(map(tuple, rows)), tuple(map(tuple, row_epochs)))

    # -- where windows begin -----------------------------------------------------------------------
    def count_windows(self, epoch: int, start: int, stop: int) -> np.ndarray:
        """Items of the windows [start, stop) of an epoch, int32 [stop - start]."""
        counts = [self._count(self._draws(epoch, number)[2]) for number in range(start, stop)]
        return np.array(counts, dtype=np.int32)

    def uncounted_epoch(self, num_epochs: int | None = None, step: int = 0) -> int | None:
        """The next epoch that has to be counted before `num_epochs` epochs, or all micro-batches of
        the first `step` steps, can be placed; None when there is none."""
        known = len(self._ends) - 1
        if self.batching.mode == "fixed":
            return None
        if num_epochs is not None:
            return known if known < num_epochs else None
        return known if self._ends[-1] < step * self._items_per_step else None

    def set_counts(self, epoch: int, counts: np.ndarray) -> None:
        """Take over counts of the windows of an epoch; of a new one, only of the next."""
        starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        if epoch == len(self._ends) - 1:
            self._ends.append(self._ends[-1] + int(starts[-1]))
        if len(self._starts) == _KEPT_EPOCHS:
            self._starts.popitem(last=False)
        self._starts[epoch] = starts

    @property
    def _items_per_step(self) -> int:
        return self.micro_batches_per_step * self.batching.num_items

    def _num_items(self, num_epochs: int) -> int:
        if self.batching.mode == "fixed":
            return num_epochs * self.order.round_size
        while len(self._ends) <= num_epochs:
            self._window_starts(len(self._ends) - 1)
        return self._ends[num_epochs]

    def _window_starts(self, epoch: int) -> np.ndarray:
        """Items of an epoch before each of its windows, and all of them at the end."""
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
        """Epoch, window and place within it of an item of the stream."""
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
            if len(self._built) == _KEPT_WINDOWS:
                self._built.popitem(last=False)
            self._built[epoch, number] = self._build(epoch, number)
        self._built.move_to_end((epoch, number))
        return self._built[epoch, number]

    def _build(self, epoch: int, number: int) -> _Window:
        ids, epochs, lengths = self._draws(epoch, number)
        random = (self.seed, epoch, number, _ITEMS_KEY)
        if self.batching.mode == "pack":
            items = best_fit_rows(lengths, self.batching.size)
            places = shuffled(len(items), *random).tolist()
        else:
            items = _bucket_places(lengths, self.batching.size)
            first = self._ends[epoch] + int(self._window_starts(epoch)[number])
            places = like_costs_together(len(items), first, self.micro_batches_per_step, random)
        return _Window(ids, epochs, [items[place] for place in places])

    def _draws(self, epoch: int, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Sample ids, their epochs and their lengths of a window."""
        start, stop = (epoch * self.order.round_size + x for x in self.windows.bounds(number))
        ids, epochs = self.order.draws(start, stop)
        lengths = self.lengths[ids]
        self._check_longest(ids, lengths)
        return ids, epochs, lengths

    def _count(self, lengths: np.ndarray) -> int:
        if self.batching.mode == "pack":
            return len(best_fit_rows(lengths, self.batching.size))
        return len(buckets(np.sort(lengths).tolist(), self.batching.size))

    # -- what is refused ---------------------------------------------------------------------------
    def _check_longest(self, ids: np.ndarray, lengths: np.ndarray) -> None:
        worst = int(lengths.argmax())
        if lengths[worst] > self.batching.size:
            raise DataError(
                f"{self.describe(int(ids[worst]))} has length {int(lengths[worst])}, more than the "
                f"{self.batching.size} that batch.size allows here; raise batch.size, or shard the corpus "
                f"without it"
            )

    def _check_enough(self) -> None:
        """One step takes no more than one epoch gives; looks at no more windows than it must."""
        if self.batching.mode == "fixed":
            num_items = self.order.round_size
        else:
            num_items = window = 0
            while num_items < self._items_per_step and window < self.windows.count:
                num_items += int(self.count_windows(0, window, window + 1)[0])
                window += 1
        if num_items < self._items_per_step:
            raise DataError(
                f"{self.order.round_size} samples give {num_items // self.batching.num_items} micro-batches, "
                f"fewer than the {self.micro_batches_per_step} of one step; lower batch.size or "
                f"batch.micro_batches_per_step, or add data"
            )


def check_world_size(micro_batches_per_step: int, world_size: int) -> None:
    """Raise ConfigError, listing the legal sizes, when the ranks cannot share a step evenly."""
    if micro_batches_per_step % world_size:
        legal = [n for n in range(1, micro_batches_per_step + 1) if micro_batches_per_step % n == 0]
        raise ConfigError(
            f"{world_size} ranks cannot share batch.micro_batches_per_step={micro_batches_per_step}; "
            f"start {' or '.join(map(str, legal))} ranks, or set it to a multiple of {world_size}"
        )


def cover(ids: np.ndarray, lengths: np.ndarray, batching: Batching) -> list[MicroBatch]:
    """Micro-batches that hold each of the samples `ids` exactly once, in a fixed order, for evaluation.

    `lengths` are those of `ids`.
    """
    if batching.mode == "bucket":
        cut = _bucket_places(lengths, batching.size)
        return [MicroBatch(_singles(ids[places].tolist())) for places in cut]
    if batching.mode == "pack":
        rows = [tuple(ids[row].tolist()) for row in best_fit_rows(lengths, batching.size)]
    else:
        rows = list(_singles(ids.tolist()))
    width = batching.num_items
    return [MicroBatch(tuple(rows[start : start + width])) for start in range(0, len(rows), width)]


def like_costs_together(num: int, first: int, group: int, random: tuple[int, ...]) -> list[int]:
    """The order of a window's `num` items, which are sorted by cost and stand at `first` in the stream.

    Whole steps of `group` items get neighbors in cost, and come in random order. The ends of the window
    share steps with its neighbors: they get items of middling cost.
    """
    head = min(num, -first % group)
    num_steps = (num - head) // group
    num_seam = num - num_steps * group
    low = num_steps // 2 * group  # items below those at the seams
    seam = low + shuffled(num_seam, *random, 0)
    runs = [range(i, i + group) for i in range(0, low, group)]
    runs += [range(i, i + group) for i in range(low + num_seam, num, group)]
    middle = [i for run in shuffled(num_steps, *random, 1) for i in runs[run]]
    return [*seam[:head].tolist(), *middle, *seam[head:].tolist()]


def _bucket_places(lengths: np.ndarray, budget: int) -> list[list[int]]:
    """The places in `lengths` of each bucket, by ascending length."""
    ascending = np.argsort(lengths, kind="stable")
    ends = buckets(lengths[ascending].tolist(), budget)
    places = ascending.tolist()
    return [places[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def _singles(values: list[int]) -> tuple[tuple[int, ...], ...]:
    return tuple((value,) for value in values)
