"""Speech encoder: waveform -> states at 25 Hz, with a CTC head over subwords.

Log-mel, normalized per utterance, two strided convolutions that reduce the frame rate by four, then a
bidirectional transformer with rotary positions. Every layer ignores padding, so a padded batch gives
the same result as single audio clips.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from muomni.config.models import FRAME_SUBSAMPLING, MEL_HOP, AudioEncoderConfig, SpecAugmentConfig
from muomni.models.layers.attention import Documents, StackOptions
from muomni.models.layers.counter_random import position_keys
from muomni.models.layers.flops import Flops, module_flops
from muomni.models.layers.masks import padded_starts, padding_mask
from muomni.models.layers.transformer import TransformerStack, init_weights
from muomni.models.speech.mel import LogMel, length_mask, normalize_per_utterance
from muomni.models.speech.specaugment import spec_augment


class ConvSubsampling(nn.Module):
    """Features [B, T, M] -> [B, ceil(T / 4), hidden_size] by two convolutions of stride 2."""

    def __init__(self, num_mels: int, channels: int, hidden_size: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, channels, 3, stride=2, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
        self.out = nn.Linear(channels * -(-num_mels // FRAME_SUBSAMPLING), hidden_size)

    def forward(self, features: Tensor, frame_lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Return the states and their lengths [B]; states on padding are arbitrary."""
        x = features[:, None].to(self.first.weight.dtype)
        for conv in (self.first, self.second):
            x = F.gelu(conv(x))
            frame_lengths = (frame_lengths + 1) // 2
            # The bias makes padding non-zero, which the next convolution must not see.
            x = x * length_mask(frame_lengths, x.shape[2])[:, None, :, None]
        return self.out(x.transpose(1, 2).flatten(2)), frame_lengths


class AudioEncoder(nn.Module):
    """Audio clips -> hidden states for a Thinker, and subword logits for CTC."""

    def __init__(self, config: AudioEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.log_mel = LogMel(config.mel)
        self.subsampling = ConvSubsampling(
            config.mel.num_mels, config.conv_channels, config.hidden_size
        )
        self.stack = TransformerStack(
            config,
            StackOptions(
                causal=False,
                rope_theta=config.rope_theta,
                norm_eps=config.norm_eps,
                dropout=config.dropout,
                conv_kernel_size=config.conv_kernel_size,
            ),
        )
        self.ctc_head = nn.Linear(config.hidden_size, config.vocab_size)
        init_weights(self, config.num_layers)

    def forward(
        self,
        waveform: Tensor,
        lengths: Tensor,
        seeds: Tensor | None = None,
        augmentation: SpecAugmentConfig | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return states [B, Tf, hidden_size], zero on padding, and frame lengths [B].

        `waveform` is [B, N] at 16 kHz, `lengths` [B] in samples, Tf = ceil(ceil(N / 160) / 4).
        `augmentation` applies SpecAugment. It and dropout in training depend on a seed per sample, `seeds`
        int64 [B]. Raises ValueError if they are missing.
        """
        log_mel, mel_lengths = self.log_mel(waveform, lengths)
        features = normalize_per_utterance(log_mel, mel_lengths)
        if augmentation is not None:
            if seeds is None:
                raise ValueError("SpecAugment needs a seed per sample")
            features = spec_augment(features, mel_lengths, seeds, augmentation)
        x, frame_lengths = self.subsampling(features, mel_lengths)
        valid = length_mask(frame_lengths, x.shape[1])
        for_convs = valid if self.config.conv_kernel_size else None
        keys = None
        if seeds is not None and self.training and self.config.dropout:
            keys = position_keys(seeds, torch.arange(x.shape[1], device=x.device)[None])
        if self.stack.attends_by_documents:
            documents = Documents(padded_starts(valid), valid.shape[1])
            x = self.stack(x, documents=documents, valid=for_convs, dropout_keys=keys)
        else:
            x = self.stack(x, mask=padding_mask(valid), valid=for_convs, dropout_keys=keys)
        return x * valid[:, :, None], frame_lengths

    def ctc_logits(self, hidden: Tensor) -> Tensor:
        """Return CTC logits [B, Tf, vocab_size] of states; id 0 is the blank (see `ctc.py`)."""
        return self.ctc_head(hidden)

    def flops(self) -> dict[str, Flops]:
        """FLOPs per unit of `audio_units`: frames at 100, 50, and 25 Hz, query-key pairs, CTC logits."""
        half_mels = -(-self.config.mel.num_mels // 2)
        position, pair = self.stack.flops()
        second = module_flops(self.subsampling.second, -(-half_mels // 2))
        return {
            "mel_frames": self.log_mel.flops(),
            "half_frames": module_flops(self.subsampling.first, half_mels, is_first=True),
            "frames": second + module_flops(self.subsampling.out) + position,
            "pairs": pair,
            "logits": module_flops(self.ctc_head),
        }


def num_encoder_frames(num_samples: Tensor) -> Tensor:
    """Return the number of encoder frames [B] of audio clips with `num_samples` [B] samples."""
    mel_lengths = (num_samples + MEL_HOP - 1) // MEL_HOP
    return (mel_lengths + FRAME_SUBSAMPLING - 1) // FRAME_SUBSAMPLING


def audio_units(num_samples: Tensor) -> dict[str, int]:
    """Units of `AudioEncoder.flops` in audio clips of `num_samples` [B] samples (on the CPU)."""
    mel_frames = -(-num_samples // MEL_HOP)
    half_frames = -(-mel_frames // 2)
    frames = -(-half_frames // 2)
    return {
        "mel_frames": int(mel_frames.sum()),
        "half_frames": int(half_frames.sum()),
        "frames": int(frames.sum()),
        "pairs": int(frames.square().sum()),
        "logits": int(frames.sum()),
    }
