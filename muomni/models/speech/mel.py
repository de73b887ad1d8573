"""Waveform to log-mel spectrogram in fp32, the same for a padded batch and single samples.

Frame t is centered on sample t * hop; samples outside the audio clip are zero, so N samples give
ceil(N / hop) frames. Mel filters follow Slaney's scale and unit-area norm (Slaney, Auditory Toolbox,
1998): HTK filters below 500 Hz would be narrower than a bin of a 512-point FFT. Values are natural
logarithms of mel *magnitudes*, floored at `LOG_FLOOR`.

There are no parameters or buffers: filters and window are built in fp32 on the device of the input and
cached, so that casting the model to fp16 or bf16 cannot change them.
"""

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from muomni.config.models import SAMPLE_RATE_HZ, MelConfig
from muomni.models.layers.blocks import full_precision
from muomni.models.layers.flops import Flops

MAGNITUDE_FLOOR = 1e-5
LOG_FLOOR = math.log(MAGNITUDE_FLOOR)
# Approximate mean and standard deviation of the log-mel of speech; constant, so invertible.
SPEECH_LOG_MEAN = -4.5
SPEECH_LOG_STD = 2.5


@lru_cache(maxsize=16)
def mel_filters(config: MelConfig, device: torch.device) -> Tensor:
    """Return the mel filter bank [num_fft // 2 + 1, num_mels] in fp32 on `device`."""
    from torchaudio.functional import melscale_fbanks

    # A tensor created in inference mode could not be used in training.
    with torch.inference_mode(False):
        filters = melscale_fbanks(
            config.num_fft // 2 + 1,
            f_min=config.min_hz,
            f_max=config.max_hz,
            n_mels=config.num_mels,
            sample_rate=SAMPLE_RATE_HZ,
            norm="slaney",
            mel_scale="slaney",
        )
        return filters.to(device=device, dtype=torch.float32)


@lru_cache(maxsize=16)
def hann_window(num_fft: int, device: torch.device) -> Tensor:
    """Return the periodic Hann window [num_fft] in fp32 on `device`."""
    with torch.inference_mode(False):
        return torch.hann_window(num_fft, dtype=torch.float32, device=device)


def length_mask(lengths: Tensor, num_positions: int) -> Tensor:
    """Return a boolean mask [B, num_positions] that is True before each length [B]."""
    positions = torch.arange(num_positions, device=lengths.device)
    return positions[None, :] < lengths[:, None]


def num_mel_frames(num_samples: Tensor, hop: int) -> Tensor:
    """Return the number of mel frames for `num_samples` samples."""
    return (num_samples + hop - 1) // hop


class LogMel(nn.Module):
    """Log-mel spectrogram of a padded batch of 16 kHz audio clips."""

    def __init__(self, config: MelConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, waveform: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Return log-mel [B, T, num_mels] in fp32 and its frame lengths [B].

        `waveform` is [B, N] in any float dtype, `lengths` [B] counts samples. Samples beyond a length
        are ignored; frames beyond a frame length hold `LOG_FLOOR` (silence).
        """
        config = self.config
        with torch.no_grad(), full_precision(waveform):
            num_frames = -(-waveform.shape[1] // config.hop)
            signal = waveform.float() * length_mask(lengths, waveform.shape[1])
            # Half a window of zeros on both sides of a multiple of the hop.
            tail = num_frames * config.hop - waveform.shape[1]
            margin = config.num_fft // 2
            signal = F.pad(signal, (margin, margin + tail))
            spectrum = torch.stft(
                signal,
                config.num_fft,
                hop_length=config.hop,
                window=hann_window(config.num_fft, signal.device),
                center=False,
                return_complex=True,
            )
            magnitude = spectrum.abs()[:, :, :num_frames].transpose(1, 2)
            mel = magnitude @ mel_filters(config, signal.device)  # pyright: ignore[reportArgumentType]
            log_mel = mel.clamp(min=MAGNITUDE_FLOOR).log()
            frame_lengths = num_mel_frames(lengths, config.hop)
            valid = length_mask(frame_lengths, num_frames)
            return log_mel.masked_fill(~valid[:, :, None], LOG_FLOOR), frame_lengths

    def flops(self) -> Flops:
        """FLOPs of the filter bank per frame; the FFT is not counted."""
        return Flops(2 * (self.config.num_fft // 2 + 1) * self.config.num_mels)


def normalize_per_utterance(log_mel: Tensor, frame_lengths: Tensor) -> Tensor:
    """Normalize each mel channel of each utterance to zero mean and unit variance.

    Takes and returns [B, T, num_mels] fp32; frames beyond the length become zero. This removes gain and
    microphone coloration. Not invertible.
    """
    valid = length_mask(frame_lengths, log_mel.shape[1])[:, :, None]
    num_valid = frame_lengths.clamp(min=1)[:, None, None]
    mean = (log_mel * valid).sum(1, keepdim=True) / num_valid
    centered = (log_mel - mean) * valid
    variance = centered.square().sum(1, keepdim=True) / num_valid
    # The floor avoids a division by zero for one frame or silence.
    return centered / (variance.sqrt() + 1e-2)


def normalize_fixed(log_mel: Tensor, frame_lengths: Tensor) -> Tensor:
    """Normalize [B, T, num_mels] by constants; frames beyond the length become zero."""
    valid = length_mask(frame_lengths, log_mel.shape[1])[:, :, None]
    return (log_mel - SPEECH_LOG_MEAN) / SPEECH_LOG_STD * valid


def denormalize_fixed(normalized: Tensor) -> Tensor:
    """Invert `normalize_fixed`, except on padding."""
    return normalized * SPEECH_LOG_STD + SPEECH_LOG_MEAN
