"""Speech codec: log-mel at 100 Hz <-> K codes per frame at 25 Hz.

A convolutional encoder halves the frame rate twice, a residual quantizer turns each frame into K codes,
and a mirrored decoder reconstructs the mel spectrogram (van den Oord et al., 2017; residual codebooks
after Zeghidour et al., 2021). Every layer zeroes padding, so a padded batch gives the same result as
single audio clips. The quantizer's codebooks are buffers that the trainer updates (see `quantizer.py`).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from muomni.config.models import FRAME_SUBSAMPLING, CodecConfig
from muomni.models.layers.blocks import BlockRunner
from muomni.models.layers.flops import Flops, module_flops
from muomni.models.speech.mel import (
    LOG_FLOOR,
    LogMel,
    denormalize_fixed,
    length_mask,
    normalize_fixed,
)
from muomni.models.speech.quantizer import QuantizerStatistics, ResidualQuantizer

KERNEL = 5
DOWN_KERNEL = 4
# The squared error penalizes large errors; the absolute error is the metric.
SQUARE_ERROR_WEIGHT = 0.2


class CodecOutput(NamedTuple):
    """Output of a training or validation pass over T mel frames, Tf = ceil(T / 4) code frames.

    A tuple, because ZeRO-3 finds the tensors for its backward hooks in tuples.
    """

    mel: Tensor  # [B, T, num_mels] fp32: the decoder's log-mel, in natural-log units
    target: Tensor  # [B, T, num_mels] fp32
    mel_lengths: Tensor  # [B]
    codes: Tensor  # [B, Tf, K]
    code_lengths: Tensor  # [B]
    commitment: Tensor  # fp32 scalar: sum over code frames and codebooks
    statistics: QuantizerStatistics | None  # for `quantizer.update`; in training mode only


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of each frame of [B, C, T], in fp32."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.float(), self.bias.float()
        y = F.layer_norm(x.transpose(1, 2).float(), self.normalized_shape, weight, bias, self.eps)
        return y.transpose(1, 2).to(x.dtype)


class ResidualConv(nn.Module):
    """x + conv1x1(gelu(conv5(norm(x)))) on [B, C, T], zero on padding."""

    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(channels)
        self.wide = nn.Conv1d(
            channels, channels, KERNEL, padding=dilation * (KERNEL // 2), dilation=dilation
        )
        self.mix = nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Take x [B, C, T] and mask [B, 1, T]; return [B, C, T]."""
        y = self.norm(x) * mask
        return (x + self.mix(F.gelu(self.wide(y)))) * mask


class MelEncoder(BlockRunner):
    """Normalized log-mel [B, T, num_mels] -> latents [B, T / 4, latent_size]."""

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.stem = nn.Conv1d(config.mel.num_mels, hidden, KERNEL, padding=KERNEL // 2)
        self.down = nn.ModuleList(
            nn.Conv1d(hidden, hidden, DOWN_KERNEL, stride=2, padding=1) for _ in range(2)
        )
        self.blocks = nn.ModuleList(
            ResidualConv(hidden, dilation=2**i) for i in range(config.num_blocks)
        )
        self.norm = ChannelNorm(hidden)
        self.out = nn.Conv1d(hidden, config.latent_size, 1)

    def forward(self, mel: Tensor, mel_lengths: Tensor) -> Tensor:
        dtype = self.stem.weight.dtype
        x = self.stem(mel.transpose(1, 2).to(dtype))
        # A valid code frame covers a full group of 4 mel frames.
        code_lengths = num_code_frames(mel_lengths)
        for i, down in enumerate(self.down):
            x = down(F.gelu(x) * frame_mask(code_lengths, x.shape[2], 4 >> i, dtype))
        mask = frame_mask(code_lengths, x.shape[2], 1, dtype)
        x = x * mask
        for index, block in enumerate(self.blocks):
            x = self.run_block(index, block, x, mask)
        return self.out(self.norm(x)).transpose(1, 2)

    def flops(self) -> Flops:
        """FLOPs per code frame."""
        flops = self.block_flops([1] * len(self.blocks))
        flops += module_flops(self.stem, 4, is_first=True) + module_flops(self.out)
        return flops + module_flops(self.down[0], 2) + module_flops(self.down[1])


class MelDecoder(BlockRunner):
    """Latents [B, Tf, latent_size] -> normalized log-mel [B, 4 * Tf, num_mels]."""

    block_lists = ("blocks", "smooth")

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.stem = nn.Conv1d(config.latent_size, hidden, KERNEL, padding=KERNEL // 2)
        self.blocks = nn.ModuleList(
            ResidualConv(hidden, dilation=2**i) for i in range(config.num_blocks)
        )
        # A pointwise convolution that doubles each frame has no overlap artifacts.
        self.up = nn.ModuleList(nn.Conv1d(hidden, 2 * hidden, 1) for _ in range(2))
        self.smooth = nn.ModuleList(ResidualConv(hidden, dilation=1) for _ in range(2))
        self.norm = ChannelNorm(hidden)
        self.out = nn.Conv1d(hidden, config.mel.num_mels, 1)

    def forward(self, latents: Tensor, code_lengths: Tensor) -> Tensor:
        dtype = self.stem.weight.dtype
        mask = frame_mask(code_lengths, latents.shape[1], 1, dtype)
        x = self.stem(latents.transpose(1, 2).to(dtype) * mask) * mask
        for index, block in enumerate(self.blocks):
            x = self.run_block(index, block, x, mask)
        for i, (up, smooth) in enumerate(zip(self.up, self.smooth, strict=True)):
            x = double_frames(up(x))
            mask = frame_mask(code_lengths, x.shape[2], 2 << i, dtype)
            x = self.run_block(len(self.blocks) + i, smooth, x, mask)
        return self.out(self.norm(x)).transpose(1, 2)

    def flops(self) -> Flops:
        """FLOPs per code frame; the last blocks run at twice and four times its rate."""
        flops = self.block_flops([1] * len(self.blocks) + [2, 4])
        flops += module_flops(self.stem) + module_flops(self.out, 4)
        return flops + module_flops(self.up[0]) + module_flops(self.up[1], 2)


class Codec(nn.Module):
    """Audio clips <-> codes; `forward` is the training pass."""

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        self.config = config
        self.log_mel = LogMel(config.mel)
        self.encoder = MelEncoder(config)
        self.quantizer = ResidualQuantizer(
            config.num_codebooks,
            config.codebook_size,
            config.latent_size,
            config.ema_decay,
            config.dead_code_usage,
        )
        self.decoder = MelDecoder(config)

    def forward(
        self, waveform: Tensor, lengths: Tensor, seeds: Tensor | None = None
    ) -> CodecOutput:
        """Reconstruct audio clips [B, N] with sample counts `lengths` [B].

        Training mode needs `seeds` [B] int64, independent of the batch, to sample candidates for dead
        codes.
        """
        target, mel_lengths = self.log_mel(waveform, lengths)
        latents, code_lengths = self._encode_mel(target, mel_lengths)
        valid = length_mask(code_lengths, latents.shape[1])
        quantized = self.quantizer(latents, valid, seeds)
        mel = self.decoder(quantized.quantized, code_lengths)[:, : target.shape[1]]
        return CodecOutput(
            mel=denormalize_fixed(mel.float()),
            target=target,
            mel_lengths=mel_lengths,
            codes=quantized.codes,
            code_lengths=code_lengths,
            commitment=quantized.commitment,
            statistics=quantized.statistics,
        )

    @torch.no_grad()
    def encode(self, waveform: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Return codes [B, Tf, K] int64 (zero on padding) and code lengths [B]."""
        mel, mel_lengths = self.log_mel(waveform, lengths)
        latents, code_lengths = self._encode_mel(mel, mel_lengths)
        codes = self.quantizer.encode(latents, length_mask(code_lengths, latents.shape[1]))
        return codes, code_lengths

    @torch.no_grad()
    def decode(self, codes: Tensor, code_lengths: Tensor | None = None) -> Tensor:
        """Decode codes [B, Tf, K] to log-mel [B, 4 * Tf, num_mels] fp32.

        Frames beyond `code_lengths` (default: none) hold the log floor, silence.
        """
        if code_lengths is None:
            code_lengths = torch.full(codes.shape[:1], codes.shape[1], device=codes.device)
        mel = denormalize_fixed(
            self.decoder(self.quantizer.decode(codes), code_lengths).float()
        ).clamp(min=LOG_FLOOR)
        valid = length_mask(code_lengths * FRAME_SUBSAMPLING, mel.shape[1])
        return mel.masked_fill(~valid[:, :, None], LOG_FLOOR)

    def flops(self) -> dict[str, Flops]:
        """FLOPs per mel frame, per encoded code frame, and per decoded code frame."""
        search = 2 * self.quantizer.codebooks.numel()
        return {
            "mel_frames": self.log_mel.flops(),
            "encoded": self.encoder.flops() + Flops(search),
            "decoded": self.decoder.flops(),
        }

    def _encode_mel(self, mel: Tensor, mel_lengths: Tensor) -> tuple[Tensor, Tensor]:
        normalized = normalize_fixed(mel, mel_lengths)
        # Pad to groups of four frames, so that every code frame sees four.
        normalized = F.pad(normalized, (0, 0, 0, -mel.shape[1] % FRAME_SUBSAMPLING))
        return self.encoder(normalized, mel_lengths), num_code_frames(mel_lengths)


def num_code_frames(mel_lengths: Tensor) -> Tensor:
    """Return the number of code frames for `mel_lengths` mel frames."""
    return (mel_lengths + FRAME_SUBSAMPLING - 1) // FRAME_SUBSAMPLING


def frame_mask(
    code_lengths: Tensor, num_frames: int, frames_per_code: int, dtype: torch.dtype
) -> Tensor:
    """Return the mask [B, 1, num_frames] of the frames that belong to valid code frames."""
    return length_mask(code_lengths * frames_per_code, num_frames)[:, None, :].to(dtype)


def double_frames(x: Tensor) -> Tensor:
    """Turn channels into time: [B, 2C, T] -> [B, C, 2T]."""
    batch, channels, num_frames = x.shape
    halves = x.reshape(batch, 2, channels // 2, num_frames)
    return halves.permute(0, 2, 3, 1).reshape(batch, channels // 2, 2 * num_frames)


def codec_loss(output: CodecOutput) -> tuple[dict[str, Tensor], dict[str, Tensor], dict]:
    """Return ({term: sum}, {term: weight}, logs) of the terms reconstruction and commitment.

    Reconstruction is the absolute plus a small squared log-mel error, averaged over channels and summed
    over valid mel frames (its weight). Commitment is summed over code frames (its weight) and codebooks.
    Logs are pairs [sum, weight]; `mel_l1` is in natural-log units.
    """
    valid = length_mask(output.mel_lengths, output.mel.shape[1])
    error = (output.mel - output.target) * valid[:, :, None]
    absolute = error.abs().mean(-1).sum()
    square = error.square().mean(-1).sum()
    num_mel, num_codes = output.mel_lengths.sum().float(), output.code_lengths.sum().float()
    losses = {
        "reconstruction": absolute + SQUARE_ERROR_WEIGHT * square,
        "commitment": output.commitment,
    }
    logs = {
        "mel_l1": torch.stack([absolute.detach(), num_mel]),
        "commitment": torch.stack([output.commitment.detach(), num_codes]),
    }
    return losses, {"reconstruction": num_mel, "commitment": num_codes}, logs


def mean_mel_l1(log_mel: Tensor, mel_lengths: Tensor, mean_mel: Tensor) -> Tensor:
    """Return [sum, weight] of the `mel_l1` of predicting `mean_mel` [num_mels] everywhere.

    This is the baseline that a codec has to beat.
    """
    valid = length_mask(mel_lengths, log_mel.shape[1])
    error = (log_mel - mean_mel).abs().mean(-1) * valid
    return torch.stack([error.sum(), mel_lengths.sum().float()])
