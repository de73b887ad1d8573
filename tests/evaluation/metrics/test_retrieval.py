"""Recall of hand-made features, and the chance level."""

import math
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F

from muomni.data.views.image_text import group_of
from muomni.evaluation.metrics.retrieval import (
    SplitFeatures,
    majority_top1,
    recall,
    zero_shot_hits,
)


def features(num: int, size: int = 8, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(num, size, generator=generator), dim=1)


def test_perfect_features_have_full_recall() -> None:
    x = features(30)
    metrics = recall(SplitFeatures(x, x, torch.arange(30)[:, None]))
    assert metrics["text_recall@1"] == metrics["image_recall@1"] == 1
    assert metrics["chance_text_recall@1"] == pytest.approx(1 / 30)
    assert metrics["chance_text_recall@5"] == pytest.approx(5 / 30)


def test_constant_features_have_zero_recall() -> None:
    same = features(1).expand(30, -1)
    metrics = recall(SplitFeatures(same, same, torch.arange(30)[:, None]))
    assert metrics["text_recall@10"] == metrics["image_recall@10"] == 0


def test_recall_depends_on_rank_of_correct_candidate() -> None:
    # The caption of image i matches image i + 1 best, so the correct one ranks second.
    x = torch.eye(6)
    y = 0.9 * x + torch.roll(x, 1, 0)
    metrics = recall(SplitFeatures(x, y, torch.arange(6)[:, None]), depths=(1, 2))
    assert metrics["text_recall@1"] == 0 and metrics["text_recall@2"] == 1


def test_equal_captions_are_equally_correct() -> None:
    x, y = features(4, seed=1), features(4, seed=1)
    y = y[[1, 0, 2, 3]]  # captions 0 and 1 are swapped but equal
    metrics = recall(SplitFeatures(x, y, torch.tensor([[5], [5], [6], [7]])), depths=(1, 5))
    assert metrics["text_recall@1"] == 1
    assert metrics["chance_text_recall@1"] == pytest.approx((0.5 + 0.5 + 0.25 + 0.25) / 4)
    assert metrics["chance_text_recall@5"] == 1


def test_empty_split_gives_nan() -> None:
    metrics = recall(SplitFeatures(features(0), features(0), torch.arange(0)[:, None]))
    assert all(value != value for value in metrics.values())


def test_captions_of_an_equal_image_are_correct() -> None:
    x = features(4)
    metrics = recall(
        SplitFeatures(x, x[[1, 0, 2, 3]], torch.tensor([[7, 1], [7, 2], [8, 3], [9, 4]]))
    )
    assert metrics["text_recall@1"] == metrics["image_recall@1"] == 1
    assert metrics["chance_image_recall@1"] == pytest.approx((0.5 + 0.5 + 0.25 + 0.25) / 4)


def test_zero_shot_classes_are_the_distinct_captions() -> None:
    """Of four bags and a shoe, three images are closest to their class."""
    names, classes = ["bag", "shoe"], torch.eye(2)
    images = classes[[0, 0, 1, 1, 1]]
    captions = torch.tensor([group_of(name) for name in ["Bag", "bag", "bag", "bag", "shoe"]])
    split = SplitFeatures(images, images, torch.stack([torch.arange(5), captions], 1))
    clip, view = (
        SimpleNamespace(embed_text=lambda ids, lengths: classes[ids[:, 0]]),
        SimpleNamespace(token_ids=lambda name: [names.index(name)]),
    )
    hits = zero_shot_hits(cast(Any, clip), split, names, cast(Any, view), torch.device("cpu"))
    assert float(hits.double().mean()) == pytest.approx(3 / 5)
    train = [{"__key__": "k", "txt": text} for text in (b"shoe", b"BAG", b"bag", b"\xff")]
    assert majority_top1(split, train) == pytest.approx(4 / 5)
    assert math.isnan(majority_top1(split, []))
