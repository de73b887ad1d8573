"""Averaged weights equal those of a plain loop on any layout, resume exactly, and are exported."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from muomni.config.loading import run_config
from muomni.config.run import RunConfig
from muomni.distributed.discovery import discover
from muomni.training.engine.ema import WeightAverage, decay_at
from muomni.training.session import Request, open_loop, prepare
from tests.ranks import RankPool
from tests.training.runs import thinker_config, train

DECAY = 0.5  # reached by the warmup of the decay at step 8 of 10


@pytest.fixture(scope="module")
def ema_config(text_data: Path) -> RunConfig:
    training = {"max_steps": 10, "ema_decay": DECAY, "save_every": 4, "keep_last": 9}
    return thinker_config(text_data, {"training": training, "optim": {"schedule": "constant"}})


def _changed(config: RunConfig, precision: str = "fp32", **training: Any) -> RunConfig:
    content = config.model_dump()
    content["training"] = {**content["training"], **training}
    return run_config({**content, "precision": precision})


@pytest.fixture(scope="module")
def averaged(
    ema_config: RunConfig, one_rank: RankPool, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, torch.Tensor]:
    """The average, by its definition, of the weights after each step of a run without an average."""
    run = tmp_path_factory.mktemp("plain")
    plain = _changed(ema_config, ema_decay=None)
    steps = one_rank.run(_weights_of_each_step, config=plain, run=run)[0]
    average = {name: weight.double() for name, weight in steps[0].items()}
    for step, weights in enumerate(steps[1:], 1):
        decay = min(DECAY, (1 + step) / (10 + step))
        for name, weight in weights.items():
            average[name] = decay * average[name] + (1 - decay) * weight.double()
    return {name: weight.float() for name, weight in average.items()}


def _weights_of_each_step(config: RunConfig, run: Path) -> list[dict[str, torch.Tensor]]:
    loop = open_loop(prepare(Request(config, run, run, {}, "never"), discover()))
    steps = [loop.engine.full_state("thinker.")]
    for _ in range(config.training.max_steps or 0):
        loop.train_step()
        steps.append(loop.engine.full_state("thinker."))
    loop.engine.deepspeed.destroy()
    return steps


def _exported(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "thinker" / "export" / "model.safetensors")


@pytest.mark.parametrize(
    ("num_ranks", "zero"), [(1, "zero0"), (2, "zero0"), (1, "zero1"), (2, "zero2"), (2, "zero3")]
)
def test_every_layout_exports_the_average_of_a_plain_loop_and_resumes_exactly(
    num_ranks: int,
    zero: str,
    ema_config: RunConfig,
    averaged: dict[str, torch.Tensor],
    tmp_path: Path,
    one_rank: RankPool,
    two_ranks: RankPool,
) -> None:
    pool = one_rank if num_ranks == 1 else two_ranks
    common: dict[str, Any] = {"config": ema_config, "zero": zero}
    straight = pool.run(train, run=tmp_path / "straight", **common)[0]
    exported = _exported(tmp_path / "straight")
    assert exported.keys() == averaged.keys()
    for name, weight in averaged.items():
        torch.testing.assert_close(exported[name], weight, rtol=0, atol=2e-5)
    about = json.loads((tmp_path / "straight/thinker/export/export.json").read_text())
    assert about["ema_decay"] == DECAY
    earlier = tmp_path / "straight" / "thinker" / "checkpoints" / "step_00000004"
    resumed = pool.run(train, run=tmp_path / "on", resume=str(earlier), **common)[0]
    assert resumed["losses"] == straight["losses"][4:]
    assert resumed["val/loss"] == straight["val/loss"]
    again = _exported(tmp_path / "on")
    assert all(torch.equal(again[name], weight) for name, weight in exported.items())


@pytest.mark.parametrize(
    ("precision", "zero"),
    [("bf16", "zero0"), ("bf16", "zero1"), ("bf16", "zero3"), ("fp32", "zero2"), ("fp32", "zero3")],
)
def test_validation_uses_the_average_without_changing_training(
    precision: str, zero: str, ema_config: RunConfig, tmp_path: Path, two_ranks: RankPool
) -> None:
    plain_config = _changed(ema_config, precision, ema_decay=None)
    plain = two_ranks.run(train, config=plain_config, run=tmp_path / "plain", zero=zero)[0]
    often = _changed(ema_config, precision, validate_every=2)
    with_average = two_ranks.run(train, config=often, run=tmp_path / "average", zero=zero)[0]
    assert with_average["losses"] == plain["losses"]
    # The average lags behind a falling loss.
    assert with_average["val/loss"] > plain["val/loss"] + 0.02


def test_a_checkpoint_without_an_average_starts_one_from_its_weights(
    ema_config: RunConfig, tmp_path: Path, one_rank: RankPool
) -> None:
    plain_config = _changed(ema_config, ema_decay=None)
    one_rank.run(train, config=plain_config, run=tmp_path / "plain")
    last = tmp_path / "plain" / "thinker" / "checkpoints" / "step_00000010"
    one_rank.run(train, config=ema_config, run=tmp_path / "on", resume=str(last))
    plain, on = _exported(tmp_path / "plain"), _exported(tmp_path / "on")
    assert all(torch.equal(on[name], weight) for name, weight in plain.items())


def test_the_decay_warms_up_to_its_limit() -> None:
    decays = [decay_at(step, 0.99) for step in range(1, 2000)]
    assert decays[0] == pytest.approx(2 / 11)
    assert decays == sorted(decays) and decays[-1] == 0.99


def test_two_swaps_restore_both() -> None:
    weight = torch.tensor([1.0, 0.1, 1e-8])
    average = WeightAverage([torch.tensor([3.0, 0.3, 7e7])], 0.9)
    average.swap([weight])
    assert weight.tolist() == torch.tensor([3.0, 0.3, 7e7]).tolist()
    average.swap([weight])
    assert weight.tolist() == torch.tensor([1.0, 0.1, 1e-8]).tolist()
