"""Full weights are gathered for rank 0 alone; other ranks hold one parameter at a time."""

from pathlib import Path
from typing import Any

import pytest

from muomni.config.run import RunConfig
from muomni.distributed.discovery import discover
from muomni.training.engine.deepspeed_quirks import local_elements
from muomni.training.planning.live_bytes import LiveBytes
from muomni.training.session import Request, open_loop, prepare
from tests.ranks import RankPool
from tests.training.runs import thinker_config

LARGE = {"hidden_size": 64, "num_layers": 8, "intermediate_size": 128}


def _gathered(config: RunConfig, run: Path, stage: int) -> dict[str, Any]:
    """The largest growth of memory while full weights are gathered, and what this rank gets."""
    engine_json = {"zero_optimization": {"stage": stage}}
    loop = open_loop(prepare(Request(config, run, run, engine_json, "never"), discover()))
    try:
        engine, live = loop.engine, LiveBytes(lambda: "all")
        live.exclude([*engine.masters.tensors(), *engine.task.parameters(), *engine.task.buffers()])
        live.exclude(local_elements(parameter) for parameter in engine.task.parameters())
        with live:
            state = engine.full_state("")
        return {
            "growth": sum(live.peak.values()),
            "num_bytes": {name: tensor.nbytes for name, tensor in state.items()},
        }
    finally:
        loop.engine.deepspeed.destroy()


@pytest.mark.parametrize("stage", [1, 3])
def test_only_rank_0_keeps_full_weights(
    stage: int, text_data: Path, tmp_path: Path, two_ranks: RankPool
) -> None:
    config = thinker_config(text_data, {"model": LARGE, "precision": "bf16"})
    first, second = two_ranks.run(_gathered, config=config, run=tmp_path, stage=stage)
    sizes = first["num_bytes"]
    assert second["num_bytes"] == {} and len(sizes) > 50
    assert first["growth"] >= sum(sizes.values())
    # The fp32 parameter, and what it is gathered from.
    assert second["growth"] <= 3 * max(sizes.values()) < sum(sizes.values()) / 2
