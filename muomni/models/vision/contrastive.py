"""Contrastive losses over all pairs of a global batch, exact for any split over ranks and micro-batches.

Pairs that share a group (the same image or caption) are positives of each other. With s(x, y) = scale * x.y
and the p_i positives P(i) of pair i, among them i itself, symmetric InfoNCE over N pairs is half of
sum_i [LSE_j s(x_i, y_j) - mean_{j in P(i)} s(x_i, y_j)], plus the same with x and y exchanged: cross-entropy
with uniform targets over the positives (UniCL: Yang et al., 2022, arXiv:2204.03610; without equal pairs:
van den Oord et al., 2018; Radford et al., 2021). It is not a sum over micro-batches. But given the
log-sum-exps and the numbers of positives of all pairs, the gradient of each similarity is a constant, and a
surrogate that is linear in the similarities of the local pairs has the same gradient.
The sigmoid loss is sum_ij -w_ij log sigmoid(z_ij (s(x_i, y_j) + bias)), z_ij = 1 for positives and -1 elsewhere
(SigLIP: Zhai et al., 2023). w_ij is (1 / p_i + 1 / p_j) / 2 for positives and 1 elsewhere: without it, the n^2
positives of n equal pairs would outweigh all others.

Both take two passes per step (feature caching: Gao et al., 2021): gather the features of all micro-batches
without gradient; then compute `contrastive_surrogate` or `sigmoid_surrogate` and backpropagate per
micro-batch. Memory is O(n * N) for n local pairs; no gradient passes through a collective.

Group -1 marks padding, which has no weight and is neither a positive nor a negative.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from muomni.models.layers.blocks import full_precision

PADDING_GROUP = -1


@dataclass(frozen=True, slots=True)
class GatheredFeatures:
    """Unit features of all N pairs of a global batch, in the same order on all ranks, detached."""

    x: Tensor  # [N, d]
    y: Tensor  # [N, d]
    # [N] or [N, G] int64, all -1 for padding. Pairs with an equal group in a column are positives.
    groups: Tensor
    num_positives: Tensor  # [N] fp32, see `count_positives`


def count_positives(offset: int, num_local: int, groups: Tensor) -> Tensor:
    """Return the number of positives [n], in fp32, of pairs offset .. offset + num_local.

    A pair is a positive of itself; padding has none. Ranks can split this work and gather the results.
    """
    positive, _ = _pair_masks(groups, offset, num_local)
    return positive.sum(1).float()


def pair_normalizers(
    offset: int, num_local: int, gathered: GatheredFeatures, scale: Tensor
) -> Tensor:
    """Return the log-sum-exps [n, 2] of pairs offset .. offset + num_local for InfoNCE.

    Columns: over all y for x_i, and over all x for y_i. Ranks can split this work and gather the results.
    """
    with torch.no_grad():
        local = slice(offset, offset + num_local)
        _, padded = _pair_masks(gathered.groups, offset, num_local)
        rows = _similarity(gathered.x[local], gathered.y, scale).masked_fill_(padded, -torch.inf)
        columns = _similarity(gathered.y[local], gathered.x, scale).masked_fill_(padded, -torch.inf)
        return torch.stack([rows.logsumexp(1), columns.logsumexp(1)], 1)


def contrastive_surrogate(
    x: Tensor,
    y: Tensor,
    gathered: GatheredFeatures,
    normalizers: Tensor,
    offset: int,
    scale: Tensor,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return (loss sum, weight, logs) of the local pairs x, y [n, d], which carry gradient.

    `normalizers` [N, 2] are those of the global batch, `offset` is the index of the first local pair in
    it, `scale` multiplies the similarities. Summed over all ranks and micro-batches, value and gradients
    are those of the full loss. Logs are pairs [sum, weight]: top-1 accuracy among all N, both ways.
    """
    num_local = len(x)
    positive, padded = _pair_masks(gathered.groups, offset, num_local)
    rows = _similarity(x, gathered.y.detach(), scale)
    # The gradient of the scale comes from the rows, which contain all N x N pairs once.
    columns = _similarity(y, gathered.x.detach(), scale.detach())
    row_lse, column_lse = normalizers.unbind(1)
    local = slice(offset, offset + num_local)
    targets = _targets(positive, gathered.num_positives.to(rows.dtype), offset)
    surrogate = rows.new_zeros(())
    for logits, local_lse, other_lse in (
        (rows, row_lse[local], column_lse),
        (columns, column_lse[local], row_lse),
    ):
        gradient = _softmax_weights(logits.detach(), local_lse, other_lse) - targets
        surrogate = surrogate + (gradient.masked_fill_(padded, 0.0) * logits).sum()
    is_real = positive.any(1)
    lse = (row_lse[local] + column_lse[local]) / 2
    # Both directions of the targets are taken from the rows: a sum over all pairs counts each once.
    value = torch.where(is_real, lse - (targets * rows.detach()).sum(1), 0.0).sum()
    weight, logs = is_real.sum().float(), _accuracies(rows, columns, positive, padded)
    return value + surrogate - surrogate.detach(), weight, logs


def sigmoid_surrogate(
    x: Tensor,
    y: Tensor,
    gathered: GatheredFeatures,
    offset: int,
    scale: Tensor,
    bias: Tensor,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return (loss sum, weight, logs) of the local pairs x, y [n, d], which carry gradient.

    The sum is over the local x and all N y. Arguments, weight, logs, and sums over ranks and
    micro-batches are as in `contrastive_surrogate`, including the gradient of `bias` (0-d).
    """
    positive, padded = _pair_masks(gathered.groups, offset, len(x))
    # Rows contain all N x N pairs once; columns only add the gradient of y.
    rows = _similarity(x, gathered.y.detach(), scale) + bias
    columns = _similarity(y, gathered.x.detach(), scale.detach()) + bias.detach()
    signs = positive.to(rows.dtype).mul_(2).sub_(1)
    targets = _targets(positive, gathered.num_positives.to(rows.dtype), offset)
    weights = torch.where(positive, targets, 1.0).masked_fill_(padded, 0.0)
    value, gradient_of_y = (
        -(weights * F.logsigmoid(signs * logits)).sum() for logits in (rows, columns)
    )
    return (
        value + gradient_of_y - gradient_of_y.detach(),
        positive.any(1).sum().float(),
        _accuracies(rows, columns, positive, padded),
    )


def _similarity(local: Tensor, others: Tensor, scale: Tensor) -> Tensor:
    """Return scale * local @ others.T [n, N], in fp32 or wider."""
    dtype = torch.promote_types(local.dtype, torch.float32)
    with full_precision(local):
        return scale.to(dtype) * (local.to(dtype) @ others.to(dtype).T)


def _pair_masks(groups: Tensor, offset: int, num_local: int) -> tuple[Tensor, Tensor]:
    """Return boolean masks [n, N] of the positives, and of pairs with padding."""
    groups = groups.unsqueeze(-1).flatten(1)
    local = slice(offset, offset + num_local)
    positive = torch.zeros(num_local, len(groups), dtype=torch.bool, device=groups.device)
    for column in groups.unbind(1):
        positive |= column[local, None] == column
    is_padding = (groups == PADDING_GROUP).all(1)
    padded = is_padding[local, None] | is_padding
    return positive & ~padded, padded


def _targets(positive: Tensor, num_positives: Tensor, offset: int) -> Tensor:
    """Return the mean [n, N] of the targets of both directions, each uniform over the positives."""
    halves = 0.5 / num_positives.clamp(min=1)  # padding has none
    local = slice(offset, offset + len(positive))
    return (halves[local, None] + halves).masked_fill_(~positive, 0.0)


def _softmax_weights(logits: Tensor, local_lse: Tensor, other_lse: Tensor) -> Tensor:
    """Return the mean [n, N] of the softmax weights of both directions."""
    return (torch.exp(logits - local_lse[:, None]) + torch.exp(logits - other_lse)) / 2


def _accuracies(
    rows: Tensor, columns: Tensor, positive: Tensor, padded: Tensor
) -> dict[str, Tensor]:
    """Return [sum, weight] of the top-1 accuracy in both directions; any positive is correct."""
    weight = positive.any(1).sum().float()
    logs = {}
    for name, logits in (("accuracy_x_to_y", rows), ("accuracy_y_to_x", columns)):
        best = logits.detach().masked_fill(padded, -torch.inf).argmax(1, keepdim=True)
        logs[name] = torch.stack([positive.gather(1, best).sum().float(), weight])
    return logs
