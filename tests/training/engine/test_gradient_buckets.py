"""Gradient buckets that fill up during the backward pass change no metric.

DeepSpeed sends a full bucket at once, and must know then whether the micro-batch is the last of its window.
"""

from pathlib import Path
from typing import Any

import pytest

from tests.ranks import RankPool
from tests.training.runs import thinker_config, train


def small_buckets(stage: int) -> dict[str, Any]:
    """An engine JSON whose buckets are much smaller than the model."""
    section = {"stage": stage, "overlap_comm": True, "reduce_bucket_size": 5000}
    return {"zero_optimization": section if stage else {"stage": 0}}


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_accumulated_gradients_are_complete(
    zero: int, text_data: Path, tmp_path: Path, two_ranks: RankPool
) -> None:
    config = thinker_config(text_data, {"training": {"max_steps": 4}})
    curves = [
        two_ranks.run(train, config=config, run=tmp_path / str(stage), zero=small_buckets(stage))[0]
        for stage in (0, zero)
    ]
    for metric in ("loss", "grad_norm"):
        plain, bucketed = ([line[metric] for line in result["curve"]] for result in curves)
        assert bucketed == pytest.approx(plain, rel=1e-5)
