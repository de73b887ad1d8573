"""Ranks that count windows together get the plan of one rank."""

from pathlib import Path

import numpy as np
import pytest

from muomni.config.run import DataSection
from muomni.data.sampling import plan as plan_module
from muomni.data.sampling.plan import Batching, CountCache, Plan
from muomni.training.feed import SharedCounts
from tests.ranks import RankPool
from tests.training.runs import thinker_config, train

BATCHING = Batching("bucket", 300, 150, shuffle_window=64)
LENGTHS = np.random.default_rng(0).integers(1, 90, 900)


def _count(folder: Path) -> tuple[int, int, str]:
    """Steps of two epochs, windows that this rank counted itself, and a later step."""
    plan_module._MIN_CACHED_COUNTS = 1
    plan = Plan(LENGTHS, BATCHING, 1, cache=CountCache(folder, "d" * 16))
    counted = []
    count_windows = plan.count_windows

    def count(epoch: int, start: int, stop: int) -> np.ndarray:
        counted.append(stop - start)
        return count_windows(epoch, start, stop)

    plan.count_windows = count  # type: ignore[method-assign]
    counts = SharedCounts(plan, DataSection(num_workers=2))
    counts.count_epochs(2)
    num_steps = plan.num_steps(2)
    counts.count_ahead(num_steps - 1, num_steps + 100)  # workers prefetch the third epoch
    return num_steps, sum(counted), repr(plan.rank_step(num_steps, 0, 1))


def test_ranks_share_the_counting_and_cache_it(tmp_path: Path, two_ranks: RankPool) -> None:
    alone = Plan(LENGTHS, BATCHING, 1)
    num_steps = alone.num_steps(2)
    found = two_ranks.run(_count, folder=tmp_path)
    assert [result[0] for result in found] == [num_steps] * 2
    assert [result[2] for result in found] == [repr(alone.rank_step(num_steps, 0, 1))] * 2
    assert sum(result[1] for result in found) == 3 * alone.windows.count
    assert abs(found[0][1] - found[1][1]) <= 3
    again = two_ranks.run(_count, folder=tmp_path)
    assert [result[1] for result in again] == [0, 0]
    assert [result[2] for result in again] == [result[2] for result in found]


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_run_of_epochs_ends_after_all_samples(
    num_ranks: int, text_data: Path, tmp_path: Path, one_rank: RankPool, two_ranks: RankPool
) -> None:
    training = {"max_steps": None, "max_epochs": 2}
    config = thinker_config(text_data, {"training": training, "optim": {"schedule": "constant"}})
    pool = one_rank if num_ranks == 1 else two_ranks
    result = pool.run(train, config=config, run=tmp_path)[0]
    lengths_of_run = result["step"]
    assert 20 < lengths_of_run == len(result["curve"])
