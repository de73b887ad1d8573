"""The plan: each sample once per epoch, and the same steps for any world size and resume."""

import hashlib
import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from muomni.config.run import DurationBatch, PackedBatch, SampleBatch
from muomni.data.sampling import plan as plan_module
from muomni.data.sampling.lengths import Lengths
from muomni.data.sampling.plan import (
    Batching,
    CountCache,
    MicroBatch,
    Plan,
    batching_of,
    cover,
)
from muomni.errors import DataError

lengths_strategy = st.lists(st.integers(1, 100), min_size=12, max_size=300).map(np.array)
batching_strategy = st.sampled_from(
    [
        Batching("fixed", 6, 3, shuffle_window=50),
        Batching("bucket", 260, 130, shuffle_window=50),
        Batching("pack", 4, 2, seq_len=100, shuffle_window=50),
    ]
)
MODES = ("fixed", "bucket", "pack")
RANKS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)


def batching_for(mode: str, micro_size: int = 0) -> Batching:
    """A global batch of 24 sequences, 48 samples, or about 2,000 length units."""
    sizes = {"fixed": (48, 5), "bucket": (2000, 400), "pack": (24, 3)}
    size, default = sizes[mode]
    return Batching(mode, size, micro_size or default, seq_len=100, shuffle_window=128)  # type: ignore[arg-type]


def pairs(batch: MicroBatch) -> list[tuple[int, int]]:
    """The (sample, epoch) pairs of a micro-batch."""
    assert batch.epochs is not None
    sequences = zip(batch.sequences, batch.epochs, strict=True)
    return [pair for ids, epochs in sequences for pair in zip(ids, epochs, strict=True)]


def steps_of(plan: Plan, num_epochs: int) -> list[list[MicroBatch]]:
    return [plan.rank_step(step, 0, 1) for step in range(plan.num_steps(num_epochs))]


def unit_list(micro_batches: list[MicroBatch]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The units of micro-batches in order, without padding."""
    return [
        unit
        for batch in micro_batches
        for unit in zip(batch.sequences, batch.epochs or (), strict=True)
        if unit[0]
    ]


@settings(max_examples=60, deadline=None)
@given(lengths_strategy, batching_strategy, st.integers(1, 4))
def test_each_sample_occurs_once_per_epoch_and_every_step_is_full(
    lengths: np.ndarray, batching: Batching, num_epochs: int
) -> None:
    try:
        steps = steps_of(Plan(lengths, batching, seed=7), num_epochs)
    except DataError:  # fewer sequences than a step needs
        return
    if batching.units_per_step is not None:
        assert {len(unit_list(step)) for step in steps} == {batching.units_per_step}
    per_step = [[pair for batch in step for pair in pairs(batch)] for step in steps]
    assert all(per_step)
    seen = set(itertools.chain(*per_step))
    every = set(itertools.product(range(len(lengths)), range(num_epochs)))
    assert len(seen) == sum(map(len, per_step)) and every <= seen
    # Samples of the next epoch only complete the last step.
    assert all(epoch == num_epochs for _, epoch in seen - every)
    assert seen - every <= set(per_step[-1]) and every & set(per_step[-1])


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(MODES), st.integers(1, 70), st.integers(0, 40))
def test_micro_batches_respect_their_budget_and_have_one_shape(
    mode: str, num_ranks: int, step: int
) -> None:
    lengths = np.random.default_rng(3).integers(1, 90, 3000)
    batching = batching_for(mode)
    plan = Plan(lengths, batching, seed=1)
    shares = [plan.rank_step(step, rank, num_ranks) for rank in range(num_ranks)]
    assert {len(share) for share in shares} == {plan.num_micro_batches(step, num_ranks)}
    batches = list(itertools.chain(*shares))
    sizes = [len(unit_list([batch])) for batch in batches]
    assert max(sizes) - min(sizes) <= 1
    if mode == "bucket":
        assert all(
            n * max(lengths[b.ids], default=0) <= 400 for n, b in zip(sizes, batches, strict=True)
        )
        return
    assert {len(batch.sequences) for batch in batches} == {max(sizes)}
    assert max(sizes) <= batching.micro_size
    if mode == "pack":
        assert all(lengths[list(ids)].sum() <= 100 for batch in batches for ids in batch.sequences)


@pytest.mark.parametrize("mode", MODES)
def test_a_global_batch_is_the_same_for_any_number_of_ranks_and_any_micro_batch(mode: str) -> None:
    lengths = np.random.default_rng(0).integers(1, 90, 3000)
    reference = Plan(lengths, batching_for(mode), 3)
    for num_ranks, micro_size in itertools.product(RANKS, (90, 1000)):
        plan = Plan(lengths, batching_for(mode, micro_size), 3)
        for step in (0, 1, 45):
            expected = unit_list(reference.rank_step(step, 0, 1))
            shares = [plan.rank_step(step, rank, num_ranks) for rank in range(num_ranks)]
            in_turn = [batch for turn in zip(*shares, strict=True) for batch in turn]
            assert unit_list(in_turn) == expected


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(MODES), st.lists(st.integers(1, 9), min_size=1, max_size=5), st.data())
def test_resuming_on_other_numbers_of_ranks_repeats_the_uninterrupted_run(
    mode: str, runs: list[int], data: st.DataObject
) -> None:
    lengths = np.random.default_rng(5).integers(1, 90, 1500)
    reference = Plan(lengths, batching_for(mode), 3)
    step = 0
    for num_steps in runs:
        num_ranks = data.draw(st.sampled_from(RANKS))
        plan = Plan(lengths, batching_for(mode), 3)
        shares = [plan.rank_batches(step, rank, num_ranks) for rank in range(num_ranks)]
        for _ in range(num_steps):
            num_turns = plan.num_micro_batches(step, num_ranks)
            found = [next(share) for _ in range(num_turns) for share in shares]
            assert unit_list(found) == unit_list(reference.rank_step(step, 0, 1))
            step += 1


def test_micro_batches_are_as_few_as_fit() -> None:
    lengths = np.full(640, 5)
    plan = Plan(lengths, Batching("fixed", 64, 8), 0)
    assert [plan.num_micro_batches(0, ranks) for ranks in (1, 6, 8, 12, 64)] == [8, 2, 1, 1, 1]
    # 64 samples on 12 ranks: 5 or 6 each, padded to 6.
    sizes = [len(plan.rank_step(0, rank, 12)[0].ids) for rank in range(12)]
    assert sorted(set(sizes)) == [5, 6] and sum(sizes) == 64


def test_buckets_of_a_window_have_equal_sums() -> None:
    lengths = np.random.default_rng(1).integers(50, 1000, 20_000)
    plan = Plan(lengths, Batching("bucket", 128_000, 16_000), 0)
    sums, padded = [], 0
    for step in range(plan.num_steps(1)):
        batches = plan.rank_step(step, 0, 1)
        sums.append(sum(lengths[batch.ids].sum() for batch in batches))
        padded += sum(len(batch.ids) * lengths[batch.ids].max() for batch in batches)
    assert lengths.sum() / padded > 0.97
    assert max(sums) / min(sums) < 1.05 and 0.9 < np.mean(sums) / 128_000 < 1.1


def test_sections_of_the_config_define_the_batching() -> None:
    assert batching_of(PackedBatch(seq_len=100, global_tokens=1030, micro_sequences=4)) == Batching(
        "pack", 10, 4, seq_len=100
    )
    assert batching_of(SampleBatch(global_samples=64, micro_samples=8)) == Batching("fixed", 64, 8)
    seconds = DurationBatch(global_seconds=60, micro_seconds=20)
    assert batching_of(seconds) == Batching("bucket", 6000, 2000)


@pytest.mark.parametrize("mode", MODES)
def test_shared_and_cached_counts_give_the_same_plan(
    mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = np.random.default_rng(2).integers(1, 90, 600)
    alone = Plan(lengths, batching_for(mode), 3)
    shared = Plan(lengths, batching_for(mode), 3)
    while (epoch := shared.uncounted_epoch(num_epochs=3)) is not None:
        bounds = [0, 1, 3, shared.windows.count]
        shares = [shared.count_windows(epoch, *pair) for pair in itertools.pairwise(bounds)]
        shared.set_counts(epoch, np.concatenate(shares))
    assert shared.num_steps(3) == alone.num_steps(3)
    monkeypatch.setattr(plan_module, "_MIN_CACHED_COUNTS", 1)
    monkeypatch.setattr(plan_module, "_MAX_CACHED_EPOCHS", 1)
    writes = Plan(lengths, batching_for(mode), 3, cache=CountCache(tmp_path, "a" * 16))
    reads = Plan(lengths, batching_for(mode), 3, cache=CountCache(tmp_path, "a" * 16))
    for step in range(alone.num_steps(3)):
        assert (
            alone.rank_step(step, 0, 1)
            == shared.rank_step(step, 0, 1)
            == writes.rank_step(step, 0, 1)
        )
    if mode != "fixed":
        assert len(list(tmp_path.glob(".counts-*.npy"))) >= 3
        monkeypatch.setattr(reads, "count_windows", None)
    assert reads.rank_step(alone.num_steps(2), 0, 1) == alone.rank_step(alone.num_steps(2), 0, 1)
    assert reads.rank_step(1, 0, 1) == alone.rank_step(1, 0, 1)


def test_order_depends_on_epoch_and_seed() -> None:
    lengths = np.full(64, 5)
    plan = Plan(lengths, Batching("fixed", 4, 4), seed=0)
    first = plan.rank_step(0, 0, 1)
    assert first[0].sequences != plan.rank_step(16, 0, 1)[0].sequences
    assert first == Plan(lengths, Batching("fixed", 4, 4), seed=0).rank_step(0, 0, 1)
    assert first != Plan(lengths, Batching("fixed", 4, 4), seed=1).rank_step(0, 0, 1)


def test_plan_is_the_same_on_every_machine() -> None:
    """Changing these values requires a changelog entry marked [order]."""
    lengths = np.arange(3000) * 7919 % 89 + 1
    digests = {}
    for mode in MODES:
        plan = Plan(lengths, batching_for(mode), 11)
        content = repr([unit_list(plan.rank_step(step, 0, 1)) for step in (0, 1, 60)])
        digests[mode] = hashlib.sha256(content.encode()).hexdigest()[:16]
    assert digests == GOLDEN


GOLDEN = {"fixed": "8a2519cdf2c7e0c9", "bucket": "b3cc668c6218660d", "pack": "50cba143279085ae"}


def test_packed_sequences_are_nearly_full() -> None:
    lengths = np.random.default_rng(1).integers(3, 60, 4000)
    plan = Plan(lengths, Batching("pack", 3, 3, seq_len=512), 0)
    assert lengths.sum() / (plan.num_steps(1) * 3 * 512) > 0.99


def test_cover_contains_each_sample_exactly_once() -> None:
    lengths = np.random.default_rng(1).integers(1, 90, 101)
    ids = np.arange(101)[lengths > 5]
    for batching in (
        Batching("fixed", 7, 7),
        Batching("bucket", 300, 300),
        Batching("pack", 2, 2, seq_len=100),
    ):
        covered = cover(ids, lengths[ids], batching)
        assert sorted(i for batch in covered for i in batch.ids) == ids.tolist()
        assert all(batch.epochs is None for batch in covered)


def test_too_long_and_too_few_samples_are_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    too_long, packed = np.array([1, 2, 3, 900]), Batching("pack", 1, 1, seq_len=512)
    with pytest.raises(DataError, match="sample 3 has length 900"):
        Plan(too_long, packed, 0)
    with pytest.raises(
        DataError, match=r"length 900 mel frames .* batch\.micro_seconds allows 500"
    ):
        Plan(too_long, Batching("bucket", 1000, 500), 0)
    with pytest.raises(DataError, match="no samples"):
        Plan(np.array([]), Batching("fixed", 2, 2), 0)
    for mode in ("fixed", "pack"):
        with pytest.raises(DataError, match="but one step needs 4"):
            Plan(np.array([1, 2]), Batching(mode, 4, 2, seq_len=2), 0)  # type: ignore[arg-type]
    # Above MAX_FULL_SCAN, the error is raised when the window is built.
    monkeypatch.setattr(plan_module, "MAX_FULL_SCAN", 3)
    with pytest.raises(DataError, match="sample 3 has length 900"):
        Plan(too_long, packed, 0).rank_step(0, 0, 1)


def test_lengths_are_read_only_for_the_samples_of_a_window() -> None:
    requested: list[int] = []

    def read(ids: np.ndarray) -> np.ndarray:
        requested.append(len(ids))
        return ids % 50 + 1

    plan = Plan(Lengths(10**9, read, ""), Batching("bucket", 16_000, 4000), seed=0)
    requested.clear()
    counts = plan.count_windows(0, 1000, 1002)
    assert requested == [2048, 2048] and counts.min() > 0
