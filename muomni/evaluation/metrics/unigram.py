"""The trivial language model: how often each token occurs in training, add-one smoothed."""

import torch
from torch import Tensor

from muomni.data.views.text import IGNORE


def token_counts(labels: Tensor, vocab_size: int) -> Tensor:
    """How often each token is a target in `labels` (any shape, -100 = none): float64 [vocab_size]."""
    targets = labels[labels != IGNORE]
    return torch.bincount(targets.flatten().cpu(), minlength=vocab_size).double()


def unigram_nats(train_counts: Tensor, counts: Tensor) -> float:
    """Nats that a unigram model of `train_counts` [V] spends on tokens that occur `counts` [V] times.

    Laplace's rule: p(token) = (train count + 1) / (all train tokens + V).
    """
    smoothed = train_counts.double() + 1
    return float(-(counts.double() * (smoothed / smoothed.sum()).log()).sum())
