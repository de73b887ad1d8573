"""Ranks, accumulation, ZeRO stage and precision do not change what the perception stages learn."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.ranks import RankPool
from tests.training.runs import train
from tests.training.stages.curves import plain_curve, stage_config

STAGES = ("audio_encoder", "vision_encoder", "codec")
Reference = tuple[list[float], torch.nn.Module]


@pytest.fixture(scope="module")
def references(media_data: Path) -> dict[str, Reference]:
    return {stage: plain_curve(stage_config(stage, media_data)) for stage in STAGES}


@pytest.mark.parametrize(
    ("num_ranks", "zero"), [(1, "zero1"), (2, "zero0"), (2, "zero2"), (2, "zero3")]
)
@pytest.mark.parametrize("stage", STAGES)
def test_the_curve_is_that_of_plain_pytorch(
    stage: str,
    num_ranks: int,
    zero: str,
    media_data: Path,
    tmp_path: Path,
    references: dict[str, Reference],
    one_rank: RankPool,
    two_ranks: RankPool,
) -> None:
    """1 rank x 4 and 2 ranks x 2 micro-batches against the same 4 in one process."""
    pool = one_rank if num_ranks == 1 else two_ranks
    result = pool.run(train, config=stage_config(stage, media_data), run=tmp_path, zero=zero)[0]
    losses, task = references[stage]
    assert result["losses"] == pytest.approx(losses, abs=1e-4)
    assert abs(losses[-1] - losses[0]) > 0.1
    # Weights, and the codebooks, which no gradient moves.
    exported = load_file(tmp_path / stage / "export" / "model.safetensors")
    own = task.state_dict()
    prefix = next(iter(own)).partition(".")[0]
    for name, tensor in exported.items():
        torch.testing.assert_close(tensor, own[f"{prefix}.{name}"], rtol=0.02, atol=4e-3)


@pytest.mark.parametrize("stage", STAGES)
def test_four_ranks_would_see_what_one_micro_batch_a_rank_sees(
    stage: str, media_data: Path, tmp_path: Path, two_ranks: RankPool
) -> None:
    """2 ranks x 1: no accumulation, so the contrastive loss takes its other way."""
    config = stage_config(stage, media_data, {"batch": {"micro_batches_per_step": 2}})
    result = two_ranks.run(train, config=config, run=tmp_path)[0]
    assert result["losses"] == pytest.approx(plain_curve(config)[0], abs=1e-4)


@pytest.mark.parametrize(
    ("precision", "zero", "tolerance"), [("bf16", "zero3", 0.15), ("fp16", "zero1", 0.05)]
)
@pytest.mark.parametrize("stage", STAGES)
def test_sixteen_bits_follow(
    stage: str,
    precision: str,
    zero: str,
    tolerance: float,
    media_data: Path,
    tmp_path: Path,
    references: dict[str, Reference],
    two_ranks: RankPool,
) -> None:
    changes = {"precision": precision, "fp16": {"initial_scale_power": 8}}
    config = stage_config(stage, media_data, changes)
    result = two_ranks.run(train, config=config, run=tmp_path, zero=zero)[0]
    assert result["losses"] == pytest.approx(references[stage][0], rel=tolerance)


@pytest.mark.parametrize("zero", ["zero1", "zero3"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_resumed_run_repeats_the_losses(
    stage: str, zero: str, media_data: Path, tmp_path: Path, two_ranks: RankPool
) -> None:
    """Codebooks, dropout, augmentation and crops go on where they were."""
    changes: dict[str, Any] = {"training": {"save_every": 5}}
    if stage == "audio_encoder":
        changes["model"] = {"dropout": 0.2}
    config = stage_config(stage, media_data, changes)
    whole = two_ranks.run(train, config=config, run=tmp_path / "whole", zero=zero)[0]
    checkpoint = tmp_path / "whole" / stage / "checkpoints" / "step_00000005"
    resumed = two_ranks.run(
        train, config=config, run=tmp_path / "resumed", zero=zero, resume=str(checkpoint)
    )[0]
    assert resumed["losses"] == whole["losses"][5:]


@pytest.mark.parametrize("stage", STAGES)
def test_validation_on_fewer_samples_than_ranks_ends(
    stage: str, media_data: Path, tmp_path: Path, one_rank: RankPool, two_ranks: RankPool
) -> None:
    """The rank without a micro-batch runs an empty one, and the figures do not depend on ranks."""
    changes = {"training": {"max_steps": 1, "validate_batches": 1}}
    config = stage_config(stage, media_data, changes)
    results = [
        pool.run(train, config=config, run=tmp_path / str(i), zero="zero3")[0]
        for i, pool in enumerate((one_rank, two_ranks))
    ]
    figures = [{k: v for k, v in r.items() if k.startswith("val/")} for r in results]
    assert figures[0] and figures[0] == pytest.approx(figures[1], abs=1e-4)
