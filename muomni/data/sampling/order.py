"""The endless stream of training samples, as a closed-form function of the stream position.

An epoch holds each sample once, in an order that depends on (seed, epoch) alone. Blocks of samples that
are adjacent on disk are permuted by a keyed bijection, computed one block at a time; the samples of a
shuffle window of blocks are permuted by one Philox stream. Random access to the order thus takes time
and memory for one window, whether there are 10^3 samples or 10^9.
"""

import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from muomni.data.shards.exclusion_mask import IncludedSamples

_BLOCKS_KEY, _WINDOW_KEY = 1, 2
# Small corpora fit into memory: smaller blocks shuffle them better.
_MIN_BLOCKS = 1 << 16
_ROUNDS = 8
_MAX_CACHED_WINDOWS = 4


def generator(*key: int) -> np.random.Generator:
    """A Philox generator that depends on `key` alone: the same numbers on every machine."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))


def shuffled(num: int, *key: int) -> np.ndarray:
    """A permutation of range(num) that depends on `key` alone, int64 [num].

    Sorts raw Philox numbers, whose values are stable across numpy versions.
    """
    raw = np.random.Philox(np.random.SeedSequence(key)).random_raw(num)
    return np.argsort(raw, kind="stable")


class Bijection:
    """A pseudo-random permutation of range(size), computed index by index.

    A Feistel network over pairs (left, right) of numbers below about sqrt(size). Results outside of the
    range pass through the network again until they are inside (cycle walking).
    """

    def __init__(self, size: int, *key: int) -> None:
        self.size = size
        self._left = math.isqrt(size - 1) + 1
        self._right = -(-size // self._left)
        self._keys = np.random.SeedSequence(key).generate_state(_ROUNDS, np.uint64)

    def __call__(self, index: np.ndarray) -> np.ndarray:
        """The image of each index: int64 [n] -> int64 [n]."""
        return self._walk(index, range(_ROUNDS), 1)

    def inverse(self, image: np.ndarray) -> np.ndarray:
        """The index of each image: int64 [n] -> int64 [n]."""
        return self._walk(image, range(_ROUNDS - 1, -1, -1), -1)

    def _walk(self, index: np.ndarray, rounds: range, sign: int) -> np.ndarray:
        out = self._network(np.asarray(index, dtype=np.int64), rounds, sign)
        while (outside := out >= self.size).any():
            out[outside] = self._network(out[outside], rounds, sign)
        return out

    def _network(self, index: np.ndarray, rounds: range, sign: int) -> np.ndarray:
        left, right = np.divmod(index, self._right)
        for number in rounds:
            if number % 2 == 0:
                left = (left + sign * _mixed(right, self._keys[number], self._left)) % self._left
            else:
                right = (right + sign * _mixed(left, self._keys[number], self._right)) % self._right
        return left * self._right + right


def _mixed(values: np.ndarray, key: np.uint64, modulus: int) -> np.ndarray:
    """Hash (value, key) to a number below `modulus` (finalizer of SplitMix64, Steele et al., 2014)."""
    x = values.astype(np.uint64) + key
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((x ^ (x >> np.uint64(31))) % np.uint64(modulus)).astype(np.int64)


@dataclass(frozen=True, slots=True)
class EvenWindows:
    """`size` positions split into windows of about `window_size`, equal in size up to one position."""

    size: int
    window_size: int

    @property
    def count(self) -> int:
        return max(1, round(self.size / self.window_size))

    def bounds(self, number: int) -> tuple[int, int]:
        """Start and end position of a window."""
        count = self.count
        return number * self.size // count, (number + 1) * self.size // count

    def containing(self, position: int) -> int:
        """The number of the window that contains a position."""
        return ((position + 1) * self.count - 1) // self.size


class Order(Protocol):
    """An endless stream of samples: a single order, or several mixed (`mix.MixedOrder`)."""

    epoch_size: int  # samples in one epoch of the stream

    @property
    def depends_on(self) -> str:
        """Everything besides the samples and the seed that determines the stream."""
        ...

    def sample_ids(self) -> np.ndarray:
        """All ids in the stream, int64; only for datasets that fit into memory."""
        ...

    def samples(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Positions [start, stop) of the stream: sample ids, and the epoch that each sample is in,
        int64 [stop - start]."""
        ...


class SampleOrder:
    """Each sample once per epoch; `key` distinguishes orders with the same seed."""

    def __init__(
        self,
        included: IncludedSamples,
        seed: int,
        shuffle_window: int = 2048,
        block: int = 32,
        key: int = 0,
    ) -> None:
        num_samples = len(included)
        self.included = included
        self.epoch_size = num_samples
        self.block = max(1, min(block, num_samples // _MIN_BLOCKS))
        self._key = (seed, key)
        self._windows = EvenWindows(num_samples, shuffle_window)
        self._num_blocks = -(-num_samples // self.block)
        # The last block lacks this many samples.
        self._num_lacking = self._num_blocks * self.block - num_samples
        self._built: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()

    @property
    def depends_on(self) -> str:
        """Everything besides the samples and the seed that determines the stream."""
        return f"key={self._key[1]} window={self._windows.window_size} block={self.block}"

    def sample_ids(self) -> np.ndarray:
        return self.included[np.arange(len(self.included))]

    def samples(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        ids, epochs = [], []
        while start < stop:
            epoch, first = divmod(start, self.epoch_size)
            number = self._windows.containing(first)
            begin, end = self._windows.bounds(number)
            last = min(end, first + stop - start)
            ids.append(self._window(epoch, number)[first - begin : last - begin])
            epochs.append(np.full(last - first, epoch))
            start += last - first
        if not ids:
            return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
        return np.concatenate(ids), np.concatenate(epochs)

    def _window(self, epoch: int, number: int) -> np.ndarray:
        """The sample ids of a window, in order."""
        if (epoch, number) not in self._built:
            if len(self._built) == _MAX_CACHED_WINDOWS:
                self._built.popitem(last=False)
            self._built[epoch, number] = self._build(epoch, number)
        return self._built[epoch, number]

    def _build(self, epoch: int, number: int) -> np.ndarray:
        blocks = Bijection(self._num_blocks, *self._key, epoch, _BLOCKS_KEY)
        start, stop = self._windows.bounds(number)
        positions = np.arange(start, stop)
        if self._num_lacking:
            # The permutation puts the short last block anywhere; skip its missing samples.
            last_block = int(blocks.inverse(np.array([self._num_blocks - 1]))[0])
            is_after = positions >= (last_block + 1) * self.block - self._num_lacking
            positions += is_after * self._num_lacking
        block_of, within = np.divmod(positions, self.block)
        first, last = int(block_of[0]), int(block_of[-1])
        samples = blocks(np.arange(first, last + 1))[block_of - first] * self.block + within
        order = shuffled(stop - start, *self._key, epoch, number, _WINDOW_KEY)
        return self.included[samples[order]]
