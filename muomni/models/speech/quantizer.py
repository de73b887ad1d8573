"""Residual vector quantizer whose codebooks learn by moving averages, not by gradients.

Each codebook quantizes the residual of the previous ones (van den Oord et al., 2017; Zeghidour et al.,
"SoundStream", 2021). Codebooks are fp32 buffers. The forward pass does not change them: in training it
returns `QuantizerStatistics`, which the trainer sums over micro-batches and ranks and passes to
`ResidualQuantizer.update` once per optimizer step. The result does not depend on how the global batch is
split.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor, nn

from muomni.models.layers.blocks import full_precision
from muomni.models.layers.counter_random import uniform_hash

# Initial use of a new or replaced code, relative to the average use: one or two dozen steps to win
# frames before it counts as dead.
FRESH_USE = 0.2
# How strongly a candidate slot prefers the latent with the largest random number (`_candidates`).
CANDIDATE_SHARPNESS = 60.0


@dataclass(frozen=True, slots=True)
class QuantizerStatistics:
    """Statistics of batches for K codebooks of V codes of size d: sums, in fp32.

    A candidate slot holds sum(w * latent) and sum(w). The weights differ so much that the quotient is,
    up to rounding, one latent sampled from all summed batches.
    """

    counts: Tensor  # [K, V] frames of each code
    sums: Tensor  # [K, V, d] sums of their residuals
    candidate_sums: Tensor  # [K, V, d]
    candidate_weights: Tensor  # [K, V]

    def __add__(self, other: "QuantizerStatistics") -> "QuantizerStatistics":
        return QuantizerStatistics(
            *(getattr(self, f.name) + getattr(other, f.name) for f in fields(self))
        )

    def tensors(self) -> dict[str, Tensor]:
        """Return the four sums by name; `QuantizerStatistics(**tensors)` inverts this."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


class QuantizerOutput(NamedTuple):
    """Result of a forward pass over latents [B, T, d].

    A tuple, because ZeRO-3 finds the tensors for its backward hooks in tuples.
    """

    quantized: Tensor  # [B, T, d] fp32; its gradient passes straight through to the latents
    codes: Tensor  # [B, T, K] int64, zero on padding
    commitment: Tensor  # fp32 scalar: mean squared error, summed over valid frames and codebooks
    statistics: QuantizerStatistics | None  # in training mode only


class ResidualQuantizer(nn.Module):
    """K codebooks of V vectors, each for the residual of the previous ones.

    Each update fills one codebook from data, so that it sees true residuals of the previous ones; an
    empty codebook adds nothing to the output.
    """

    codebooks: Tensor  # [K, V, d]
    ema_counts: Tensor  # [K, V]
    ema_sums: Tensor  # [K, V, d]
    num_filled: Tensor  # []

    def __init__(
        self,
        num_codebooks: int,
        codebook_size: int,
        latent_size: int,
        ema_decay: float,
        dead_code_usage: float,
    ) -> None:
        super().__init__()
        self.num_codebooks = num_codebooks
        self.codebook_size = codebook_size
        self.ema_decay = ema_decay
        self.dead_code_usage = dead_code_usage
        shape = (num_codebooks, codebook_size)
        self.register_buffer("codebooks", torch.zeros(*shape, latent_size))
        self.register_buffer("ema_counts", torch.zeros(shape))
        self.register_buffer("ema_sums", torch.zeros(*shape, latent_size))
        self.register_buffer("num_filled", torch.zeros((), dtype=torch.int64))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ResidualQuantizer":
        """Move with the model to its device, but keep the codebooks fp32 when it is cast."""
        kept = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            moved = self._buffers[name]
            if buffer is not None and moved is not None and moved.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(moved.device)
        return self

    def forward(self, latents: Tensor, valid: Tensor, seeds: Tensor | None) -> QuantizerOutput:
        """Quantize latents [B, T, d] where `valid` [B, T] is True.

        Training mode requires `seeds` [B] int64, one per sample and independent of the batch; they
        determine which latents become candidates. Raises ValueError if they are missing.
        """
        if self.training and seeds is None:
            raise ValueError("the quantizer needs a seed per sample in training mode")
        latents = latents.float()
        residual = latents
        total = torch.zeros_like(latents)
        commitment = latents.new_zeros(())
        codes, residuals = [], []
        for level in range(self.num_codebooks):
            residuals.append(residual.detach())
            is_filled = level < self.num_filled  # stays on the device, no synchronization
            code = nearest_codes(residuals[-1], self.codebooks[level]) * valid
            vector = self.codebooks[level][code]
            error = (residual - vector).square().mean(-1)
            commitment = commitment + (error * valid).sum() * is_filled
            residual = residual - vector
            total = total + vector
            codes.append(code)
        stacked = torch.stack(codes, -1)
        quantized = (latents + (total - latents).detach()) * valid[:, :, None]
        statistics = None
        if self.training and seeds is not None:
            statistics = self._statistics(torch.stack(residuals), stacked, valid, seeds)
        return QuantizerOutput(quantized, stacked, commitment, statistics)

    @torch.no_grad()
    def encode(self, latents: Tensor, valid: Tensor) -> Tensor:
        """Return the codes [B, T, K] int64 of latents [B, T, d], zero where `valid` is False."""
        residual, codes = latents.float(), []
        for codebook in self.codebooks:
            codes.append(nearest_codes(residual, codebook) * valid)
            residual = residual - codebook[codes[-1]]
        return torch.stack(codes, -1)

    def decode(self, codes: Tensor) -> Tensor:
        """Return the latents [B, T, d] fp32 of codes [B, T, K]."""
        levels = torch.arange(self.num_codebooks, device=codes.device)
        return self.codebooks[levels, codes].sum(2)

    @torch.no_grad()
    def _statistics(
        self, residuals: Tensor, codes: Tensor, valid: Tensor, seeds: Tensor
    ) -> QuantizerStatistics:
        """Count codes, sum their residuals [K, B, T, d], and collect candidates."""
        weight = valid.float().expand(self.num_codebooks, *valid.shape)
        counts, sums = self._scatter_sum(codes.permute(2, 0, 1), weight, residuals)
        slots, weight = self._candidates(valid, seeds)
        candidate_weights, candidate_sums = self._scatter_sum(slots, weight, residuals)
        return QuantizerStatistics(counts, sums, candidate_sums, candidate_weights)

    def _scatter_sum(
        self, slots: Tensor, weights: Tensor, vectors: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Sum weights and weighted vectors [K, B, T(, d)] into V slots with indices [K, B, T]."""
        slot, weight, vector = slots.flatten(1), weights.flatten(1), vectors.flatten(1, 2)
        totals = torch.zeros_like(self.ema_counts).scatter_add_(1, slot, weight)
        index = slot[:, :, None].expand_as(vector)
        sums = torch.zeros_like(self.ema_sums).scatter_add_(1, index, vector * weight[:, :, None])
        return totals, sums

    def _candidates(self, valid: Tensor, seeds: Tensor) -> tuple[Tensor, Tensor]:
        """Return the slot of each latent and its weight there, both [K, B, T].

        Ranks exchange sums only, so a sum chooses one latent per slot: weights are
        exp(sharpness * uniform), of which the largest outweighs the rest.
        """
        frame = torch.arange(valid.shape[1], device=valid.device)[None, None, :]
        level = torch.arange(self.num_codebooks, device=valid.device)[:, None, None]
        keys = (seeds[None, :, None], frame, level)
        slot = (uniform_hash(*keys, torch.zeros_like(level)) * self.codebook_size).long()
        uniform = uniform_hash(*keys, torch.ones_like(level))
        return slot, torch.exp(CANDIDATE_SHARPNESS * (uniform - 1)) * valid

    @torch.no_grad()
    def update(self, statistics: QuantizerStatistics) -> None:
        """Update the codebooks with the summed statistics of a global batch.

        A candidate replaces a code whose average use falls below `dead_code_usage` times that of its
        codebook. Deterministic: ranks with the same statistics stay equal. A batch without frames, or
        with a non-finite latent, changes nothing.
        """
        is_finite = statistics.sums.isfinite().all() & statistics.candidate_sums.isfinite().all()
        has_frames = (statistics.counts.sum(1) > 0)[:, None] & is_finite
        level = torch.arange(self.num_codebooks, device=self.codebooks.device)[:, None]
        is_filled, is_next = level < self.num_filled, level == self.num_filled
        counts = self.ema_counts.lerp(statistics.counts, 1 - self.ema_decay) * is_filled
        sums = self.ema_sums.lerp(statistics.sums, 1 - self.ema_decay) * is_filled[:, :, None]
        is_dead = is_filled & (counts < self.dead_code_usage * counts.mean(1, keepdim=True))
        # The n-th dead code takes the n-th slot in use, or stays if there is none.
        in_use = statistics.candidate_weights > 0
        order = (~in_use).to(torch.int8).argsort(dim=1, stable=True)
        vectors = statistics.candidate_sums / statistics.candidate_weights[:, :, None].clamp(
            min=torch.finfo(torch.float32).tiny
        )
        is_dead = (is_dead | is_next) & has_frames
        rank = (is_dead.cumsum(1) - 1).clamp(min=0)
        source = order.gather(1, rank)
        is_fresh = is_dead & in_use.gather(1, source)
        fresh = vectors.gather(1, source[:, :, None].expand_as(vectors))
        average = torch.where(is_filled, counts, statistics.counts).mean(1, keepdim=True)
        fresh_counts = (FRESH_USE * average).expand_as(counts)
        counts = torch.where(is_fresh, fresh_counts, counts)
        sums = torch.where(is_fresh[:, :, None], fresh * fresh_counts[:, :, None], sums)
        has_use = (counts > 0) & has_frames
        means = sums / counts.clamp(min=1e-12)[:, :, None]
        self.codebooks.copy_(torch.where(has_use[:, :, None], means, self.codebooks))
        self.ema_counts.copy_(torch.where(has_frames, counts, self.ema_counts))
        self.ema_sums.copy_(torch.where(has_frames[:, :, None], sums, self.ema_sums))
        self.num_filled.add_((is_next & has_frames).any())


def nearest_codes(latents: Tensor, codebook: Tensor) -> Tensor:
    """Return the index [...] of the vector in `codebook` [V, d] nearest to each latent [..., d]."""
    with full_precision(latents):
        # -|x - e|^2 + |x|^2; the last term is the same for all codes.
        similarity = 2 * latents @ codebook.T - codebook.square().sum(-1)
    return similarity.argmax(-1)


def count_codes(codes: Tensor, valid: Tensor, codebook_size: int) -> Tensor:
    """Return the count of each code, [K, V] fp32, in codes [B, T, K] where `valid` is True."""
    index = codes.permute(2, 0, 1).flatten(1)
    counts = torch.zeros(len(index), codebook_size, device=codes.device)
    return counts.scatter_add_(1, index, valid.float().flatten().expand_as(index).contiguous())


def code_perplexity(counts: Tensor) -> Tensor:
    """Return the perplexity [K] of the code distributions with counts [K, V]; at most V."""
    share = counts.double() / counts.double().sum(1, keepdim=True).clamp(min=1)
    return torch.special.entr(share).sum(1).exp().float()
