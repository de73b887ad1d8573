"""Baselines from training frequencies: a unigram model of tokens, and the most frequent speech code."""

import torch
from torch import Tensor

from muomni.data.views.base import Batch
from muomni.data.views.text import IGNORE
from muomni.evaluation.metrics.tally import Tally
from muomni.evaluation.report import Metric


def token_counts(labels: Tensor, vocab_size: int) -> Tensor:
    """Count the target tokens in `labels` (any shape, -100 is ignored): float64 [vocab_size]."""
    targets = labels[labels != IGNORE]
    return torch.bincount(targets.flatten().cpu(), minlength=vocab_size).double()


def unigram_nats(train_counts: Tensor, counts: Tensor) -> float:
    """Cross entropy, in nats, of tokens with `counts` [V] under a unigram model of `train_counts` [V].

    Add-one (Laplace) smoothing: p(token) = (train count + 1) / (number of training tokens + V).
    """
    smoothed = train_counts.double() + 1
    return float(-(counts.double() * (smoothed / smoothed.sum()).log()).sum())


class CodeCounts:
    """Counts of each code of each codebook in the splits `test` and `train`."""

    def __init__(self, codebook_size: int) -> None:
        self.codebook_size = codebook_size
        self._tally = Tally()

    def add(self, split: str, batch: Batch) -> None:
        """Count `codes` [B, T, K] where `code_mask` [B, T] is true."""
        self._tally.add(split, count_codes(batch["codes"][batch["code_mask"]], self.codebook_size))

    def metrics(self, accuracies: dict[str, float], prefix: str = "") -> list[Metric]:
        """Return `accuracies["{prefix}accuracy_{k}"]` as one metric per codebook k; a collective.

        The baseline always predicts the most frequent training code.
        """
        sums = self._tally.reduce()
        test, train = sums.get("test"), sums.get("train")
        if test is None:
            return []
        metrics = []
        for k in range(len(test)):
            baseline = None
            if train is not None and test[k].sum() > 0:
                baseline = float(test[k, train[k].argmax()] / test[k].sum())
            metrics.append(
                Metric(
                    f"{prefix}code_accuracy.{k}",
                    accuracies.get(f"{prefix}accuracy_{k}", float("nan")),
                    baseline,
                    "most frequent code",
                    is_lower_better=False,
                )
            )
        return metrics


def count_codes(codes: Tensor, codebook_size: int) -> Tensor:
    """Count each code of each codebook in `codes` [..., K]: [K, codebook_size]."""
    columns = codes.reshape(-1, codes.shape[-1]).T
    return torch.stack([torch.bincount(column, minlength=codebook_size) for column in columns])
