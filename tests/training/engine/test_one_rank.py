"""A single rank skips the reduction of gradients, and trains like one of many."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from muomni.config.run import RunConfig
from muomni.distributed.discovery import discover
from muomni.training.session import Request, open_loop, prepare
from tests.ranks import RankPool
from tests.training.runs import thinker_config


def _step_with_idle_weight(config: RunConfig, run: Path) -> dict[str, Any]:
    """An unused weight after a step, and the number of gradients that DeepSpeed has flattened."""
    engine_json = {"zero_optimization": {"stage": 0}}
    session = prepare(Request(config, run, run, engine_json, "never"), discover())
    build = session.stage.build

    def build_with_idle_weight() -> nn.Module:
        task: Any = build()
        task.thinker.idle = nn.Parameter(torch.ones(2, 2))
        return task

    session.stage.build = build_with_idle_weight  # type: ignore[method-assign]
    loop = open_loop(session)
    flattened: list[int] = []
    flatten = loop.engine.deepspeed.flatten

    def counted(tensors: list[torch.Tensor]) -> torch.Tensor:
        flattened.extend(tensor.numel() for tensor in tensors)
        return flatten(tensors)

    loop.engine.deepspeed.flatten = counted
    try:
        loop.train_step()
        idle = loop.engine.full_state("thinker.").get("idle")  # on rank 0
        return {"idle": idle, "num_flattened": len(flattened)}
    finally:
        loop.engine.deepspeed.destroy()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_gradients_are_not_copied_and_idle_weights_decay(
    precision: str, text_data: Path, tmp_path: Path, one_rank: RankPool, two_ranks: RankPool
) -> None:
    optim = {"lr": 0.1, "weight_decay": 0.5, "warmup_fraction": 0.0}
    config = thinker_config(text_data, {"precision": precision, "optim": optim})
    alone, others = (
        pool.run(_step_with_idle_weight, config=config, run=tmp_path)[0]
        for pool in (one_rank, two_ranks)
    )
    assert alone["num_flattened"] == 0
    assert others["num_flattened"] > 0  # the count covers the sum over ranks
    assert alone["idle"].unique().numel() == 1 and alone["idle"][0, 0] < 1
    torch.testing.assert_close(alone["idle"], others["idle"], atol=0, rtol=0)
