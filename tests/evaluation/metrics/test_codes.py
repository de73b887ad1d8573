"""The constant code by hand."""

import pytest
import torch

from muomni.evaluation.metrics.codes import CodeCounts, count_codes


def batch(codes: list[list[list[int]]], lengths: list[int]) -> dict[str, torch.Tensor]:
    table = torch.tensor(codes)
    mask = torch.arange(table.shape[1])[None, :] < torch.tensor(lengths)[:, None]
    return {"codes": table, "code_mask": mask}


def test_the_baseline_is_trainings_most_frequent_code_on_the_test_codes() -> None:
    counts = CodeCounts(4)
    counts.add("train", batch([[[1, 0], [1, 3], [2, 3]]], [3]))
    counts.add("test", batch([[[1, 3], [1, 2], [0, 0]], [[3, 3], [2, 2], [0, 0]]], [2, 3]))
    first, second = counts.metrics({"accuracy_0": 0.5, "accuracy_1": 0.25})
    assert (first.name, first.value, first.baseline) == ("code_accuracy.0", 0.5, pytest.approx(0.4))
    assert (second.name, second.value) == ("code_accuracy.1", 0.25)
    assert second.baseline == pytest.approx(2 / 5)
    assert first.is_better and not second.is_better


def test_padding_is_not_counted() -> None:
    counts = CodeCounts(2)
    counts.add("train", batch([[[0], [1], [1]]], [1]))
    counts.add("test", batch([[[0], [1], [1]]], [1]))
    (metric,) = counts.metrics({"accuracy_0": 1.0})
    assert metric.baseline == 1.0


def test_without_training_codes_there_is_no_baseline() -> None:
    counts = CodeCounts(2)
    counts.add("test", batch([[[0]]], [1]))
    (metric,) = counts.metrics({"accuracy_0": 1.0})
    assert metric.baseline is None
    assert CodeCounts(2).metrics({}) == []


def test_counts_are_by_codebook() -> None:
    codes = torch.tensor([[[0, 2], [0, 1]]])
    assert count_codes(codes, 3).tolist() == [[2, 0, 0], [0, 1, 1]]
