"""Contrastive losses in plain PyTorch, from one similarity matrix and an explicit matrix of targets."""

import torch
import torch.nn.functional as F

from muomni.models.vision.contrastive import PADDING_GROUP


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
    """Sum of the binary cross-entropies of all pairs; `logits` include the bias (Zhai et al., 2023)."""
    logits, positive = _without_padding(logits, positive)
    return F.binary_cross_entropy_with_logits(logits, positive.to(logits), reduction="sum")


def _without_padding(
    logits: torch.Tensor, positive: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    is_real = positive.any(1)
    return logits[is_real][:, is_real], positive[is_real][:, is_real]
