"""Mixed corpora: shares in every window, epochs per corpus, random access, and invalid mixes."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from muomni.config.loading import validate
from muomni.config.run import DataSection, MixSection
from muomni.data.sampling.lengths import Lengths
from muomni.data.sampling.mix import (
    CYCLE,
    MixedOrder,
    MixSegment,
    configured_quotas,
    cycle_quotas,
    open_order,
    sampling_shares,
)
from muomni.data.sampling.order import Order, SampleOrder
from muomni.data.shards.exclusion_mask import IncludedSamples
from muomni.data.shards.source import Source
from muomni.errors import ConfigError
from tests.corpora import write_text_dataset

NAMES = ["books", "talks", "web"]


def mixed(sizes: list[int], weights: list[float], seed: int = 0) -> MixedOrder:
    starts = np.cumsum([0, *sizes]).tolist()
    orders = [
        SampleOrder(IncludedSamples(size, first=starts[i]), seed, shuffle_window=64, key=i)
        for i, size in enumerate(sizes)
    ]
    return MixedOrder(orders, cycle_quotas((np.array(weights) / sum(weights)).tolist()))


def changed(sizes: list[int], *parts: tuple[int, list[int]]) -> MixedOrder:
    """A mix whose quotas change at positions of the stream; the first one is 0."""
    order = mixed(sizes, [1.0] * len(sizes))
    return MixedOrder(order.orders, parts[0][1], parts[1:])


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 200_000), st.integers(0, 3000), st.integers(0, 300_000))
def test_corpora_continue_where_they_were_when_quotas_change(
    first: int, more: int, start: int
) -> None:
    sizes = [50, 400, 70]
    parts = [(0, [CYCLE // 2, CYCLE // 2, 0]), (first, [10, 0, 30]), (first + more, [1, 5, 2])]
    order = changed(sizes, *parts)
    before = changed(sizes, parts[0])
    assert order.epoch_size == before.epoch_size == 450  # the third corpus had no quota
    assert order.samples(0, first)[0].tolist() == before.samples(0, first)[0].tolist()
    ids, epochs = order.samples(0, first + more + 4000)
    bounds = np.cumsum([0, *sizes])
    for number in range(3):  # the stream of each corpus is that of the corpus alone
        is_its = (ids >= bounds[number]) & (ids < bounds[number + 1])
        alone = order.orders[number].samples(0, int(is_its.sum()))
        assert (ids[is_its] == alone[0]).all() and (epochs[is_its] == alone[1]).all()
    of_corpus = np.searchsorted(bounds, ids[first + more :], side="right") - 1
    assert np.bincount(of_corpus).tolist() == [500, 2500, 1000]
    part = order.samples(start, start + 500)
    longer = order.samples(max(0, start - 100), start + 500)
    assert part[0].tolist() == longer[0][min(start, 100) :].tolist()


def test_a_change_of_quotas_is_part_of_the_digest() -> None:
    texts = {
        changed([50, 70], *parts).depends_on
        for parts in ([(0, [1, 2])], [(0, [1, 2]), (5, [2, 1])], [(0, [1, 2]), (6, [2, 1])])
    }
    assert len(texts) == 3


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=40))
def test_quotas_fill_a_cycle_and_are_positive(weights: list[float]) -> None:
    shares = np.array(weights) / sum(weights)
    quotas = cycle_quotas(shares.tolist())
    assert sum(quotas) == CYCLE and min(quotas) >= 1
    assert np.abs(np.array(quotas) - shares * CYCLE).max() <= len(weights) + 1


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 400), st.floats(0.05, 5)), min_size=1, max_size=4),
    st.integers(0, 10**7),
    st.integers(0, 300),
)
def test_random_access_equals_sequential_access(
    corpora: list[tuple[int, float]], start: int, num: int
) -> None:
    sizes, weights = [size for size, _ in corpora], [weight for _, weight in corpora]
    ids, epochs = mixed(sizes, weights).samples(start, start + num)
    singles = [mixed(sizes, weights).samples(p, p + 1) for p in range(start, start + num, 37)]
    assert [int(i[0]) for i, _ in singles] == ids[::37].tolist()
    assert [int(e[0]) for _, e in singles] == epochs[::37].tolist()


def test_each_corpus_has_its_own_epochs_and_its_share() -> None:
    sizes, weights = [100, 1000, 333], [3.0, 1.0, 1.0]
    ids, epochs = mixed(sizes, weights).samples(0, 4000)
    starts = np.cumsum([0, *sizes])
    for number, share in enumerate((0.6, 0.2, 0.2)):
        is_its = (ids >= starts[number]) & (ids < starts[number + 1])
        assert abs(is_its.sum() - 4000 * share) <= 1
        for window in range(0, 4000, 100):  # also in every window
            assert abs(is_its[window : window + 100].sum() - 100 * share) <= 1
        assert epochs[is_its].tolist() == (np.arange(is_its.sum()) // sizes[number]).tolist()
        for epoch in range(int(is_its.sum()) // sizes[number]):
            sampled = ids[is_its & (epochs == epoch)]
            assert np.array_equal(np.sort(sampled), np.arange(*starts[number : number + 2]))


def test_shares_by_weight_by_size_and_by_length() -> None:
    sizes, means = [100, 300, 600], [10.0, 10.0, 40.0]

    def shares(**content: object) -> list[float]:
        mix = validate(MixSection, dict(content), "test")
        return [round(share, 6) for share in sampling_shares(mix, NAMES, sizes, means)]

    assert shares(weights={"books": 1, "talks": 1, "web": 2}) == [0.25, 0.25, 0.5]
    assert shares(alpha=1.0) == [0.1, 0.3, 0.6]
    assert shares(alpha=0.0) == [round(1 / 3, 6)] * 3
    assert shares(weights={"books": 1, "talks": 1, "web": 0}) == [0.5, 0.5, 0]
    by_length = np.array(shares(weights={"books": 1, "talks": 1, "web": 2}, unit="length"))
    lengths = by_length * means
    assert (lengths / lengths.sum()).round(4).tolist() == [0.25, 0.25, 0.5]
    assert shares(alpha=1.0, unit="length") == [0.1, 0.3, 0.6]  # proportional to size in any unit


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (
            {"boks": 1.0},
            r"names unknown corpus 'boks' \(did you mean 'books'\?\); corpora: books, talks, web",
        ),
        ({"books": 1.0, "web": 1.0}, r"lacks 'talks'; set its weight \(0 to skip it\)"),
    ],
)
def test_error_names_mismatched_weights(weights: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sampling_shares(MixSection(weights=weights), NAMES, [1, 1, 1], [1.0] * 3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "exactly one of data.mix.weights and data.mix.alpha"),
        ({"alpha": 1, "weights": {"a": 1}}, "exactly one"),
        ({"weights": {"a": 0}}, "needs a weight above 0"),
        ({"alpha": 1, "unit": "tokens"}, "unit"),
    ],
)
def test_invalid_mix_is_rejected(content: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(MixSection, content, "test")


def test_source_is_mixed_according_to_its_config(tmp_path: Path) -> None:
    names = ["aa", "bb"]
    found = [
        write_text_dataset(tmp_path / name, num_train=n)
        for name, n in zip(names, (20, 80), strict=True)
    ]
    source = Source(found, "train")
    lengths = Lengths(len(source), np.ones_like, "one")

    def opened(mix: MixSection) -> Order:
        segment = MixSegment(0, 0, configured_quotas(source, lengths, mix))
        return open_order(source, DataSection(), 0, 64, [segment])

    plain = open_order(source, DataSection(), 0, 64)
    assert plain.epoch_size == 100 and sorted(plain.samples(0, 100)[0].tolist()) == list(range(100))
    even = opened(MixSection(alpha=0.0))
    ids, epochs = even.samples(0, 100)
    assert (ids < 20).sum() == 50 and epochs[ids < 20].max() == 2
    weights = {"aa": 0.0, "bb": 1.0}
    alone = opened(MixSection(weights=weights))
    assert alone.sample_ids().tolist() == list(range(20, 100))
    assert len({order.depends_on for order in (plain, even, alone)}) == 3
