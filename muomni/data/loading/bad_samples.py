"""Samples that cannot be used, such as images that cannot be decoded, and the budget for them."""

import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from muomni.errors import DataError

# The fraction of bad samples is limited over this many of the latest samples.
WINDOW = 10_000
_NUM_NAMED = 3
# The probability, at the allowed fraction, of so many bad samples in a row that a run stops.
_MIN_PROBABILITY = 1e-6


class BadSample(NamedTuple):
    """A sample that was dropped: its key and place, and why."""

    name: str
    reason: str


class BadSampleBudget:
    """Stops a run with too many bad samples; all ranks decide alike, from sums over ranks.

    At most `max_fraction` of the last `WINDOW` samples may be bad, or of `corpus_size` if that is smaller. A
    sample that recurs counts once, and one bad sample is always tolerated unless `max_fraction` is 0. Steps
    without a usable sample stop the run after a few samples, whatever the window holds.
    """

    def __init__(self, max_fraction: float, corpus_size: int) -> None:
        self.max_fraction = max_fraction
        self.num_bad = 0  # of all steps
        self._num_usable = 0  # since the last call of `take_num_usable`
        self._window = min(WINDOW, corpus_size)
        self._limit = num_allowed(max_fraction, self._window)
        self._max_in_row = _max_in_row(max_fraction)
        self._num_in_row = 0  # samples of the latest steps, none of which was usable
        self._steps: deque[tuple[int, int]] = deque()  # samples and bad ones, over all ranks
        self._num_samples = self._num_bad = 0  # in the window
        self._first_step = 0
        self._own: deque[tuple[int, BadSample]] = deque()  # step and sample, of this rank

    @property
    def fraction(self) -> float:
        """Fraction of bad samples among the latest ones."""
        return self._num_bad / max(1, self._num_samples)

    @property
    def own(self) -> list[tuple[int, BadSample]]:
        """The bad samples of this rank in the window, with the number of their step."""
        return list(self._own)

    def count_step(
        self,
        num_samples: int,
        num_bad: int,
        own: Iterable[BadSample],
        gather: Callable[[list[tuple[int, BadSample]]], Iterable[list[tuple[int, BadSample]]]],
    ) -> bool:
        """Count a step as `add` does; returns whether any rank had a usable sample.

        `gather` returns its argument of all ranks; raises DataError on all if the budget is exceeded.
        """
        if self.add(num_samples, num_bad, own):
            self.check(gather(self.own))
        self._num_usable += num_samples - num_bad
        return num_samples > num_bad

    def take_num_usable(self) -> int:
        """Usable samples over all ranks since the last call."""
        num_usable, self._num_usable = self._num_usable, 0
        return num_usable

    def metrics(self) -> dict[str, float]:
        return {"num_bad_samples": float(self.num_bad), "bad_fraction": self.fraction}

    def add(self, num_samples: int, num_bad: int, own: Iterable[BadSample]) -> bool:
        """Add a step: samples over all ranks, and this rank's bad ones.

        Returns whether the budget may be exceeded, the same on all ranks; `check` needs the samples of all
        ranks to decide.
        """
        step = self._first_step + len(self._steps)
        self._own += [(step, sample) for sample in own]
        self._steps.append((num_samples, num_bad))
        self.num_bad += num_bad
        self._num_samples += num_samples
        self._num_bad += num_bad
        while self._num_samples - self._steps[0][0] >= self._window and len(self._steps) > 1:
            old_samples, old_bad = self._steps.popleft()
            self._num_samples -= old_samples
            self._num_bad -= old_bad
            self._first_step += 1
        while self._own and self._own[0][0] < self._first_step:
            self._own.popleft()
        self._num_in_row = self._num_in_row + num_samples if num_samples == num_bad else 0
        is_over = self._num_bad > self._limit or self._num_in_row > self._max_in_row
        return num_bad > 0 and is_over

    def check(self, shares: Iterable[list[tuple[int, BadSample]]]) -> None:
        """Raise DataError if the budget is exceeded; `shares` are the `own` of all ranks."""
        ordered = sorted((pair for share in shares for pair in share), key=lambda pair: pair[0])
        bad = list(dict.fromkeys(sample for _, sample in ordered))
        if self._num_in_row > self._max_in_row:
            raise DataError(f"none of the last {self._num_in_row} samples is usable: {listed(bad)}")
        if len({sample.name for sample in bad}) > self._limit:
            raise DataError(
                f"{len(bad)} of the last {self._num_samples} samples are not usable, more than "
                f"data.max_bad_fraction={self.max_fraction:g} allows: {listed(bad)}"
            )


def num_allowed(max_fraction: float, num_samples: int) -> int:
    """Number of bad samples that are tolerated among `num_samples`."""
    return max(1, math.floor(max_fraction * num_samples)) if max_fraction else 0


def check_split(
    max_fraction: float, num_samples: int, bad: Sequence[BadSample], split: str
) -> None:
    """Raise DataError if a validation or test split has too many bad samples."""
    if len(bad) > num_allowed(max_fraction, num_samples) or (bad and len(bad) == num_samples):
        raise DataError(
            f"{len(bad)} of {num_samples} samples of split '{split}' are not usable, more than "
            f"data.max_bad_fraction={max_fraction:g} allows: {listed(bad)}"
        )


def listed(bad: Sequence[BadSample]) -> str:
    """The first bad samples with their reasons, and what to do."""
    named = "; ".join(f"{name} ({reason})" for name, reason in bad[:_NUM_NAMED])
    return (
        f"{named}{'; ...' if len(bad) > _NUM_NAMED else ''}; correct the data, mask these samples (python -m "
        f"data_prep exclude), or raise data.max_bad_fraction"
    )


def _max_in_row(max_fraction: float) -> float:
    """The longest run of bad samples that occurs by chance at this fraction."""
    if not 0 < max_fraction < 1:
        return 0 if max_fraction == 0 else WINDOW
    return max(1, round(math.log(_MIN_PROBABILITY) / math.log(max_fraction)))
