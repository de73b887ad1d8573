"""What each sample costs, looked up when a window needs it.

For 10^9 samples a table of all lengths would not fit; a `Lengths` reads those of given samples from the
memory-mapped files beside the shards.
"""

from collections.abc import Callable

import numpy as np

# Beyond so many samples nothing is checked or averaged over all of them.
WHOLE_LIMIT = 4_000_000


class Lengths:
    """Cost of the samples 0 ... `num_samples` - 1 in the unit of a stage's batching.

    `read` gives the lengths of an array of sample ids. `depends_on` names everything besides the
    samples that the lengths depend on; it enters the plan's digest in place of the lengths themselves.
    """

    def __init__(
        self, num_samples: int, read: Callable[[np.ndarray], np.ndarray], depends_on: str
    ) -> None:
        self.num_samples = num_samples
        self.depends_on = depends_on
        self._read = read

    @classmethod
    def of_array(cls, array: np.ndarray, depends_on: str = "") -> "Lengths":
        """Lengths that are at hand, in memory or mapped: int [num_samples]."""
        return cls(len(array), lambda ids: array[ids], depends_on)

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, ids: np.ndarray) -> np.ndarray:
        """Lengths of the samples `ids`, int64 [len(ids)]."""
        return np.asarray(self._read(ids), dtype=np.int64)

    def clipped(self, low: int, high: int) -> "Lengths":
        """The same, at least `low` and at most `high`."""
        return Lengths(
            self.num_samples,
            lambda ids: np.clip(self[ids], low, high),
            f"{self.depends_on} clipped={low}..{high}",
        )

    def all(self) -> np.ndarray:
        """All of them, int64 [num_samples]: only where there are few enough."""
        return self[np.arange(self.num_samples)]


def spread(num: int) -> np.ndarray:
    """0 ... num - 1, or `WHOLE_LIMIT` evenly spread ones of them when there are more."""
    return np.arange(num) if num <= WHOLE_LIMIT else np.arange(WHOLE_LIMIT) * num // WHOLE_LIMIT
