"""Losses of the language models: sums over real tokens, never means.

The trainer divides by the weight of the accumulation window over all ranks. Cross entropy never holds
the logits of all tokens at once: it computes them in chunks in fp32 and turns each chunk into its
gradient immediately, so memory does not grow with vocabulary times batch.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from muomni.models.layers.moe import route

IGNORE = -100
CHUNK_TOKENS = 1024
# On accelerators, logits of a chunk: 0.5 GiB in fp32. Fewer and larger kernels are faster there.
_CHUNK_LOGITS = 2**27
# In fp16, small probabilities would become zero before the loss scale multiplies them.
_GRADIENT_SCALES = {torch.float16: 1024.0}


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
    hidden: Tensor, labels: Tensor, weight: Tensor, chunk_tokens: int | None = None
) -> LossSum:
    """Cross entropy of the output head, summed over the positions whose label is not -100.

    `hidden` is [..., D], `labels` [...] are already shifted, `weight` [V, D] is that of the head.
    Gradients flow to `hidden` and `weight`. Logits exist for `chunk_tokens` at a time, by default 1024, or
    on accelerators more for vocabularies below 65,536.
    """
    flat, targets = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    if flat.is_cpu:
        # Free on CPUs; on an accelerator the data-dependent size would synchronize.
        kept = targets != IGNORE
        flat, targets = flat[kept], targets[kept]
    if chunk_tokens is None:
        is_cpu, size = flat.is_cpu, _CHUNK_LOGITS // len(weight) // CHUNK_TOKENS * CHUNK_TOKENS
        chunk_tokens = CHUNK_TOKENS if is_cpu else max(CHUNK_TOKENS, size)
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
        score = _score_on_cpu if hidden.is_cpu else _score
        scale = _GRADIENT_SCALES.get(weight.dtype, 1.0) if needs_hidden or needs_weight else None
        grad_hidden: list[Tensor] = []
        grad_weight: Tensor | None = None
        total = torch.zeros((), device=hidden.device)
        num_correct = torch.zeros((), device=hidden.device)
        for start in range(0, max(1, hidden.shape[0]), chunk_tokens):
            chunk = hidden[start : start + chunk_tokens]
            target = targets[start : start + chunk_tokens, None]
            loss, num_hits, grad = score(chunk, weight, target, scale)
            total += loss
            num_correct += num_hits
            if grad is None:
                continue
            if needs_hidden:
                grad_hidden.append(_product(grad, weight))
            if needs_weight:
                grad_weight = _add_product(grad_weight, grad.T, chunk)
        ctx.save_for_backward(torch.cat(grad_hidden) if grad_hidden else None, grad_weight)
        ctx.dtypes, ctx.scale = (hidden.dtype, weight.dtype), scale
        ctx.mark_non_differentiable(num_correct)
        return total, num_correct

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        # In fp32: a rounded scale would change all gradients by the same factor.
        scale = grads[0] / ctx.scale
        if grad_hidden is not None:
            grad_hidden = (grad_hidden.float() * scale).to(ctx.dtypes[0])
        if grad_weight is not None:
            # In place, so a second backward pass over the same graph is an error.
            grad_weight = grad_weight.mul_(scale).to(ctx.dtypes[1])
        return grad_hidden, grad_weight, None, None


_Score = tuple[Tensor, Tensor, Tensor | None]


def _score_on_cpu(hidden: Tensor, weight: Tensor, target: Tensor, scale: float | None) -> _Score:
    """Loss sum, number of hits, and `scale` times the gradient of the logits of a chunk [n, D].

    `target` is [n, 1]. Without `scale`, there is no gradient. Logits and their gradient are large, so both
    are updated in place.
    """
    is_real = target != IGNORE
    target = target.clamp(min=0)
    logits = (hidden @ weight.T).float()
    chosen = logits.gather(1, target)
    largest = logits.amax(dim=1, keepdim=True)
    exponentials = logits.sub_(largest).exp_()
    normalizer = exponentials.sum(dim=1, keepdim=True)
    loss = ((largest + normalizer.log() - chosen) * is_real).sum()
    num_hits = ((largest == chosen) & is_real).sum()
    if scale is None:
        return loss, num_hits, None
    # d loss / d logits = softmax - one-hot, zero at ignored positions.
    grad = exponentials.mul_(is_real / normalizer)
    grad.scatter_add_(1, target, -is_real.float())
    return loss, num_hits, (grad if scale == 1 else grad.mul_(scale)).to(weight.dtype)


def _score(hidden: Tensor, weight: Tensor, target: Tensor, scale: float | None) -> _Score:
    """As `_score_on_cpu`, with fewer and fused kernels, and logits that are not rounded."""
    is_real = target != IGNORE
    target = target.clamp(min=0)
    log_probs = _product(hidden, weight.T).log_softmax(dim=1)
    chosen = log_probs.gather(1, target)
    loss = -(chosen * is_real).sum()
    num_hits = ((log_probs.amax(dim=1, keepdim=True) == chosen) & is_real).sum()
    if scale is None:
        return loss, num_hits, None
    if scale != 1:
        log_probs += math.log(scale)
    grad = torch.exp(log_probs, out=torch.empty_like(log_probs, dtype=weight.dtype))
    grad.scatter_(1, target, (chosen.expm1() * scale).to(weight.dtype))
    return loss, num_hits, grad.mul_(is_real)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right; accelerators return fp32 that was not rounded to the precision of the factors.

    So do CPUs in fp16, where the scaled gradients of many tokens would overflow.
    """
    if left.is_cpu and left.dtype == torch.float16:
        return left.float() @ right.float()
    if left.is_cpu or left.dtype == torch.float32:
        return left @ right
    return torch.mm(left, right, out_dtype=torch.float32)


def _add_product(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """Return `total` + left @ right in fp32; CPUs add in place."""
    if total is None:
        return _product(left, right).float()
    if left.dtype == total.dtype:
        return total.addmm_(left, right)
    if left.is_cpu:
        return total.add_(_product(left, right))
    return torch.addmm(total, left, right, out_dtype=torch.float32)


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
