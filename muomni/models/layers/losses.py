"""Losses of the language models: sums over real tokens, never means.

Whoever trains divides by the weight of the whole accumulation window over all ranks. Cross entropy
never holds the logits of all tokens at once: it computes them chunk by chunk in fp32 and turns each
chunk into its gradient on the spot, so that memory does not grow with the vocabulary times the batch.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from muomni.models.layers.moe import route

IGNORE = -100
CHUNK_TOKENS = 1024


class LossSum(NamedTuple):
    """A loss summed over what `weight` counts (both 0-d fp32), and how often the best guess hit."""

    total: Tensor
    weight: Tensor
    num_correct: Tensor


class RouterLosses(NamedTuple):
    """Mean over the MoE layers, times the number of real tokens (`weight`); 0-d fp32.

    `load` [layers, E] counts how many of the real tokens each expert was chosen for.
    """

    balance: Tensor
    z: Tensor
    weight: Tensor
    load: Tensor


def next_token_loss(
    hidden: Tensor, labels: Tensor, weight: Tensor, chunk_tokens: int = CHUNK_TOKENS
) -> LossSum:
    """Cross entropy of the output head, summed over the positions whose label is not -100.

    `hidden` [..., D], `labels` [...] (what each position shall predict: already shifted), `weight`
    [V, D] of the head. Gradients flow to `hidden` and `weight`.
    """
    flat, targets = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    if flat.device.type == "cpu":
        # Free of cost here; on an accelerator the unknown size would stall it.
        kept = targets != IGNORE
        flat, targets = flat[kept], targets[kept]
    total, num_correct = _ChunkedCrossEntropy.apply(flat, weight, targets, chunk_tokens)
    return LossSum(total, (labels != IGNORE).sum().float(), num_correct)


def cross_entropy_sum(logits: Tensor, labels: Tensor) -> LossSum:
    """Cross entropy of ready logits [..., V] against labels [...], -100 ignored; fp32 sums."""
    flat, targets = logits.reshape(-1, logits.shape[-1]).float(), labels.reshape(-1)
    total = torch.nn.functional.cross_entropy(flat, targets, ignore_index=IGNORE, reduction="sum")
    num_correct = (flat.detach().argmax(dim=-1) == targets).sum().float()
    return LossSum(total, (targets != IGNORE).sum().float(), num_correct)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Head and cross entropy in one, with gradients made in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk_tokens: int
    ) -> tuple[Tensor, Tensor]:
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight: Tensor | None = None
        total = torch.zeros((), device=hidden.device)
        num_correct = torch.zeros((), device=hidden.device)
        # Logits and the gradient of the head are large: both are worked on in place.
        for start in range(0, max(1, hidden.shape[0]), chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            target = targets[rows, None]
            is_real = target != IGNORE
            target = target.clamp(min=0)
            logits = (hidden[rows] @ weight.T).float()
            chosen = logits.gather(1, target)
            largest = logits.amax(dim=1, keepdim=True)
            exponentials = logits.sub_(largest).exp_()
            normalizer = exponentials.sum(dim=1, keepdim=True)
            total += ((largest + normalizer.log() - chosen) * is_real).sum()
            num_correct += ((largest == chosen) & is_real).sum()
            if not (needs_hidden or needs_weight):
                continue
            # d loss / d logits = softmax - one-hot, zero where nothing is to be predicted.
            grad = exponentials.mul_(is_real / normalizer)
            grad.scatter_add_(1, target, -is_real.float())
            grad = grad.to(weight.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = grad @ weight
            if needs_weight:
                grad_weight = _add_product(grad_weight, grad.T, hidden[rows])
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(num_correct)
        return total, num_correct

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        scale = grads[0]
        if grad_hidden is not None:
            grad_hidden = grad_hidden * scale.to(grad_hidden.dtype)
        if grad_weight is not None:
            # In place, so a second backward pass over the same graph is an error.
            grad_weight = grad_weight.mul_(scale).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None


def _add_product(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """`total` + left @ right in fp32, in place."""
    if total is None:
        return (left @ right).float()
    if left.dtype == total.dtype:
        return total.addmm_(left, right)
    return total.add_(left @ right)


def router_losses(
    logits: list[Tensor],
    top_k: int,
    token_mask: Tensor | None = None,
    biases: Sequence[Tensor | None] | None = None,
    sum_counts: Callable[[Tensor], Tensor] = lambda counts: counts,
) -> RouterLosses:
    """Load balance and size of router logits, both times the number of real tokens.

    Balance is E * sum_e f_e P_e with f_e the assignments to expert e a token and P_e its mean
    probability (Fedus et al. 2021, arXiv:2101.03961, eq. 4-6); it is `top_k` when even. z is the
    mean squared log-sum-exp (Zoph et al. 2022, arXiv:2202.08906). `logits` holds one [N, E] tensor
    a layer, `token_mask` [...] of N elements is False on padding, `biases` the bias [E] on the choice
    of each layer, if it has one. `sum_counts` adds to the counts that f_e is made of, a vector, those of
    tokens elsewhere.
    """
    first = logits[0]
    if token_mask is None:
        real = torch.ones(first.shape[0], device=first.device)
    else:
        real = token_mask.reshape(-1).float()
    num_real = real.sum()
    wide = [layer.float() for layer in logits]
    load = torch.stack(
        [
            _count_assignments(layer, top_k, real, bias)
            for layer, bias in zip(wide, biases or [None] * len(wide), strict=True)
        ]
    )
    counts = sum_counts(torch.cat([load.flatten(), num_real[None]]))
    frequencies = counts[:-1].view_as(load) / counts[-1].clamp(min=1)
    share = (real / num_real.clamp(min=1))[:, None]
    balance = torch.zeros((), device=first.device)
    z = torch.zeros((), device=first.device)
    for layer, frequency in zip(wide, frequencies, strict=True):
        probability = (layer.softmax(dim=-1) * share).sum(dim=0)
        balance = balance + layer.shape[1] * (frequency * probability).sum()
        z = z + (layer.logsumexp(dim=-1).square() * share[:, 0]).sum()
    scale = num_real / len(logits)
    return RouterLosses(balance * scale, z * scale, num_real, load)


def _count_assignments(logits: Tensor, top_k: int, real: Tensor, bias: Tensor | None) -> Tensor:
    """How many of the real tokens (`real` [N] is 1 there, else 0) choose each expert: [E]."""
    _, chosen = route(logits.detach(), top_k, normalize=False, bias=bias)
    counts = torch.zeros(logits.shape[1], device=logits.device)
    return counts.scatter_add_(0, chosen.reshape(-1), real.repeat_interleave(top_k))
