"""The sample order: each sample once per epoch, well shuffled, with random access."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from muomni.data.sampling.order import Bijection, EvenWindows, SampleOrder, shuffled
from muomni.data.shards.exclusion_mask import IncludedSamples


def order_of(num_samples: int, seed: int = 0, **sizes: int) -> SampleOrder:
    return SampleOrder(IncludedSamples(num_samples), seed, **sizes)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5000), st.integers(0, 2**40))
def test_bijection_and_its_inverse(size: int, key: int) -> None:
    bijection = Bijection(size, key)
    image = bijection(np.arange(size))
    assert np.array_equal(np.sort(image), np.arange(size))
    assert np.array_equal(bijection.inverse(image), np.arange(size))


@pytest.mark.parametrize("size", [5, 12, 64])
def test_bijection_is_uniform(size: int) -> None:
    counts = np.zeros((size, size))
    num_keys = 200 * size
    for key in range(num_keys):
        counts[np.arange(size), Bijection(size, key)(np.arange(size))] += 1
    chi_square = ((counts - 200) ** 2 / 200).sum()
    freedom = (size - 1) ** 2
    assert abs(chi_square - freedom) < 5 * np.sqrt(2 * freedom)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 10**12), st.integers(1, 10**6), st.data())
def test_windows_are_even_and_contain_their_positions(
    size: int, window: int, data: st.DataObject
) -> None:
    windows = EvenWindows(size, window)
    position = data.draw(st.integers(0, size - 1))
    start, stop = windows.bounds(windows.containing(position))
    assert start <= position < stop
    assert stop - start in (size // windows.count, size // windows.count + 1)
    assert windows.bounds(0)[0] == 0 and windows.bounds(windows.count - 1)[1] == size


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3000), st.integers(1, 400), st.data())
def test_each_sample_occurs_once_per_epoch_with_random_access(
    num_samples: int, window: int, data: st.DataObject
) -> None:
    order = order_of(num_samples, shuffle_window=window)
    ids, epochs = order.samples(0, 3 * num_samples)
    for epoch in range(3):
        is_its = epochs == epoch
        assert np.array_equal(np.sort(ids[is_its]), np.arange(num_samples))
    start = data.draw(st.integers(0, 3 * num_samples))
    stop = data.draw(st.integers(start, 3 * num_samples))
    part, part_epochs = order_of(num_samples, shuffle_window=window).samples(start, stop)
    assert np.array_equal(part, ids[start:stop])
    assert np.array_equal(part_epochs, epochs[start:stop])


@pytest.mark.parametrize("num_samples", [200_003, 2_100_001])
def test_short_last_block_loses_no_sample(num_samples: int) -> None:
    order = order_of(num_samples)
    assert order.block > 1 and num_samples % order.block
    ids, _ = order.samples(0, num_samples)
    assert np.array_equal(np.sort(ids), np.arange(num_samples))


def test_order_of_a_billion_samples_is_fast() -> None:
    order = order_of(10**9)
    ids, epochs = order.samples(3 * 10**9 - 40, 3 * 10**9 + 40)
    assert epochs.tolist() == [2] * 40 + [3] * 40
    assert ids.max() > 5 * 10**8 and len(set(ids.tolist())) == 80
    window = order.samples(0, 2048)[0]
    assert len(np.unique(window // 32)) <= 66  # neighbors on disk are in the same window


def test_neighbors_are_separated_and_epochs_differ() -> None:
    for num_samples in (500, 5_000, 300_000):
        order = order_of(num_samples)
        (first, _), (second, _) = (
            order.samples(0, 500),
            order.samples(num_samples, num_samples + 500),
        )
        assert (np.abs(np.diff(first)) == 1).mean() < 0.05
        assert (first == second).mean() < 0.05
        assert abs(np.corrcoef(np.arange(500), first)[0, 1]) < 0.2
        other_seed = order_of(num_samples, seed=1).samples(0, 500)[0]
        assert (first == other_seed).mean() < 0.05


def test_first_thousand_samples_are_the_same_on_every_machine() -> None:
    """Changing these values requires a changelog entry marked [order]."""
    digests = []
    for num_samples in (1000, 1_000_003):
        ids = np.concatenate([order_of(num_samples, 7).samples(p, p + 500)[0] for p in (0, 10**7)])
        digests.append(hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest()[:16])
    assert shuffled(6, 1, 2).tolist() == SHUFFLED
    assert digests == GOLDEN


SHUFFLED = [1, 3, 0, 4, 2, 5]
GOLDEN = ["5b07bec5677252f9", "b38c93421f11e102"]
