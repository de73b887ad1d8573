"""Recall of hand-made features, and the chance level."""

import pytest
import torch
import torch.nn.functional as F

from muomni.evaluation.metrics.retrieval import SplitFeatures, recall


def features(num: int, size: int = 8, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(num, size, generator=generator), dim=1)


def test_perfect_features_have_full_recall() -> None:
    x = features(30)
    metrics = recall(SplitFeatures(x, x, torch.arange(30)))
    assert metrics["text_recall@1"] == metrics["image_recall@1"] == 1
    assert metrics["chance_text_recall@1"] == pytest.approx(1 / 30)
    assert metrics["chance_text_recall@5"] == pytest.approx(5 / 30)


def test_constant_features_have_zero_recall() -> None:
    same = features(1).expand(30, -1)
    metrics = recall(SplitFeatures(same, same, torch.arange(30)))
    assert metrics["text_recall@10"] == metrics["image_recall@10"] == 0


def test_recall_depends_on_rank_of_correct_candidate() -> None:
    # The caption of image i matches image i + 1 best, so the correct one ranks second.
    x = torch.eye(6)
    y = 0.9 * x + torch.roll(x, 1, 0)
    metrics = recall(SplitFeatures(x, y, torch.arange(6)), depths=(1, 2))
    assert metrics["text_recall@1"] == 0 and metrics["text_recall@2"] == 1


def test_equal_captions_are_equally_correct() -> None:
    x, y = features(4, seed=1), features(4, seed=1)
    y = y[[1, 0, 2, 3]]  # captions 0 and 1 are swapped but equal
    metrics = recall(SplitFeatures(x, y, torch.tensor([5, 5, 6, 7])), depths=(1, 5))
    assert metrics["text_recall@1"] == 1
    assert metrics["chance_text_recall@1"] == pytest.approx((0.5 + 0.5 + 0.25 + 0.25) / 4)
    assert metrics["chance_text_recall@5"] == 1


def test_empty_split_gives_nan() -> None:
    metrics = recall(SplitFeatures(features(0), features(0), torch.arange(0)))
    assert all(value != value for value in metrics.values())
