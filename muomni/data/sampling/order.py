"""The endless stream of samples that training draws from, as a closed form of the position in it.

A round of the stream holds each sample once, in an order that depends on (seed, round) alone. Blocks of
consecutive samples, which lie side by side on disk, are permuted by a keyed bijection that is computed
for one block at a time; the samples of a window of blocks are permuted by one Philox stream. So any
part of the order costs time and memory for a window, whether there are 10^3 samples or 10^9.
"""

import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from muomni.data.shards.exclusion_mask import KeptSamples

_BLOCKS_KEY, _WINDOW_KEY = 1, 2
# Small corpora are read from memory: their blocks shrink so that neighbors part.
_MIN_BLOCKS = 1 << 16
_ROUNDS = 8
_KEPT_WINDOWS = 4


def generator(*key: int) -> np.random.Generator:
    """A Philox stream that depends on `key` alone, equal on every machine."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))


def shuffled(num: int, *key: int) -> np.ndarray:
    """A permutation of range(num) that depends on `key` alone, int64 [num].

    It sorts raw Philox numbers, whose values no version of numpy may change.
    """
    raw = np.random.Philox(np.random.SeedSequence(key)).random_raw(num)
    return np.argsort(raw, kind="stable")


class Bijection:
    """A pseudo-random permutation of range(size) that is computed index by index.

    A Feistel network over pairs (left, right) of numbers below about sqrt(size); the few results that
    fall outside of the range are sent through it again until they fall inside ("cycle walking").
    """

    def __init__(self, size: int, *key: int) -> None:
        self.size = size
        self._left = math.isqrt(size - 1) + 1
        self._right = -(-size // self._left)
        self._keys = np.random.SeedSequence(key).generate_state(_ROUNDS, np.uint64)

    def __call__(self, index: np.ndarray) -> np.ndarray:
        """Where the permutation sends each index, int64 [n] for int64 [n]."""
        return self._walk(index, range(_ROUNDS), 1)

    def inverse(self, image: np.ndarray) -> np.ndarray:
        """Which index the permutation sends to each image."""
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
    """A hash of (value, key) below `modulus`: the finalizer of SplitMix64 (Steele et al., 2014)."""
    x = values.astype(np.uint64) + key
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((x ^ (x >> np.uint64(31))) % np.uint64(modulus)).astype(np.int64)


@dataclass(frozen=True, slots=True)
class EvenWindows:
    """`size` positions in a row, cut into windows of about `window` that differ by one at most."""

    size: int
    window: int

    @property
    def count(self) -> int:
        return max(1, round(self.size / self.window))

    def bounds(self, number: int) -> tuple[int, int]:
        """First position of a window, and the one after its last."""
        count = self.count
        return number * self.size // count, (number + 1) * self.size // count

    def holding(self, position: int) -> int:
        """The number of the window that holds a position."""
        return ((position + 1) * self.count - 1) // self.size


class Order(Protocol):
    """An endless stream of samples: one order, or several mixed (`mix.MixedOrder`)."""

    round_size: int  # draws of one epoch of the stream

    @property
    def depends_on(self) -> str:
        """Everything besides samples and seed that the stream depends on."""
        ...

    def samples(self) -> np.ndarray:
        """The ids that may be drawn, int64: only where there are few enough."""
        ...

    def draws(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Draws [start, stop) of the stream: sample ids and the epoch that each sample is in,
        int64 [stop - start]."""
        ...


class SampleOrder:
    """Each sample once an epoch; `key` tells apart orders of one seed."""

    def __init__(
        self, kept: KeptSamples, seed: int, window: int = 2048, block: int = 32, key: int = 0
    ) -> None:
        num_samples = len(kept)
        self.kept = kept
        self.round_size = num_samples
        self.block = max(1, min(block, num_samples // _MIN_BLOCKS))
        self._key = (seed, key)
        self._windows = EvenWindows(num_samples, window)
        self._num_blocks = -(-num_samples // self.block)
        # The last block lacks this many samples.
        self._num_lacking = self._num_blocks * self.block - num_samples
        self._built: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()

    @property
    def depends_on(self) -> str:
        """Everything besides samples and seed that the stream depends on."""
        return f"key={self._key[1]} window={self._windows.window} block={self.block}"

    def samples(self) -> np.ndarray:
        return self.kept[np.arange(len(self.kept))]

    def draws(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        ids, epochs = [], []
        while start < stop:
            epoch, first = divmod(start, self.round_size)
            number = self._windows.holding(first)
            begin, end = self._windows.bounds(number)
            last = min(end, first + stop - start)
            ids.append(self._window(epoch, number)[first - begin : last - begin])
            epochs.append(np.full(last - first, epoch))
            start += last - first
        if not ids:
            return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
        return np.concatenate(ids), np.concatenate(epochs)

    def _window(self, epoch: int, number: int) -> np.ndarray:
        """The samples of a window, in order."""
        if (epoch, number) not in self._built:
            if len(self._built) == _KEPT_WINDOWS:
                self._built.popitem(last=False)
            self._built[epoch, number] = self._build(epoch, number)
        return self._built[epoch, number]

    def _build(self, epoch: int, number: int) -> np.ndarray:
        blocks = Bijection(self._num_blocks, *self._key, epoch, _BLOCKS_KEY)
        start, stop = self._windows.bounds(number)
        positions = np.arange(start, stop)
        if self._num_lacking:
            # The short last block stands at some place of the permutation; what comes after it would
            # come later if it were whole.
            place = int(blocks.inverse(np.array([self._num_blocks - 1]))[0])
            is_after = positions >= (place + 1) * self.block - self._num_lacking
            positions += is_after * self._num_lacking
        places, within = np.divmod(positions, self.block)
        first, last = int(places[0]), int(places[-1])
        samples = blocks(np.arange(first, last + 1))[places - first] * self.block + within
        order = shuffled(stop - start, *self._key, epoch, number, _WINDOW_KEY)
        return self.kept[samples[order]]
