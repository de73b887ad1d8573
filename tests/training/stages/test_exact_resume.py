"""Every stage continues from a checkpoint bit for bit: metrics, weights, averages, and counters."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from muomni.config.registry import STAGES
from muomni.config.run import RunConfig
from muomni.training import session
from tests.ranks import RankPool
from tests.training.runs import thinker_config, train
from tests.training.stages.curves import stage_config
from tests.training.stages.sft.omni_runs import omni_run, write_root

# Metrics that depend on the machine.
_MEASURED = re.compile("time|_per_s$|wait|memory|mfu|utilization")


@pytest.fixture(scope="module")
def omni_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_root(tmp_path_factory.mktemp("omni"))


def _config(stage: str, text_data: Path, media_data: Path, omni_root: Path) -> RunConfig:
    changes: dict[str, Any] = {
        "training": {"max_steps": 6, "save_every": 3, "keep_last": 9, "ema_decay": 0.9}
    }
    if stage == "thinker":
        return thinker_config(text_data, changes)
    if stage in ("talker", "sft"):
        return omni_run(stage, omni_root, changes)
    return stage_config(stage, media_data, changes)


def _resume_with_other_generators(**arguments: Any) -> dict[str, Any]:
    """Resume after all global generators have moved on: training must not draw from them."""
    build_loop = session.open_loop

    def open_loop(*given: Any) -> Any:
        loop = build_loop(*given)
        torch.manual_seed(987)
        np.random.seed(987)
        return loop

    import tests.training.runs as runs

    runs.open_loop = open_loop
    try:
        return train(**arguments)
    finally:
        runs.open_loop = build_loop


def _exact(line: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in line.items() if not _MEASURED.search(name)}


@pytest.mark.parametrize("stage", list(STAGES))
def test_a_resumed_run_equals_an_uninterrupted_one(
    stage: str,
    text_data: Path,
    media_data: Path,
    omni_root: Path,
    tmp_path: Path,
    two_ranks: RankPool,
) -> None:
    config = _config(stage, text_data, media_data, omni_root)
    common = {"config": config, "zero": "zero2", "upstream": omni_root / "run"}
    full = two_ranks.run(train, run=tmp_path / "full", **common)[0]
    checkpoint = tmp_path / "full" / stage / "checkpoints" / "step_00000003"
    resumed = two_ranks.run(
        _resume_with_other_generators, run=tmp_path / "on", resume=str(checkpoint), **common
    )[0]
    assert [line["step"] for line in resumed["curve"]] == [4, 5, 6]
    for line, expected in zip(resumed["curve"], full["curve"][3:], strict=True):
        assert _exact(line) == _exact(expected)
    weights, same = (
        load_file(tmp_path / name / stage / "export" / "model.safetensors")
        for name in ("full", "on")
    )
    assert weights.keys() == same.keys()
    for name, tensor in weights.items():
        assert torch.equal(tensor, same[name]), name
