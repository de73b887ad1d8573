"""Speech codes of held-out audio clips, and the answer that is always the same: the code that training
has most often.
"""

import torch
from torch import Tensor

from muomni.data.views.base import Batch
from muomni.evaluation.metrics.tally import Tally
from muomni.evaluation.report import Metric


class CodeCounts:
    """How often each code of each codebook occurs in splits called `test` and `train`."""

    def __init__(self, codebook_size: int) -> None:
        self.codebook_size = codebook_size
        self._tally = Tally()

    def add(self, split: str, batch: Batch) -> None:
        """Count `codes` [B, T, K] where `code_mask` [B, T] is true."""
        self._tally.add(split, count_codes(batch["codes"][batch["code_mask"]], self.codebook_size))

    def metrics(self, accuracies: dict[str, float], prefix: str = "") -> list[Metric]:
        """One metric a codebook from `accuracies["{prefix}accuracy_{k}"]`; every rank must call it."""
        sums = self._tally.reduce()
        test, train = sums.get("test"), sums.get("train")
        metrics = []
        for k in range(len(test) if test is not None else 0):
            baseline = None
            if test is not None and train is not None and test[k].sum() > 0:
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
    """How often each code occurs in `codes` [..., K]: [K, V]."""
    columns = codes.reshape(-1, codes.shape[-1]).T
    return torch.stack([torch.bincount(column, minlength=codebook_size) for column in columns])
