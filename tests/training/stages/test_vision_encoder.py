import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from muomni.data.loader import PlannedDataset
from muomni.data.view import Batch
from muomni.dist.discovery import discover
from muomni.evaluation.retrieval import (
    class_names,
    embed_split,
    recall,
    zero_shot_top1,
)
from muomni.training.session import Request, Session, prepare, seed_everything
from muomni.training.validation import SplitBatches
from tests.parity.reference import reference_curve
from tests.ranks import RankPool
from tests.training.runs import train
from tests.training.stages.curves import stage_config

CPU = torch.device("cpu")


def open_session(data: Path, changes: dict[str, object] | None = None) -> Session:
    config = stage_config("vision_encoder", data, changes)
    return prepare(Request(config, Path(), Path(), {}, "never"), discover({}))


def textbook_loss(task: torch.nn.Module, batches: list[Batch]) -> torch.Tensor:
    """Mean InfoNCE of all pairs at once, pairs with an equal caption no negatives."""
    outputs = [task.clip(b["images"], b["token_ids"], b["token_lengths"]) for b in batches]
    captions = torch.cat([batch["groups"][:, 1] for batch in batches])
    logits = outputs[0].scale * (
        torch.cat([o.image for o in outputs]) @ torch.cat([o.text for o in outputs]).T
    )
    same = (captions[:, None] == captions[None, :]) & ~torch.eye(len(captions), dtype=torch.bool)
    logits = logits.masked_fill(same, -torch.inf)
    own = torch.arange(len(captions))
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def test_micro_batches_have_the_loss_and_gradient_of_the_whole_batch(media_data: Path) -> None:
    session = open_session(media_data)
    stage = session.stage
    seed_everything(0)
    task = stage.build()
    dataset = PlannedDataset(session.train, stage.view(), 0)
    batches = [dataset[micro] for micro in session.plan.step(0)]
    weight = sum(stage.weights(batch)["loss"] for batch in batches)
    assert len(batches) == 4 and weight == 16
    expected = textbook_loss(task, batches)
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in task.named_parameters()}
    task.zero_grad()
    total = 0.0
    for batch in stage.begin_step(task, batches):
        loss = task(batch).losses["loss"] / weight
        loss.backward()
        total += loss.item()
    assert total == pytest.approx(expected.item(), abs=1e-5)
    for name, parameter in task.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-5, rtol=1e-3)


def test_accumulation_brings_negatives_of_all_micro_batches(media_data: Path) -> None:
    """A mean over micro-batches would start at log 4, the loss over all pairs starts at log 16."""
    config = stage_config("vision_encoder", media_data, {"training": {"max_steps": 1}})
    first = reference_curve(config)[0].losses[0]
    assert abs(first - math.log(16)) < abs(first - math.log(4))


def test_rows_that_fill_up_do_not_count(media_data: Path) -> None:
    stage = open_session(media_data).stage
    task = stage.build().eval()
    empty = stage.view().collate([])
    output = task(empty)
    assert stage.weights(empty)["loss"] == 0 == output.losses["loss"]
    assert output.logs["loss"].tolist() == [0, 0]
    output.losses["loss"].backward()
    assert all(torch.isfinite(p.grad).all() for p in task.parameters() if p.grad is not None)


def test_it_learns_to_find_pictures_and_captions(media_data: Path) -> None:
    changes = {
        "batch": {"size": 16, "micro_batches_per_step": 2},
        "optim": {"lr": 3e-3},
        "training": {"max_steps": 60},
        "options": {"augmentation": None},
    }
    session = open_session(media_data, changes)
    _, task = reference_curve(session.request.config)
    stage, val = session.stage, session.val
    assert val is not None
    features = embed_split(task.eval().clip, SplitBatches(stage, val, CPU))
    figures = recall(features)
    assert len(features.images) == len(val) == 10
    assert figures["text_recall@1"] > 5 * figures["chance_text_recall@1"]
    assert figures["image_recall@1"] > 5 * figures["chance_image_recall@1"]
    names = class_names([session.train, val])
    assert len(names) == 32
    assert zero_shot_top1(task.clip, features, names, stage.view(), CPU) > 5 / len(names)


def test_a_run_reports_accuracy_and_writes_neighbours(
    media_data: Path, tmp_path: Path, two_ranks: RankPool
) -> None:
    config = stage_config("vision_encoder", media_data, {"training": {"max_steps": 2}})
    result = two_ranks.run(train, config=config, run=tmp_path)[0]
    assert 0 <= result["val/accuracy"] <= 1
    assert result["curve"][0]["scale"] == pytest.approx(1 / 0.07, rel=1e-4)
    text = (tmp_path / "vision_encoder" / "samples" / "vision_encoder.txt").read_text()
    assert "picture of: red circle" in text and "nearest: " in text
