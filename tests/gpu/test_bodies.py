"""The bodies of the GPU tests, in a small form on CPU ranks."""

from pathlib import Path

import pytest

from tests.gpu.bodies import peak_and_prediction, steps_without_waits
from tests.ranks import RankPool
from tests.training.runs import thinker_config

ZERO1 = {"zero_optimization": {"stage": 1, "reduce_bucket_size": 20_000}}


def test_steps_run_after_a_warm_up(text_data: Path, tmp_path: Path, one_rank: RankPool) -> None:
    config = thinker_config(text_data, {"precision": "bf16"})
    options = {"config": config, "run": tmp_path, "engine_json": ZERO1}
    assert one_rank.run(steps_without_waits, **options) == ["cpu"]


def test_the_peak_is_close_to_the_prediction(
    text_data: Path, tmp_path: Path, one_rank: RankPool
) -> None:
    config = thinker_config(text_data, {"batch": {"global_tokens": 4 * 512, "micro_sequences": 8}})
    options = {"config": config, "run": tmp_path, "engine_json": ZERO1}
    ((measured, predicted),) = one_rank.run(peak_and_prediction, **options)
    assert predicted == pytest.approx(measured, rel=0.06)
