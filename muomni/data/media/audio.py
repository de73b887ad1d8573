"""Decodes the audio clips of samples and pads waveforms to batches."""

import math
from typing import Any

import numpy as np
import torch

from muomni.config.models import MEL_RATE_HZ, SAMPLE_RATE_HZ
from muomni.data.media.decode import declared_length, decode_audio
from muomni.data.media.formats import only_medium
from muomni.errors import DataError

# Resampling rounds the length; a larger difference means a wrong header.
_MAX_SAMPLES_OFF = 8


def read_audio(sample: dict[str, Any]) -> np.ndarray:
    """The audio clip of a sample as float32 [num_samples], mono at `SAMPLE_RATE_HZ`.

    Raises DataError with the sample's key if the clip is missing or broken.
    """
    name, data = only_medium(sample, "audio")
    try:
        return decode_audio(data)
    except DataError as error:
        raise DataError(f"{sample['__key__']}.{name}: {error}") from None


def resampled_length(data: bytes) -> int:
    """Samples of an audio clip at `SAMPLE_RATE_HZ`, from its header if possible; raises DataError."""
    declared = declared_length(data)
    if declared is None:
        return len(decode_audio(data))
    num_samples, rate_hz, _ = declared
    return math.ceil(num_samples * SAMPLE_RATE_HZ / rate_hz)


def decode_declared_length(data: bytes) -> np.ndarray:
    """Decode an audio clip to exactly `resampled_length(data)` samples, float32 [num_samples].

    Raises DataError if it is broken or its length differs from its header.
    """
    waveform, declared = decode_audio(data), declared_length(data)
    if declared is None:
        return waveform
    num_samples = math.ceil(declared[0] * SAMPLE_RATE_HZ / declared[1])
    if abs(len(waveform) - num_samples) > _MAX_SAMPLES_OFF:
        raise DataError(
            f"broken audio clip (its header declares {num_samples} samples at 16 kHz, it has "
            f"{len(waveform)})"
        )
    return np.pad(waveform[:num_samples], (0, max(0, num_samples - len(waveform))))


def pad_waveforms(
    waveforms: list[np.ndarray], num_samples: int | None = None, multiple: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad waveforms to float32 [B, N]; returns them and their lengths [B].

    N is `num_samples`, or the length of the longest waveform, rounded up to a multiple of `multiple`. Without
    waveforms, the result is one waveform of padding with length 0, at least one mel frame: a batch without
    weight that a model can run on.
    """
    lengths = [len(waveform) for waveform in waveforms] or [0]
    longest = max(*lengths, SAMPLE_RATE_HZ // MEL_RATE_HZ)
    width = num_samples or -(-longest // multiple) * multiple
    padded = torch.zeros(len(lengths), width)
    for row, waveform in enumerate(waveforms):
        padded[row, : len(waveform)] = torch.from_numpy(waveform)
    return padded, torch.tensor(lengths)


def augmentation_seed(random: np.random.Generator | None) -> int:
    """Sample a seed for augmentation and dropout on the device; 0 without `random` (in evaluation)."""
    return 0 if random is None else int(random.integers(2**62))
