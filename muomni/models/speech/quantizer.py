"""Residual vector quantizer whose codebooks learn by moving averages, not by gradients.

Each codebook quantizes what the ones before it left over (van den Oord et al., 2017; Zeghidour et
al., "SoundStream", 2021). Codebooks are fp32 buffers. The forward pass never changes them: in
training it returns `QuantizerStatistics`, plain sums that a trainer adds up over micro-batches and
ranks and then gives to `ResidualQuantizer.update` once an optimizer step. The result is the same
for any split of the global batch. Nothing here knows of ranks.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor, nn

from muomni.models.layers.counter_random import uniform_hash

# A code starts, or starts again, with this share of the average use, so that it has a dozen or two
# steps to win frames before it counts as dead.
FRESH_USE = 0.2
# How sharply a slot of candidates prefers the latent with the largest draw (see `_candidates`).
CANDIDATE_SHARPNESS = 60.0


@dataclass(frozen=True, slots=True)
class QuantizerStatistics:
    """What some batches say about K codebooks of V codes of size d; all fp32, all sums.

    A slot of candidates holds sum(w * latent) and sum(w); the weights differ so much that the
    quotient is, but for rounding, one latent drawn at random from all batches added up.
    """

    counts: Tensor  # [K, V] frames of each code
    sums: Tensor  # [K, V, d] sum of their residuals
    candidate_sums: Tensor  # [K, V, d]
    candidate_weights: Tensor  # [K, V]

    def __add__(self, other: "QuantizerStatistics") -> "QuantizerStatistics":
        return QuantizerStatistics(
            *(getattr(self, f.name) + getattr(other, f.name) for f in fields(self))
        )

    def tensors(self) -> dict[str, Tensor]:
        """Return the four sums by name; `QuantizerStatistics(**tensors)` is the way back."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


class QuantizerOutput(NamedTuple):
    """Result of a forward pass over latents [B, T, d].

    A tuple, since ZeRO-3 puts its backward hooks on tensors that a module returns in one.
    """

    quantized: Tensor  # [B, T, d] fp32; its gradient passes straight through to the latents
    codes: Tensor  # [B, T, K] int64, zero on padding
    commitment: Tensor  # fp32 scalar: sum over valid frames and codebooks of the mean square error
    statistics: QuantizerStatistics | None  # in training only


class ResidualQuantizer(nn.Module):
    """K codebooks of V vectors, each for the residual of the previous ones.

    Codebooks are filled from data, one an update, so that each sees true residuals of the ones
    before it; one that is not yet filled adds nothing to the output.
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
        """Follow the model to its device, but keep the codebooks fp32 when it is cast."""
        kept = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            moved = self._buffers[name]
            if buffer is not None and moved is not None and moved.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(moved.device)
        return self

    def forward(self, latents: Tensor, valid: Tensor, seeds: Tensor | None) -> QuantizerOutput:
        """Quantize latents [B, T, d] where `valid` [B, T] is true.

        `seeds` [B] int64 names each sample, independent of its place in the batch; it decides
        which latents become candidates. Needed in training mode, ignored otherwise.
        """
        if self.training and seeds is None:
            raise ValueError("the quantizer needs one seed a sample in training mode")
        latents = latents.float()
        residual = latents
        total = torch.zeros_like(latents)
        commitment = latents.new_zeros(())
        codes, residuals = [], []
        for level in range(self.num_codebooks):
            residuals.append(residual.detach())
            is_filled = level < self.num_filled  # stays on the device: no wait for the host
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
        """Return the codes [B, T, K] int64 of latents [B, T, d], zero where `valid` is false."""
        residual, codes = latents.float(), []
        for codebook in self.codebooks:
            codes.append(nearest_codes(residual, codebook) * valid)
            residual = residual - codebook[codes[-1]]
        return torch.stack(codes, -1)

    def decode(self, codes: Tensor) -> Tensor:
        """Return the latents [B, T, d] fp32 that codes [B, T, K] stand for."""
        levels = torch.arange(self.num_codebooks, device=codes.device)
        return self.codebooks[levels, codes].sum(2)

    @torch.no_grad()
    def _statistics(
        self, residuals: Tensor, codes: Tensor, valid: Tensor, seeds: Tensor
    ) -> QuantizerStatistics:
        """Count codes, sum the residuals [K, B, T, d] that chose them, and collect candidates."""
        weight = valid.float().expand(self.num_codebooks, *valid.shape)
        counts, sums = self._sum_by_place(codes.permute(2, 0, 1), weight, residuals)
        slots, draws = self._candidates(valid, seeds)
        candidate_weights, candidate_sums = self._sum_by_place(slots, draws, residuals)
        return QuantizerStatistics(counts, sums, candidate_sums, candidate_weights)

    def _sum_by_place(
        self, places: Tensor, weights: Tensor, vectors: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Sum weights and weighted vectors [K, B, T(, d)] into the V places that [K, B, T] name."""
        place, weight, vector = places.flatten(1), weights.flatten(1), vectors.flatten(1, 2)
        totals = torch.zeros_like(self.ema_counts).scatter_add_(1, place, weight)
        index = place[:, :, None].expand_as(vector)
        sums = torch.zeros_like(self.ema_sums).scatter_add_(1, index, vector * weight[:, :, None])
        return totals, sums

    def _candidates(self, valid: Tensor, seeds: Tensor) -> tuple[Tensor, Tensor]:
        """Return for each latent its slot and its weight there, both [K, B, T].

        Only sums travel between ranks, so the choice of one latent a slot is made by a sum: weights
        are exp(sharpness * uniform draw), of which the largest outweighs the rest.
        """
        frame = torch.arange(valid.shape[1], device=valid.device)[None, None, :]
        level = torch.arange(self.num_codebooks, device=valid.device)[:, None, None]
        keys = (seeds[None, :, None], frame, level)
        slot = (uniform_hash(*keys, torch.zeros_like(level)) * self.codebook_size).long()
        draw = uniform_hash(*keys, torch.ones_like(level))
        return slot, torch.exp(CANDIDATE_SHARPNESS * (draw - 1)) * valid

    @torch.no_grad()
    def update(self, statistics: QuantizerStatistics) -> None:
        """Move the codebooks by the summed statistics of one whole global batch.

        A code whose moving use falls below `dead_code_usage` times the average use of its codebook
        is replaced by a candidate. Deterministic: ranks with the same statistics stay equal. A
        batch without any frame, or with a latent that is not finite, changes nothing.
        """
        is_finite = statistics.sums.isfinite().all() & statistics.candidate_sums.isfinite().all()
        has_frames = (statistics.counts.sum(1) > 0)[:, None] & is_finite
        level = torch.arange(self.num_codebooks, device=self.codebooks.device)[:, None]
        is_filled, is_next = level < self.num_filled, level == self.num_filled
        counts = self.ema_counts.lerp(statistics.counts, 1 - self.ema_decay) * is_filled
        sums = self.ema_sums.lerp(statistics.sums, 1 - self.ema_decay) * is_filled[:, :, None]
        is_dead = is_filled & (counts < self.dead_code_usage * counts.mean(1, keepdim=True))
        # The n-th dead code takes the n-th slot in use; without one it stays as it is.
        in_use = statistics.candidate_weights > 0
        order = (~in_use).to(torch.int8).argsort(dim=1, stable=True)
        vectors = statistics.candidate_sums / statistics.candidate_weights[:, :, None].clamp(
            min=torch.finfo(torch.float32).tiny
        )
        is_dead = (is_dead | is_next) & has_frames
        place = (is_dead.cumsum(1) - 1).clamp(min=0)
        source = order.gather(1, place)
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
    """Return the index [...] of the vector of codebook [V, d] nearest to each latent [..., d]."""
    with torch.autocast(latents.device.type, enabled=False):
        # |x - e|^2 without |x|^2, which is the same for all codes.
        similarity = 2 * latents @ codebook.T - codebook.square().sum(-1)
    return similarity.argmax(-1)


def count_codes(codes: Tensor, valid: Tensor, codebook_size: int) -> Tensor:
    """Return how often each code occurs, [K, V] fp32, in codes [B, T, K] where `valid` is true."""
    index = codes.permute(2, 0, 1).flatten(1)
    counts = torch.zeros(len(index), codebook_size, device=codes.device)
    return counts.scatter_add_(1, index, valid.float().flatten().expand_as(index).contiguous())


def code_perplexity(counts: Tensor) -> Tensor:
    """Return the perplexity [K] of the code distribution of counts [K, V]; at most V."""
    share = counts.double() / counts.double().sum(1, keepdim=True).clamp(min=1)
    return torch.special.entr(share).sum(1).exp().float()
