"""The plan: each sample once an epoch, equal steps on all ranks, the same steps for any world size."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from muomni.data.plan import Batching, Plan, cover
from muomni.errors import ConfigError, DataError

lengths_strategy = st.lists(st.integers(1, 100), min_size=12, max_size=300).map(np.array)
batching_strategy = st.sampled_from(
    [
        Batching("fixed", 3, window=50),
        Batching("bucket", 130, window=50),
        Batching("pack", 100, rows=2, window=50),
    ]
)


@settings(max_examples=60, deadline=None)
@given(lengths_strategy, batching_strategy, st.integers(0, 3))
def test_each_sample_comes_once_an_epoch_but_for_the_incomplete_last_step(lengths, batching, epoch):
    plan = Plan(lengths, batching, 2, seed=7)
    batches = plan._micro_batches(epoch)
    ids = [i for batch in batches for i in batch.ids]
    assert sorted(ids) == list(range(len(lengths)))
    assert len(batches) - plan.num_steps(epoch) * 2 < 2


@settings(max_examples=40, deadline=None)
@given(lengths_strategy, batching_strategy)
def test_no_micro_batch_exceeds_its_budget(lengths, batching):
    for batch in Plan(lengths, batching, 2, seed=1)._micro_batches(0):
        if batching.mode == "fixed":
            assert len(batch.rows) <= batching.size
        elif batching.mode == "bucket":
            assert len(batch.ids) * max(lengths[i] for i in batch.ids) <= batching.size
        else:
            assert len(batch.rows) <= batching.rows
            assert all(sum(lengths[i] for i in row) <= batching.size for row in batch.rows)


@pytest.mark.parametrize("mode", ["fixed", "bucket", "pack"])
def test_every_world_size_sees_the_same_steps_and_resumes_anywhere(mode):
    lengths = np.random.default_rng(0).integers(1, 90, 500)
    batching = Batching(mode, 4 if mode == "fixed" else 100, rows=2, window=128)
    reference = list(itertools.islice(Plan(lengths, batching, 8, 3).rank_batches(0, 0, 1), 400))
    for world_size in (1, 2, 4, 8):
        for start in (0, 1, 17):
            per_rank = 8 // world_size
            ranks = [
                list(
                    itertools.islice(
                        Plan(lengths, batching, 8, 3).rank_batches(start, rank, world_size),
                        per_rank * 5,
                    )
                )
                for rank in range(world_size)
            ]
            together = [
                ranks[slot % world_size][step * per_rank + slot // world_size]
                for step in range(5)
                for slot in range(8)
            ]
            assert together == reference[start * 8 : (start + 5) * 8]


def test_epochs_differ_and_the_seed_decides():
    lengths = np.full(64, 5)
    plan = Plan(lengths, Batching("fixed", 4), 1, seed=0)
    assert plan.step(0, 0) != plan.step(1, 0)
    assert plan.step(0, 0) == Plan(lengths, Batching("fixed", 4), 1, seed=0).step(0, 0)
    assert plan.step(0, 0) != Plan(lengths, Batching("fixed", 4), 1, seed=1).step(0, 0)


def test_the_order_is_the_same_on_every_machine():
    plan = Plan(np.full(40, 1), Batching("fixed", 5), 1, seed=11)
    assert plan.step(2, 0)[0].ids == GOLDEN


GOLDEN = [22, 16, 10, 17, 39]


def test_packing_keeps_rows_nearly_full():
    lengths = np.random.default_rng(1).integers(3, 60, 4000)
    batches = Plan(lengths, Batching("pack", 512, rows=1), 1, 0)._micro_batches(0)
    assert lengths.sum() / (len(batches) * 512) > 0.98


def test_buckets_waste_little():
    lengths = np.random.default_rng(1).integers(50, 1000, 4000)
    batches = Plan(lengths, Batching("bucket", 16_000), 1, 0)._micro_batches(0)
    padded = sum(len(b.ids) * max(lengths[i] for i in b.ids) for b in batches)
    assert lengths.sum() / padded > 0.97


def test_cover_holds_each_sample_exactly_once():
    lengths = np.random.default_rng(1).integers(1, 90, 101)
    for batching in (Batching("fixed", 7), Batching("bucket", 300), Batching("pack", 100, 2)):
        ids = [i for batch in cover(lengths, batching) for i in batch.ids]
        assert sorted(ids) == list(range(101))


def test_ranks_that_cannot_share_a_step_are_told_which_can():
    plan = Plan(np.full(64, 5), Batching("fixed", 4), 6, seed=0)
    with pytest.raises(ConfigError, match="1 or 2 or 3 or 6 ranks"):
        next(plan.rank_batches(0, 0, 4))


def test_too_long_and_too_few_are_named():
    with pytest.raises(DataError, match="sample 3 has length 900"):
        Plan(np.array([1, 2, 3, 900]), Batching("pack", 512), 1, 0)
    with pytest.raises(DataError, match="no samples"):
        Plan(np.array([]), Batching("fixed", 2), 1, 0)
    with pytest.raises(DataError, match="fewer than the 4 of one step"):
        Plan(np.array([1, 2]), Batching("fixed", 2), 4, 0).num_steps(0)
