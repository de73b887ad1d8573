"""The unigram model by hand."""

import math

import pytest
import torch

from muomni.data.views.text import IGNORE
from muomni.evaluation.metrics.unigram import token_counts, unigram_nats


def test_counts_leave_out_what_is_not_predicted() -> None:
    labels = torch.tensor([[1, 3, IGNORE], [1, IGNORE, IGNORE]])
    assert token_counts(labels, 5).tolist() == [0, 2, 0, 1, 0]


def test_nats_follow_laplace() -> None:
    train = torch.tensor([3.0, 0.0, 1.0])  # smoothed: 4/7, 1/7, 2/7
    nats = unigram_nats(train, torch.tensor([1.0, 2.0, 0.0]))
    assert nats == pytest.approx(-math.log(4 / 7) - 2 * math.log(1 / 7))


def test_an_unseen_training_split_gives_the_uniform_model() -> None:
    nats = unigram_nats(torch.zeros(8), torch.ones(8))
    assert nats == pytest.approx(8 * math.log(8))
