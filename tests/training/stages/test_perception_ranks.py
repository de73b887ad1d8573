"""Export, resume, and validation of the perception stages on two ranks."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.parity.reference import reference_curve
from tests.ranks import RankPool
from tests.training.runs import train
from tests.training.stages.curves import stage_config

STAGES = ("audio_encoder", "vision_encoder", "codec")


@pytest.mark.parametrize("stage", STAGES)
def test_an_export_has_the_weights_of_plain_pytorch(
    stage: str, media_data: Path, tmp_path: Path, two_ranks: RankPool
) -> None:
    """Including the codebooks, which have no gradients, and with dropout, which does not depend on ranks."""
    changes = {"model": {"dropout": 0.2}} if stage == "audio_encoder" else {}
    config = stage_config(stage, media_data, changes)
    result = two_ranks.run(train, config=config, run=tmp_path, zero="zero3")[0]
    curve, task = reference_curve(config)
    assert result["losses"] == pytest.approx(curve.losses, abs=1e-4)
    assert abs(curve.losses[-1] - curve.losses[0]) > 0.1
    exported = load_file(tmp_path / stage / "export" / "model.safetensors")
    own = task.state_dict()
    prefix = next(iter(own)).partition(".")[0]
    for name, tensor in exported.items():
        torch.testing.assert_close(tensor, own[f"{prefix}.{name}"], rtol=0.02, atol=4e-3)


@pytest.mark.parametrize("zero", ["zero1", "zero3"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_resumed_run_repeats_the_losses(
    stage: str, zero: str, media_data: Path, tmp_path: Path, two_ranks: RankPool
) -> None:
    """Including codebooks, dropout, augmentation, and crops."""
    changes: dict[str, Any] = {"training": {"save_every": 5}}
    if stage == "audio_encoder":
        changes["model"] = {"dropout": 0.2}
    config = stage_config(stage, media_data, changes)
    full = two_ranks.run(train, config=config, run=tmp_path / "full", zero=zero)[0]
    checkpoint = tmp_path / "full" / stage / "checkpoints" / "step_00000005"
    resumed = two_ranks.run(
        train, config=config, run=tmp_path / "resumed", zero=zero, resume=str(checkpoint)
    )[0]
    assert resumed["losses"] == full["losses"][5:]


@pytest.mark.parametrize("stage", STAGES)
def test_validation_with_fewer_samples_than_ranks(
    stage: str, media_data: Path, tmp_path: Path, one_rank: RankPool, two_ranks: RankPool
) -> None:
    """The rank without a micro-batch runs an empty one, and the metrics do not depend on ranks."""
    changes = {"training": {"max_steps": 1, "validate_samples": 8}}
    config = stage_config(stage, media_data, changes)
    results = [
        pool.run(train, config=config, run=tmp_path / str(i), zero="zero3")[0]
        for i, pool in enumerate((one_rank, two_ranks))
    ]
    metrics = [{k: v for k, v in r.items() if k.startswith("val/")} for r in results]
    assert metrics[0] and metrics[0] == pytest.approx(metrics[1], abs=1e-4)
