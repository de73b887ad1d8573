"""Contrastive losses in plain PyTorch, from one similarity matrix and an explicit matrix of targets."""

import torch
import torch.nn.functional as F

from muomni.models.vision.contrastive import PADDING_GROUP, GatheredFeatures, count_positives


def gathered_features(x: torch.Tensor, y: torch.Tensor, groups: torch.Tensor) -> GatheredFeatures:
    """The features of a global batch, as a stage gathers them."""
    return GatheredFeatures(x.detach(), y.detach(), groups, count_positives(0, len(groups), groups))


def positives(groups: torch.Tensor) -> torch.Tensor:
    """[N, N] bool: which pairs share a group in a column of `groups` [N, G]; nothing for padding."""
    num = len(groups)
    matrix = torch.zeros(num, num, dtype=torch.bool)
    for i, own in enumerate(groups.tolist()):
        for j, other in enumerate(groups.tolist()):
            matrix[i, j] = any(a == b != PADDING_GROUP for a, b in zip(own, other, strict=True))
    return matrix


def infonce(logits: torch.Tensor, positive: torch.Tensor) -> torch.Tensor:
    """Sum of the cross-entropies with uniform targets, half of each direction (Yang et al., 2022)."""
    logits, positive = _without_padding(logits, positive)
    total = logits.new_zeros(())
    for matrix in (logits, logits.T):
        targets = positive.to(logits)  # symmetric until the division
        targets = targets / targets.sum(1, keepdim=True)
        total = total + F.cross_entropy(matrix, targets, reduction="sum") / 2
    return total


def sigmoid(logits: torch.Tensor, positive: torch.Tensor) -> torch.Tensor:
    """Sum of the binary cross-entropies of all pairs; `logits` include the bias (Zhai et al., 2023).

    The weights of the positives of a row are 1 in sum, in the mean over both directions.
    """
    logits, positive = _without_padding(logits, positive)
    targets = positive.to(logits)
    shares = targets / targets.sum(1, keepdim=True)
    weights = torch.where(positive, (shares + shares.T) / 2, 1.0)
    return F.binary_cross_entropy_with_logits(logits, targets, weights, reduction="sum")


def _without_padding(
    logits: torch.Tensor, positive: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    is_real = positive.any(1)
    return logits[is_real][:, is_real], positive[is_real][:, is_real]
