"""The unigram model and the most frequent code, computed by hand."""

import math

import pytest
import torch

from muomni.data.views.text import IGNORE
from muomni.evaluation.metrics.baselines import (
    CodeCounts,
    count_codes,
    token_counts,
    unigram_nats,
)


def batch(codes: list[list[list[int]]], lengths: list[int]) -> dict[str, torch.Tensor]:
    tensor = torch.tensor(codes)
    mask = torch.arange(tensor.shape[1])[None, :] < torch.tensor(lengths)[:, None]
    return {"codes": tensor, "code_mask": mask}


def test_baseline_is_accuracy_of_most_frequent_training_code() -> None:
    counts = CodeCounts(4)
    counts.add("train", batch([[[1, 0], [1, 3], [2, 3]]], [3]))
    counts.add("test", batch([[[1, 3], [1, 2], [0, 0]], [[3, 3], [2, 2], [0, 0]]], [2, 3]))
    first, second = counts.metrics({"accuracy_0": 0.5, "accuracy_1": 0.25})
    assert (first.name, first.value, first.baseline) == ("code_accuracy.0", 0.5, pytest.approx(0.4))
    assert (second.name, second.value) == ("code_accuracy.1", 0.25)
    assert second.baseline == pytest.approx(2 / 5)
    assert first.is_better and not second.is_better


def test_padding_is_ignored() -> None:
    counts = CodeCounts(2)
    counts.add("train", batch([[[0], [1], [1]]], [1]))
    counts.add("test", batch([[[0], [1], [1]]], [1]))
    (metric,) = counts.metrics({"accuracy_0": 1.0})
    assert metric.baseline == 1.0


def test_no_baseline_without_training_codes() -> None:
    counts = CodeCounts(2)
    counts.add("test", batch([[[0]]], [1]))
    (metric,) = counts.metrics({"accuracy_0": 1.0})
    assert metric.baseline is None
    assert CodeCounts(2).metrics({}) == []


def test_codes_are_counted_per_codebook() -> None:
    codes = torch.tensor([[[0, 2], [0, 1]]])
    assert count_codes(codes, 3).tolist() == [[2, 0, 0], [0, 1, 1]]


def test_ignored_labels_are_not_counted() -> None:
    labels = torch.tensor([[1, 3, IGNORE], [1, IGNORE, IGNORE]])
    assert token_counts(labels, 5).tolist() == [0, 2, 0, 1, 0]


def test_unigram_uses_add_one_smoothing() -> None:
    train = torch.tensor([3.0, 0.0, 1.0])  # smoothed: 4/7, 1/7, 2/7
    nats = unigram_nats(train, torch.tensor([1.0, 2.0, 0.0]))
    assert nats == pytest.approx(-math.log(4 / 7) - 2 * math.log(1 / 7))


def test_unigram_is_uniform_without_training_tokens() -> None:
    nats = unigram_nats(torch.zeros(8), torch.ones(8))
    assert nats == pytest.approx(8 * math.log(8))
