import math
from pathlib import Path

import pytest
import torch

from muomni.errors import ConfigError
from muomni.evaluation.metrics.retrieval import class_names, embed_split, recall, zero_shot_hits
from muomni.training.session import Session
from muomni.training.stages.vision_encoder import VisionEncoderStage, VisionEncoderTask
from muomni.training.validation import SplitBatches, validate
from tests.parity.reference import reference_curve
from tests.ranks import RankPool
from tests.training.runs import train
from tests.training.stages.contrastive_reference import (
    build_task,
    first_step,
    full_step,
    open_session,
    step_of_rank,
)
from tests.training.stages.curves import stage_config

CPU = torch.device("cpu")


def session_of(data: Path, changes: dict[str, object] | None = None) -> Session:
    return open_session(stage_config("vision_encoder", data, changes))


@pytest.mark.parametrize("loss", ["clip", "siglip"])
def test_micro_batches_have_the_loss_and_gradient_of_the_full_batch(
    loss: str, media_data: Path
) -> None:
    config = stage_config("vision_encoder", media_data, {"options": {"loss": loss}})
    session = open_session(config)
    assert (
        sum(session.stage.loss_denominators(batch)["loss"] for batch in first_step(session)) == 16
    )
    expected, gradients = full_step(config)
    total, found = step_of_rank(config)
    assert total == pytest.approx(expected, abs=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-3)


def test_accumulation_uses_negatives_of_all_micro_batches(media_data: Path) -> None:
    """A mean over micro-batches would start at log 4, the loss over all pairs starts at log 16."""
    config = stage_config("vision_encoder", media_data, {"training": {"max_steps": 1}})
    first = reference_curve(config)[0].losses[0]
    assert abs(first - math.log(16)) < abs(first - math.log(4))


@pytest.mark.parametrize("loss", ["clip", "siglip"])
def test_padding_pairs_do_not_count(loss: str, media_data: Path) -> None:
    stage = session_of(media_data, {"options": {"loss": loss}}).stage
    task = stage.build().eval()
    empty = stage.view().collate([[], []])
    output = task(empty)
    assert stage.loss_denominators(empty)["loss"] == 0 == output.losses["loss"]
    assert output.logs["loss"].tolist() == [0, 0]
    output.losses["loss"].backward()
    assert all(torch.isfinite(p.grad).all() for p in task.parameters() if p.grad is not None)


@pytest.mark.parametrize("loss", ["clip", "siglip"])
def test_it_learns_retrieval(loss: str, media_data: Path) -> None:
    changes = {
        "batch": {"global_samples": 32, "micro_samples": 16},
        "optim": {"lr": 3e-3},
        "training": {"max_steps": 60},
        "options": {"augmentation": None, "loss": loss},
    }
    session = session_of(media_data, changes)
    _, task = reference_curve(session.request.config)
    stage, val = session.stage, session.val
    assert val is not None
    assert isinstance(stage, VisionEncoderStage) and isinstance(task, VisionEncoderTask)
    features = embed_split(task.eval().clip, SplitBatches(stage, val, CPU))
    metrics = recall(features)
    assert len(features.images) == len(val) == 10
    assert metrics["text_recall@1"] > 5 * metrics["chance_text_recall@1"]
    assert metrics["image_recall@1"] > 5 * metrics["chance_image_recall@1"]
    names = class_names([session.planned.source, val])
    assert len(names) == 32
    hits = zero_shot_hits(task.clip, features, names, stage.view(), CPU)
    assert float(hits.double().mean()) > 5 / len(names)


def test_a_run_reports_accuracy(media_data: Path, tmp_path: Path, two_ranks: RankPool) -> None:
    config = stage_config("vision_encoder", media_data, {"training": {"max_steps": 2}})
    result = two_ranks.run(train, config=config, run=tmp_path)[0]
    assert 0 <= result["val/accuracy"] <= 1
    assert result["curve"][0]["scale"] == pytest.approx(1 / 0.07, rel=1e-4)


def test_each_loss_starts_with_the_values_of_its_paper(media_data: Path) -> None:
    clip = build_task(session_of(media_data)).clip
    assert clip.scale().item() == pytest.approx(1 / 0.07, rel=1e-5) and clip.bias is None
    siglip = build_task(session_of(media_data, {"options": {"loss": "siglip"}})).clip
    assert siglip.bias is not None and siglip.bias.tolist() == [-10]
    assert siglip.scale().item() == pytest.approx(10, rel=1e-5)
    changes = {"options": {"loss": "siglip"}, "model": {"initial_bias": -4.0}}
    bias = build_task(session_of(media_data, changes)).clip.bias
    assert bias is not None and bias.tolist() == [-4]


@pytest.mark.parametrize(("loss", "bias"), [("clip", -10.0)])
def test_an_unsupported_bias_is_rejected(loss: str, bias: float | None, media_data: Path) -> None:
    changes = {"options": {"loss": loss}, "model": {"initial_bias": bias}}
    with pytest.raises(
        ConfigError, match=rf"options\.loss={loss} does not support model\.initial_bias={bias}"
    ):
        session_of(media_data, changes)


def test_validation_does_not_depend_on_the_micro_batch(media_data: Path) -> None:
    found = []
    for micro_samples in (3, 16):
        batch = {"global_samples": 16, "micro_samples": micro_samples}
        session = session_of(media_data, {"batch": batch})
        assert session.val is not None and session.val.num_included % 16 != 0
        torch.manual_seed(0)
        task = session.stage.build().eval()
        batches = SplitBatches(session.stage, session.val, CPU)
        with torch.no_grad():
            found.append(validate(session.stage, task, batches, batches.group_size))
    assert found[0] == pytest.approx(found[1], rel=1e-5)
