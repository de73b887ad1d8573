"""Ranks that count windows together get the plan of one rank."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from muomni.config.run import DataSection
from muomni.data.sampling import plan as plan_module
from muomni.data.sampling.plan import Batching, CountCache, Plan
from muomni.distributed.discovery import Ranks
from muomni.training import feed, validation
from muomni.training.feed import SharedCounts
from muomni.training.session import Request, prepare
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
    counts = SharedCounts(plan, num_read_ahead=8)
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


@pytest.mark.parametrize(
    ("setting", "device", "expected"),
    [("auto", "cuda", 7), ("auto", "cpu", 0), (3, "cuda", 3), (0, "cuda", 0), (2, "cpu", 2)],
)
def test_a_gpu_rank_has_a_worker_per_core_but_one(
    setting: Any, device: str, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed, "cores_of_rank", lambda: 8)
    data = DataSection(num_workers=setting)
    options = feed.loader_options(data, torch.device(device))
    assert options["num_workers"] == expected
    assert options["pin_memory"] == (device == "cuda")
    monkeypatch.setattr(feed, "cores_of_rank", lambda: 200)
    many = feed.loader_options(DataSection(), torch.device("cuda"))["num_workers"]
    assert many == 16  # more would mostly take memory


def test_validation_reads_like_training_and_measures_lengths_once(
    text_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[dict[str, Any]] = []

    class Recorded(validation.Loader):
        def __init__(self, *args: Any, **options: Any) -> None:
            given.append(options)
            super().__init__(*args, **options)

    monkeypatch.setattr(validation, "Loader", Recorded)
    config = thinker_config(text_data, {"data": {"prefetch": 3}})
    session = prepare(Request(config, tmp_path, tmp_path, {}, "never"), Ranks())
    assert session.val is not None
    batches = validation.SplitBatches(session.stage, session.val, torch.device("cpu"))
    expected = feed.loader_options(config.data, torch.device("cpu"))
    assert given == [expected] and expected["prefetch"] == 3
    first, second = ([micro.ids for micro, _ in batches] for _ in range(2))
    assert first == second and len(given) == 1
