"""An fp16 overflow on one rank skips the step on all ranks; persistent overflows stop the run."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from muomni.distributed.discovery import discover
from muomni.errors import NonFiniteError
from muomni.training.session import Request, open_loop, prepare
from muomni.training.stages.thinker import ThinkerTask
from tests.ranks import RankPool
from tests.training.runs import thinker_config, train


def _adam_steps(config: Any, run: Path) -> set[float]:
    """The step count in Adam's bias correction after two steps without ZeRO."""
    engine_json: dict[str, Any] = {"zero_optimization": {"stage": 0}}
    loop = open_loop(prepare(Request(config, run, run, engine_json), discover()))
    loop.train_step()
    loop.train_step()
    steps = {float(state["step"]) for state in loop.engine.optimizer.optimizer.state.values()}
    loop.engine.deepspeed.destroy()
    return steps


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_the_first_16_bit_step_is_adams_first(
    precision: str, text_data: Path, tmp_path: Path, one_rank: RankPool
) -> None:
    """DeepSpeed allocates state with an extra step, which would make the real ones too small."""
    config = thinker_config(text_data, {"precision": precision, "fp16": {"initial_scale_power": 6}})
    assert one_rank.run(_adam_steps, config=config, run=tmp_path) == [{2.0}]


def _train_with_overflow(
    config: Any, run: Path, zero: str, bad_rank: int, is_lasting: bool = False
) -> dict[str, Any]:
    """Train with an infinite loss in the third forward pass of one rank (or in all from there on)."""
    rank = torch.distributed.get_rank()
    original, calls = ThinkerTask.forward, [0]

    def forward(self: ThinkerTask, batch: Any) -> Any:
        output = original(self, batch)
        calls[0] += 1
        if rank == bad_rank and (calls[0] == 3 or (is_lasting and calls[0] > 3)):
            output.losses["loss"] = output.losses["loss"] * float("inf")
        return output

    ThinkerTask.forward = forward  # type: ignore[method-assign]
    try:
        return train(config, run, zero)
    finally:
        ThinkerTask.forward = original  # type: ignore[method-assign]


@pytest.mark.parametrize("zero", ["zero0", "zero1", "zero3"])
def test_an_overflow_on_one_rank_halves_the_scale_and_skips_on_all(
    zero: str, text_data: Path, tmp_path: Path, two_ranks: RankPool
) -> None:
    config = thinker_config(
        text_data,
        {
            "precision": "fp16",
            "fp16": {"initial_scale_power": 8, "warn_scale": 200},
            "batch": {"global_tokens": 128},
        },
    )
    results = two_ranks.run(
        _train_with_overflow, config=config, run=tmp_path, zero=zero, bad_rank=1
    )
    curve = results[0]["curve"]
    scales = [line["loss_scale"] for line in curve]
    skipped = [line["num_skipped"] for line in curve]
    assert scales[1] == 256 and scales[2] == 128 and set(scales[2:]) == {128}
    assert skipped[1] == 0 and set(skipped[2:]) == {1}
    assert [line["fp16_warning"] for line in curve] == [float(scale < 200) for scale in scales]
    losses = [line["loss"] for line in curve]
    assert math.isfinite(losses[-1]) and losses[-1] < losses[0] - 1


@pytest.mark.parametrize("zero", ["zero0", "zero1"])
def test_the_loss_scale_does_not_reach_the_update(
    zero: str, text_data: Path, tmp_path: Path, one_rank: RankPool
) -> None:
    """A large eps in Adam, or a low clip norm, would reveal gradients that are still scaled."""
    changes = {"optim": {"eps": 1e-3, "max_grad_norm": 0.5}, "fp16": {"initial_scale_power": 10}}
    curves = []
    for precision in ("fp32", "fp16"):
        config = thinker_config(text_data, {**changes, "precision": precision})
        result = one_rank.run(train, config=config, run=tmp_path / precision, zero=zero)[0]
        curves.append(result["curve"])
    for metric in ("loss", "grad_norm"):
        expected, got = ([line[metric] for line in curve] for curve in curves)
        assert got == pytest.approx(expected, rel=5e-3), metric


def test_persistent_overflows_stop_all_ranks(
    text_data: Path, tmp_path: Path, two_ranks: RankPool
) -> None:
    config = thinker_config(
        text_data,
        {
            "precision": "fp16",
            "fp16": {"initial_scale_power": 1},
            "batch": {"global_tokens": 128},
        },
    )
    with pytest.raises(NonFiniteError, match=r"smallest loss scale, 1; .*--precision bf16"):
        two_ranks.run(
            _train_with_overflow, config=config, run=tmp_path, zero="zero1", bad_rank=1,
            is_lasting=True,
        )  # fmt: skip
