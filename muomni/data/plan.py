"""The order of samples: a pure function of (seed, epoch, sample lengths, batching).

Nothing here reads a sample. An epoch is a permutation of all samples, cut into windows; inside a window
samples are batched as they come (`fixed`), by similar length (`bucket`) or packed into rows (`pack`).
The micro-batches of a window are ordered so that the ones of one optimiser step cost about the same, and
dealt out: of the G micro-batches of a step, rank r of W takes r, r+W, ... So every rank has the same
number of steps, and any W that divides G sees the same steps (contract *Plan* in docs/architecture.md).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from muomni.data.packing import best_fit_rows
from muomni.errors import ConfigError, DataError

_ORDER_KEY, _WINDOW_KEY, _STEP_KEY = 1, 2, 3


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


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """What one forward pass sees: the sample ids of each row.

    `epoch` seeds augmentation together with seed and sample id; None (evaluation) means none.
    """

    rows: tuple[tuple[int, ...], ...]
    epoch: int | None = None

    @property
    def ids(self) -> list[int]:
        return [sample for row in self.rows for sample in row]


def generator(*key: int) -> np.random.Generator:
    """A Philox stream that depends on `key` alone, equal on every machine."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))


class Plan:
    """All steps of all epochs; `micro_batches_per_step` is G.

    `lengths` holds the cost of each sample in the unit of `batching.size` (ignored for `fixed`);
    `describe` names a sample in messages. Raises DataError when there is no sample or one is longer
    than a row or bucket may be.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        batching: Batching,
        micro_batches_per_step: int,
        seed: int,
        describe: Callable[[int], str] = "sample {}".format,
    ) -> None:
        if len(lengths) == 0:
            raise DataError("the plan has no samples; check the split and the filters")
        if batching.mode != "fixed" and int(lengths.max()) > batching.size:
            worst = int(lengths.argmax())
            raise DataError(
                f"{describe(worst)} has length {int(lengths[worst])}, more than the {batching.size} "
                f"that batch.size allows here; raise batch.size, or shard the corpus without it"
            )
        self.lengths = np.asarray(lengths)
        self.batching = batching
        self.micro_batches_per_step = micro_batches_per_step
        self.seed = seed
        self._epoch: tuple[int, list[MicroBatch]] | None = None

    def num_steps(self, epoch: int) -> int:
        """Optimiser steps of an epoch (a last incomplete step is left out)."""
        steps = len(self._micro_batches(epoch)) // self.micro_batches_per_step
        if steps == 0:
            raise DataError(
                f"{len(self.lengths)} samples give {len(self._micro_batches(epoch))} micro-batches, "
                f"fewer than the {self.micro_batches_per_step} of one step; lower batch.size or "
                f"batch.micro_batches_per_step, or add data"
            )
        return steps

    def step(self, epoch: int, step: int) -> list[MicroBatch]:
        """The G micro-batches of one optimiser step."""
        group = self.micro_batches_per_step
        return self._micro_batches(epoch)[step * group : (step + 1) * group]

    def locate(self, global_step: int) -> tuple[int, int]:
        """Turn a count of finished steps into (epoch, step within it)."""
        epoch = 0
        while global_step >= self.num_steps(epoch):
            global_step -= self.num_steps(epoch)
            epoch += 1
        return epoch, global_step

    def rank_batches(self, start_step: int, rank: int, world_size: int) -> Iterator[MicroBatch]:
        """Endless micro-batches of one rank, from the step after `start_step` finished ones."""
        check_world_size(self.micro_batches_per_step, world_size)
        epoch, step = self.locate(start_step)
        while True:
            for later in range(step, self.num_steps(epoch)):
                yield from self.step(epoch, later)[rank::world_size]
            epoch, step = epoch + 1, 0

    def _micro_batches(self, epoch: int) -> list[MicroBatch]:
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = (epoch, self._build(epoch))
        return self._epoch[1]

    def _build(self, epoch: int) -> list[MicroBatch]:
        order = generator(self.seed, epoch, _ORDER_KEY).permutation(len(self.lengths))
        steps: list[list[MicroBatch]] = []
        rest: list[MicroBatch] = []
        for window, start in enumerate(range(0, len(order), self.batching.window)):
            ids = order[start : start + self.batching.window]
            groups, left = self._group(_cut(ids, self.lengths, self.batching, epoch), epoch, window)
            steps.extend(groups)
            rest.extend(left)
        # What the windows could not fill to whole steps forms the last steps of the epoch.
        groups, left = self._group(rest, epoch, -1)
        return [batch for group in steps + groups for batch in group] + left

    def _group(
        self, batches: list[MicroBatch], epoch: int, window: int
    ) -> tuple[list[list[MicroBatch]], list[MicroBatch]]:
        """Put micro-batches of like cost into one step; steps come in random order."""
        group = self.micro_batches_per_step
        random = generator(self.seed, epoch, _STEP_KEY, window + 1)
        shuffled = [batches[i] for i in random.permutation(len(batches))]
        whole = len(shuffled) // group * group
        ordered = shuffled[:whole]
        if self.batching.mode == "bucket":
            ordered.sort(key=lambda batch: max(int(self.lengths[i]) for i in batch.ids))
        groups = [ordered[i : i + group] for i in range(0, whole, group)]
        return [groups[i] for i in random.permutation(len(groups))], shuffled[whole:]


def check_world_size(micro_batches_per_step: int, world_size: int) -> None:
    """Raise ConfigError, listing the legal sizes, when the ranks cannot share a step evenly."""
    if micro_batches_per_step % world_size:
        legal = [n for n in range(1, micro_batches_per_step + 1) if micro_batches_per_step % n == 0]
        raise ConfigError(
            f"{world_size} ranks cannot share batch.micro_batches_per_step={micro_batches_per_step}; "
            f"start {' or '.join(map(str, legal))} ranks, or set it to a multiple of {world_size}"
        )


def cover(lengths: np.ndarray, batching: Batching) -> list[MicroBatch]:
    """Micro-batches that hold each sample exactly once, in a fixed order, for evaluation."""
    by_length = np.argsort(lengths, kind="stable") if batching.mode == "bucket" else None
    ids = np.arange(len(lengths)) if by_length is None else by_length
    return _cut(ids, np.asarray(lengths), batching, None)


def _cut(
    ids: np.ndarray, lengths: np.ndarray, batching: Batching, epoch: int | None
) -> list[MicroBatch]:
    if batching.mode == "pack":
        rows, width = best_fit_rows(ids, lengths, batching.size), batching.rows
    elif batching.mode == "fixed":
        rows, width = [(int(i),) for i in ids], batching.size
    else:
        return [MicroBatch(rows, epoch) for rows in _buckets(ids, lengths, batching.size)]
    return [
        MicroBatch(tuple(rows[start : start + width]), epoch)
        for start in range(0, len(rows), width)
    ]


def _buckets(
    ids: np.ndarray, lengths: np.ndarray, budget: int
) -> Iterator[tuple[tuple[int, ...], ...]]:
    current: list[tuple[int, ...]] = []
    for i in ids[np.argsort(lengths[ids], kind="stable")]:
        # Sorted ascending, so the newcomer is the longest and sets the padded cost.
        if current and (len(current) + 1) * int(lengths[i]) > budget:
            yield tuple(current)
            current = []
        current.append((int(i),))
    if current:
        yield tuple(current)
