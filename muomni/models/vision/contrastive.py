"""Contrastive losses over all pairs of a global batch, exact for any split over ranks and micro-batches.

Symmetric InfoNCE over N pairs is sum_i [LSE_j s(x_i, y_j) + LSE_j s(x_j, y_i)] / 2 - s(x_i, y_i), with
s(x, y) = scale * x.y (van den Oord et al., 2018; Radford et al., 2021). It is not a sum over
micro-batches. But given the log-sum-exps of all rows and columns, the softmax weight of each pair is
a constant, and a surrogate that is linear in the similarities of the local pairs has the same gradient.
The sigmoid loss is sum_ij -log sigmoid(z_ij (s(x_i, y_j) + bias)), z_ij = 1 for i = j and -1 elsewhere
(SigLIP: Zhai et al., 2023), a sum over pairs without log-sum-exps.

Both take two passes per step (feature caching: Gao et al., 2021): gather the features of all micro-batches
without gradient; then compute `contrastive_surrogate` or `sigmoid_surrogate` and backpropagate per
micro-batch. Memory is O(n * N) for n local pairs; no gradient passes through a collective.

Pairs that share a group (the same image or caption) are not negatives of each other. Group -1 marks
padding, which has no weight and provides no negatives.
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
    # [N] or [N, G] int64, all -1 for padding. Pairs with an equal group in a column are not contrasted;
    # None: all pairs are distinct.
    groups: Tensor | None = None

    def weight(self) -> Tensor:
        """Return the number of real pairs, the denominator of the loss."""
        if self.groups is None:
            return torch.tensor(float(len(self.x)), device=self.x.device)
        return (~_is_padding(self.groups)).sum().float()


def gathered_logsumexp(
    offset: int, num_local: int, gathered: GatheredFeatures, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the log-sum-exps [n] of rows and columns offset .. offset + num_local.

    Row i covers all y for x_i, column i all x for y_i. Ranks can split this work and gather the
    results.
    """
    with torch.no_grad():
        local = slice(offset, offset + num_local)
        masked = _masked_pairs(gathered.groups, offset, num_local)
        rows = _similarity(gathered.x[local], gathered.y, scale)
        columns = _similarity(gathered.y[local], gathered.x, scale)
        if masked is not None:
            rows, columns = (t.masked_fill(masked, -torch.inf) for t in (rows, columns))
        return rows.logsumexp(1), columns.logsumexp(1)


def contrastive_surrogate(
    x: Tensor,
    y: Tensor,
    gathered: GatheredFeatures,
    row_lse: Tensor,
    column_lse: Tensor,
    offset: int,
    scale: Tensor,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return (loss sum, weight, logs) of the local pairs x, y [n, d], which carry gradient.

    `row_lse`, `column_lse` [N] are those of the global batch, `offset` is the index of the first local
    pair in it, `scale` multiplies the similarities. Summed over all ranks and micro-batches, value and
    gradients are those of the full loss. Logs are pairs [sum, weight]: top-1 accuracy among all N, both
    ways.
    """
    num_local = len(x)
    masked = _masked_pairs(gathered.groups, offset, num_local)
    counts = _counts(gathered.groups, offset, num_local, x.device)
    rows = _similarity(x, gathered.y.detach(), scale)
    # The gradient of the scale comes from the rows, which contain all N x N pairs once.
    columns = _similarity(y, gathered.x.detach(), scale.detach())
    if masked is not None:
        rows, columns = (t.masked_fill(masked, -torch.inf) for t in (rows, columns))
    own = torch.arange(num_local, device=x.device)
    local = slice(offset, offset + num_local)
    surrogate = rows.new_zeros(())
    for logits, local_lse, other_lse in (
        (rows, row_lse[local], column_lse),
        (columns, column_lse[local], row_lse),
    ):
        weights = _pair_weights(logits.detach(), local_lse, other_lse)
        weights[own, own + offset] -= counts.to(weights.dtype)
        # A masked pair has weight zero, and zero times its -inf must not become NaN.
        finite = logits if masked is None else logits.masked_fill(masked, 0.0)
        surrogate = surrogate + (weights * finite).sum()
    lse = (row_lse[local] + column_lse[local]).to(rows.dtype) / 2
    value = torch.where(counts > 0, lse - rows.detach()[own, own + offset], 0.0).sum()
    logs = _accuracies(rows, columns, own + offset, counts)
    return value + surrogate - surrogate.detach(), counts.sum(), logs


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
    num_local = len(x)
    masked = _masked_pairs(gathered.groups, offset, num_local)
    counts = _counts(gathered.groups, offset, num_local, x.device)
    own = torch.arange(num_local, device=x.device)
    # Rows contain all N x N pairs once; columns only add the gradient of y.
    rows = _similarity(x, gathered.y.detach(), scale) + bias
    columns = _similarity(y, gathered.x.detach(), scale.detach()) + bias.detach()
    value, gradient_of_y = (
        _sigmoid_sum(logits, own + offset, masked) for logits in (rows, columns)
    )
    if masked is not None:
        rows, columns = (t.detach().masked_fill(masked, -torch.inf) for t in (rows, columns))
    return (
        value + gradient_of_y - gradient_of_y.detach(),
        counts.sum(),
        _accuracies(rows, columns, own + offset, counts),
    )


def _sigmoid_sum(logits: Tensor, target: Tensor, masked: Tensor | None) -> Tensor:
    """Return the sum of -log sigmoid of logits [n, N] at `target` [n] and of all others negated."""
    signs = torch.full_like(logits, -1.0).scatter_(1, target[:, None], 1.0)
    terms = -F.logsigmoid(signs * logits)
    return (terms if masked is None else terms.masked_fill(masked, 0.0)).sum()


def _similarity(local: Tensor, others: Tensor, scale: Tensor) -> Tensor:
    """Return scale * local @ others.T [n, N], in fp32 or wider."""
    dtype = torch.promote_types(local.dtype, torch.float32)
    with full_precision(local):
        return scale.to(dtype) * (local.to(dtype) @ others.to(dtype).T)


def _masked_pairs(groups: Tensor | None, offset: int, num_local: int) -> Tensor | None:
    """Return a boolean mask [n, N] of pairs that are neither negative nor the positive."""
    if groups is None:
        return None
    local = slice(offset, offset + num_local)
    same = torch.zeros(num_local, len(groups), dtype=torch.bool, device=groups.device)
    for column in groups.unsqueeze(-1).flatten(1).unbind(1):
        same |= column[local, None] == column[None, :]
    own = torch.arange(num_local, device=groups.device)
    # Not by assignment: `same[...] = False` copies a host scalar to the device, which synchronizes.
    same &= torch.arange(len(groups), device=groups.device) != (own + offset)[:, None]
    padding = _is_padding(groups)
    return same | padding[local, None] | padding[None, :]


def _is_padding(groups: Tensor) -> Tensor:
    return (groups == PADDING_GROUP).unsqueeze(-1).flatten(1).all(1)


def _counts(groups: Tensor | None, offset: int, num_local: int, device: torch.device) -> Tensor:
    """Return 1 for each real local pair and 0 for padding, [n] fp32."""
    if groups is None:
        return torch.ones(num_local, device=device)
    return (~_is_padding(groups[offset : offset + num_local])).float()


def _pair_weights(logits: Tensor, local_lse: Tensor, other_lse: Tensor) -> Tensor:
    """Return dL/dlogit [n, N] without the positive's -1: the mean of both softmax weights."""
    forward = torch.exp(logits - local_lse[:, None])
    backward = torch.exp(logits - other_lse[None, :])
    # Padding has no finite logit and a log-sum-exp of -inf: its weights are zero.
    hidden = logits == -torch.inf
    return (forward.masked_fill(hidden, 0.0) + backward.masked_fill(hidden, 0.0)) / 2


def _accuracies(rows: Tensor, columns: Tensor, target: Tensor, counts: Tensor) -> dict[str, Tensor]:
    """Return [sum, weight] of the top-1 accuracy in both directions."""
    logits_by_name = {"accuracy_x_to_y": rows, "accuracy_y_to_x": columns}
    return {
        name: torch.stack([((logits.detach().argmax(1) == target) * counts).sum(), counts.sum()])
        for name, logits in logits_by_name.items()
    }
