"""The plan: each sample once per epoch, and the same steps for any world size and resume."""

import hashlib
import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from muomni.data.sampling import plan as plan_module
from muomni.data.sampling.lengths import Lengths
from muomni.data.sampling.plan import (
    Batching,
    CountCache,
    MicroBatch,
    Plan,
    cover,
    group_similar_costs,
)
from muomni.errors import ConfigError, DataError

lengths_strategy = st.lists(st.integers(1, 100), min_size=12, max_size=300).map(np.array)
batching_strategy = st.sampled_from(
    [
        Batching("fixed", 3, shuffle_window=50),
        Batching("bucket", 130, shuffle_window=50),
        Batching("pack", 100, num_sequences=2, shuffle_window=50),
    ]
)
MODES = ("fixed", "bucket", "pack")


def batching_of(mode: str) -> Batching:
    return Batching(mode, 4 if mode == "fixed" else 100, num_sequences=2, shuffle_window=128)  # type: ignore[arg-type]


def pairs(batch: MicroBatch) -> list[tuple[int, int]]:
    """The (sample, epoch) pairs of a micro-batch."""
    assert batch.epochs is not None
    sequences = zip(batch.sequences, batch.epochs, strict=True)
    return [pair for ids, epochs in sequences for pair in zip(ids, epochs, strict=True)]


def steps_of(plan: Plan, num_epochs: int) -> list[list[MicroBatch]]:
    return [plan.step(step) for step in range(plan.num_steps(num_epochs))]


@settings(max_examples=60, deadline=None)
@given(lengths_strategy, batching_strategy, st.integers(1, 4))
def test_each_sample_occurs_once_per_epoch_and_every_step_is_full(
    lengths: np.ndarray, batching: Batching, num_epochs: int
) -> None:
    steps = steps_of(Plan(lengths, batching, 2, seed=7), num_epochs)
    assert all(len(step) == 2 and all(batch.ids for batch in step) for step in steps)
    per_step = [[pair for batch in step for pair in pairs(batch)] for step in steps]
    seen = set(itertools.chain(*per_step))
    every = set(itertools.product(range(len(lengths)), range(num_epochs)))
    assert len(seen) == sum(map(len, per_step)) and every <= seen
    # Samples of the next epoch only complete the last step.
    assert all(epoch == num_epochs for _, epoch in seen - every)
    assert seen - every <= set(per_step[-1]) and every & set(per_step[-1])


@settings(max_examples=40, deadline=None)
@given(lengths_strategy, batching_strategy)
def test_micro_batches_respect_their_budget(lengths: np.ndarray, batching: Batching) -> None:
    for batch in itertools.chain(*steps_of(Plan(lengths, batching, 2, seed=1), 2)):
        if batching.mode == "fixed":
            assert len(batch.sequences) == batching.size
        elif batching.mode == "bucket":
            assert len(batch.ids) * max(lengths[i] for i in batch.ids) <= batching.size
        else:
            assert len(batch.sequences) == batching.num_sequences
            assert all(sum(lengths[i] for i in ids) <= batching.size for ids in batch.sequences)


@pytest.mark.parametrize("mode", MODES)
def test_steps_are_the_same_for_any_world_size_and_start(mode: str) -> None:
    lengths = np.random.default_rng(0).integers(1, 90, 500)

    def fresh() -> Plan:
        return Plan(lengths, batching_of(mode), 8, 3)

    reference = list(itertools.islice(fresh().rank_batches(0, 0, 1), 400))
    for world_size in (1, 2, 4, 8):
        for start in (0, 1, 17, 45):
            per_rank = 8 // world_size
            ranks = [
                list(itertools.islice(fresh().rank_batches(start, rank, world_size), per_rank * 5))
                for rank in range(world_size)
            ]
            together = [
                ranks[slot % world_size][step * per_rank + slot // world_size]
                for step in range(5)
                for slot in range(8)
            ]
            assert together == reference[start * 8 : (start + 5) * 8]


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(MODES), st.lists(st.integers(1, 9), min_size=1, max_size=5), st.data())
def test_resuming_on_other_world_sizes_repeats_the_uninterrupted_run(
    mode: str, runs: list[int], data: st.DataObject
) -> None:
    lengths = np.random.default_rng(5).integers(1, 90, 150)
    reference = Plan(lengths, batching_of(mode), 8, 3)
    step = 0
    for num_steps in runs:
        world_size = data.draw(st.sampled_from([1, 2, 4, 8]))
        plan = Plan(lengths, batching_of(mode), 8, 3)
        shares = [plan.rank_batches(step, rank, world_size) for rank in range(world_size)]
        for _ in range(num_steps):
            found = [next(shares[slot % world_size]) for slot in range(8)]
            assert found == reference.step(step)
            step += 1


@pytest.mark.parametrize("mode", MODES)
def test_shared_and_cached_counts_give_the_same_plan(
    mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = np.random.default_rng(2).integers(1, 90, 600)
    alone = Plan(lengths, batching_of(mode), 4, 3)
    shared = Plan(lengths, batching_of(mode), 4, 3)
    while (epoch := shared.uncounted_epoch(num_epochs=3)) is not None:
        bounds = [0, 1, 3, shared.windows.count]
        shares = [shared.count_windows(epoch, *pair) for pair in itertools.pairwise(bounds)]
        shared.set_counts(epoch, np.concatenate(shares))
    assert shared.num_steps(3) == alone.num_steps(3)
    monkeypatch.setattr(plan_module, "_MIN_CACHED_COUNTS", 1)
    monkeypatch.setattr(plan_module, "_MAX_CACHED_EPOCHS", 1)
    writes = Plan(lengths, batching_of(mode), 4, 3, cache=CountCache(tmp_path, "a" * 16))
    reads = Plan(lengths, batching_of(mode), 4, 3, cache=CountCache(tmp_path, "a" * 16))
    for step in range(alone.num_steps(3)):
        assert alone.step(step) == shared.step(step) == writes.step(step)
    if mode != "fixed":
        assert len(list(tmp_path.glob(".counts-*.npy"))) >= 3
        monkeypatch.setattr(reads, "count_windows", None)
    assert reads.step(alone.num_steps(2)) == alone.step(alone.num_steps(2))
    assert reads.step(1) == alone.step(1)


def test_order_depends_on_epoch_and_seed() -> None:
    lengths = np.full(64, 5)
    plan = Plan(lengths, Batching("fixed", 4), 1, seed=0)
    assert plan.step(0)[0].sequences != plan.step(16)[0].sequences
    assert plan.step(0) == Plan(lengths, Batching("fixed", 4), 1, seed=0).step(0)
    assert plan.step(0) != Plan(lengths, Batching("fixed", 4), 1, seed=1).step(0)


def test_plan_is_the_same_on_every_machine() -> None:
    """Changing these values requires a changelog entry marked [order]."""
    lengths = np.arange(3000) * 7919 % 89 + 1
    digests = {}
    for mode in MODES:
        plan = Plan(lengths, batching_of(mode), 8, 11)
        # The digests were taken when the field `sequences` was called `rows`.
        content = repr([plan.step(step) for step in (0, 1, 60)]).replace("sequences=", "rows=")
        digests[mode] = hashlib.sha256(content.encode()).hexdigest()[:16]
    assert digests == GOLDEN


GOLDEN = {"fixed": "2d27fde91ccdd969", "bucket": "92891cd0a854211f", "pack": "b5c7f4f0290c74d3"}


def test_packed_sequences_are_nearly_full() -> None:
    lengths = np.random.default_rng(1).integers(3, 60, 4000)
    plan = Plan(lengths, Batching("pack", 512, num_sequences=3), 1, 0)
    assert lengths.sum() / (plan.num_steps(1) * 3 * 512) > 0.99


def test_buckets_have_little_padding_and_similar_costs() -> None:
    lengths = np.random.default_rng(1).integers(50, 1000, 20_000)
    steps = steps_of(Plan(lengths, Batching("bucket", 16_000), 8, 0), 1)
    costs = [[len(b.ids) * max(lengths[i] for i in b.ids) for b in step] for step in steps]
    assert lengths.sum() / np.sum(costs) > 0.97
    waits = [max(step) / np.mean(step) - 1 for step in costs]
    assert np.mean(waits) < 0.1


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 60), st.integers(0, 40), st.integers(1, 12))
def test_full_steps_group_similar_costs(num: int, first: int, group: int) -> None:
    order = group_similar_costs(num, first, group, (1, 2))
    assert sorted(order) == list(range(num))
    head = min(num, -first % group)
    num_steps = (num - head) // group
    for start in range(head, head + num_steps * group, group):
        step = order[start : start + group]
        assert step == list(range(step[0], step[0] + group))
    shared = sorted(order[:head] + order[head + num_steps * group :])
    below, above = shared[0] if shared else 0, num - 1 - shared[-1] if shared else 0
    if shared:
        assert shared == list(range(shared[0], shared[-1] + 1)) and abs(below - above) <= group


def test_cover_contains_each_sample_exactly_once() -> None:
    lengths = np.random.default_rng(1).integers(1, 90, 101)
    ids = np.arange(101)[lengths > 5]
    for batching in (Batching("fixed", 7), Batching("bucket", 300), Batching("pack", 100, 2)):
        covered = cover(ids, lengths[ids], batching)
        assert sorted(i for batch in covered for i in batch.ids) == ids.tolist()
        assert all(batch.epochs is None for batch in covered)


def test_error_of_an_invalid_world_size_lists_the_valid_ones() -> None:
    plan = Plan(np.full(64, 5), Batching("fixed", 4), 6, seed=0)
    with pytest.raises(ConfigError, match="1 or 2 or 3 or 6 ranks"):
        next(plan.rank_batches(0, 0, 4))


def test_too_long_and_too_few_samples_are_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    too_long = np.array([1, 2, 3, 900])
    with pytest.raises(DataError, match="sample 3 has length 900"):
        Plan(too_long, Batching("pack", 512), 1, 0)
    with pytest.raises(DataError, match="no samples"):
        Plan(np.array([]), Batching("fixed", 2), 1, 0)
    for mode in MODES:
        with pytest.raises(DataError, match="but one step needs 4"):
            Plan(np.array([1, 2]), Batching(mode, 2), 4, 0)  # type: ignore[arg-type]
    # Above MAX_FULL_SCAN, the error is raised when the window is built.
    monkeypatch.setattr(plan_module, "MAX_FULL_SCAN", 3)
    with pytest.raises(DataError, match="sample 3 has length 900"):
        Plan(too_long, Batching("pack", 512), 1, 0).step(0)


def test_lengths_are_read_only_for_the_samples_of_a_window() -> None:
    requested: list[int] = []

    def read(ids: np.ndarray) -> np.ndarray:
        requested.append(len(ids))
        return ids % 50 + 1

    plan = Plan(Lengths(10**9, read, ""), Batching("bucket", 4000), 64, seed=0)
    requested.clear()
    counts = plan.count_windows(0, 1000, 1002)
    assert requested == [2048, 2048] and counts.min() > 0
