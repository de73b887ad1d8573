"""Losses of the language models: sums over real tokens, never means.

The trainer divides by the weight of the accumulation window over all ranks. Cross entropy never holds
the logits of all tokens at once: it computes them in chunks in fp32 and turns each chunk into its
gradient immediately, so memory does not grow with vocabulary times batch.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from muomni.models.layers.moe import route

IGNORE = -100
CHUNK_TOKENS = 1024


class LossSum(NamedTuple):
    """A loss sum, its denominator `weight`, and the number of correct predictions; 0-d fp32."""

    total: Tensor
    weight: Tensor
    num_correct: Tensor


class RouterLosses(NamedTuple):
    """Losses averaged over the MoE layers, times the number of real tokens (`weight`); 0-d fp32.

    `load` [layers, E] is the number of real tokens routed to each expert.
    """

    balance: Tensor
    z: Tensor
    weight: Tensor
    load: Tensor


def next_token_loss(
    hidden: Tensor, labels: Tensor, weight: Tensor, chunk_tokens: int = CHUNK_TOKENS
) -> LossSum:
    """Cross entropy of the output head, summed over the positions whose label is not -100.

    `hidden` is [..., D], `labels` [...] are already shifted, `weight` [V, D] is that of the head.
    Gradients flow to `hidden` and `weight`.
    """
    flat, targets = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    if flat.device.type == "cpu":
        # Free on CPUs; on an accelerator the data-dependent size would synchronize.
        kept = targets != IGNORE
        flat, targets = flat[kept], targets[kept]
    total, num_correct = _ChunkedCrossEntropy.apply(flat, weight, targets, chunk_tokens)
    return LossSum(total, (labels != IGNORE).sum().float(), num_correct)


def cross_entropy_sum(logits: Tensor, labels: Tensor) -> LossSum:
    """Cross entropy of logits [..., V] against labels [...], -100 ignored; fp32 sums."""
    flat, targets = logits.reshape(-1, logits.shape[-1]).float(), labels.reshape(-1)
    total = torch.nn.functional.cross_entropy(flat, targets, ignore_index=IGNORE, reduction="sum")
    num_correct = (flat.detach().argmax(dim=-1) == targets).sum().float()
    return LossSum(total, (targets != IGNORE).sum().float(), num_correct)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Output head and cross entropy, with gradients computed in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk_tokens: int
    ) -> tuple[Tensor, Tensor]:
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight: Tensor | None = None
        total = torch.zeros((), device=hidden.device)
        num_correct = torch.zeros((), device=hidden.device)
        # Logits and the gradient of the head are large: update both in place.
        for start in range(0, max(1, hidden.shape[0]), chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            target = targets[chunk, None]
            is_real = target != IGNORE
            target = target.clamp(min=0)
            logits = (hidden[chunk] @ weight.T).float()
            chosen = logits.gather(1, target)
            largest = logits.amax(dim=1, keepdim=True)
            exponentials = logits.sub_(largest).exp_()
            normalizer = exponentials.sum(dim=1, keepdim=True)
            total += ((largest + normalizer.log() - chosen) * is_real).sum()
            num_correct += ((largest == chosen) & is_real).sum()
            if not (needs_hidden or needs_weight):
                continue
            # d loss / d logits = softmax - one-hot, zero at ignored positions.
            grad = exponentials.mul_(is_real / normalizer)
            grad.scatter_add_(1, target, -is_real.float())
            grad = grad.to(weight.dtype)
            if grad_hidden is not None:
                grad_hidden[chunk] = grad @ weight
            if needs_weight:
                grad_weight = _add_product(grad_weight, grad.T, hidden[chunk])
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
    """Return `total` + left @ right in fp32, in place."""
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
) -> RouterLosses:
    """Balance loss and z-loss of router logits, both times the number of real tokens.

    Balance of a sequence is E * sum_e f_e P_e, where f_e is the assignments to expert e per token and P_e
    its mean probability (Fedus et al. 2021, arXiv:2101.03961, eq. 4-6, over each sequence as in
    DeepSeek-V2, arXiv:2405.04434, so that it does not depend on which sequences share a micro-batch);
    it is `top_k` for an even load. Sequences count by their real tokens. z is the mean squared
    log-sum-exp (Zoph et al. 2022, arXiv:2202.08906). `logits` holds a tensor [N, E] per layer,
    `token_mask` [B, T] with B * T = N is False on padding (None: one sequence without padding),
    `biases` holds the routing bias [E] of each layer or None.
    """
    stacked = torch.stack(logits).float()  # [layers, N, E]
    num_layers, _, num_experts = stacked.shape
    mask = stacked.new_ones(1, stacked.shape[1]) if token_mask is None else token_mask.float()
    real = mask.reshape(1, -1) if mask.ndim == 1 else mask  # [B, T]
    num_real = real.sum()
    by_sequence = stacked.view(num_layers, *real.shape, num_experts)
    counts = torch.stack(
        [
            _count_assignments(layer, top_k, real, bias)
            for layer, bias in zip(by_sequence, biases or [None] * num_layers, strict=True)
        ]
    )
    lengths = real.sum(1).clamp(min=1)[:, None]
    probability = (by_sequence.softmax(dim=-1) * real[..., None]).sum(2)  # [layers, B, E]
    balance = num_experts * (counts / lengths * probability).sum()
    z = (by_sequence.logsumexp(dim=-1).square() * real).sum()
    return RouterLosses(balance / num_layers, z / num_layers, num_real, counts.sum(1))


def _count_assignments(logits: Tensor, top_k: int, real: Tensor, bias: Tensor | None) -> Tensor:
    """Real tokens of each sequence routed to each expert: [B, E]; `real` [B, T] is 0 on padding."""
    _, chosen = route(logits.detach(), top_k, normalize=False, bias=bias)
    counts = logits.new_zeros(len(logits), logits.shape[-1])
    return counts.scatter_add_(1, chosen.flatten(1), real.repeat_interleave(top_k, dim=1))
