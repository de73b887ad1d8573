"""Audio clips of samples: the audio member as a waveform, and padded batches of waveforms."""

import io
import math
from typing import Any

import numpy as np
import soundfile
import torch

from muomni.config.models import MEL_RATE_HZ, SAMPLE_RATE_HZ
from muomni.data.media.decode import AUDIO_EXTENSIONS, broken_audio, decode_audio
from muomni.data.sampling.lengths import Lengths
from muomni.data.shards.source import Source
from muomni.errors import DataError

# libsndfile reports at least this many frames for streams of unknown length.
_UNKNOWN_FRAMES = 2**62
# Resampling rounds the length; a larger difference means a wrong header.
_MAX_SAMPLES_OFF = 8


def read_audio(sample: dict[str, Any]) -> np.ndarray:
    """The audio clip of a sample as float32 [num_samples], mono at `SAMPLE_RATE_HZ`.

    Raises DataError that names the sample when it has none or a broken one.
    """
    for extension in AUDIO_EXTENSIONS:
        if extension in sample:
            try:
                return decode_audio(sample[extension])
            except DataError as error:
                raise DataError(f"{sample['__key__']}.{extension}: {error}") from None
    raise DataError(
        f"sample '{sample['__key__']}' has no audio clip ({', '.join(AUDIO_EXTENSIONS)})"
    )


def resampled_length(data: bytes) -> int:
    """Samples of an audio clip at `SAMPLE_RATE_HZ`, from its header if possible; raises DataError."""
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            num_frames, rate_hz = file.frames, int(file.samplerate)
    except (soundfile.SoundFileError, ValueError, OSError) as error:
        raise broken_audio(error) from None
    if not 0 < num_frames < _UNKNOWN_FRAMES:
        return len(decode_audio(data))
    return math.ceil(num_frames * SAMPLE_RATE_HZ / rate_hz)


def decode_declared_length(data: bytes) -> np.ndarray:
    """Decode an audio clip to exactly `resampled_length(data)` samples, float32 [num_samples].

    Raises DataError if it is broken or its length differs from its header.
    """
    waveform, num_samples = decode_audio(data), resampled_length(data)
    if abs(len(waveform) - num_samples) > _MAX_SAMPLES_OFF:
        raise DataError(
            f"broken audio clip (its header declares {num_samples} samples at 16 kHz, it has "
            f"{len(waveform)})"
        )
    return np.pad(waveform[:num_samples], (0, max(0, num_samples - len(waveform))))


def mel_frames(source: Source, stretch: float = 1.0) -> Lengths:
    """Mel frames of each audio clip, from the columns of the shards.

    `stretch` is the factor by which augmentation may lengthen an audio clip. Rounded up, so that no
    audio clip is longer than what is planned for it.
    """

    def read(ids: np.ndarray) -> np.ndarray:
        duration_ms = source.column("duration_ms", ids)
        frames = np.ceil((duration_ms + 0.5) * stretch * MEL_RATE_HZ / 1000)
        return np.maximum(1, frames.astype(np.int64))

    return Lengths(len(source), read, f"mel frames stretch={stretch}")


def pad_waveforms(
    waveforms: list[np.ndarray], num_samples: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Waveforms as [B, N] float32 and their lengths [B]; N is `num_samples` or the longest.

    Without any waveform the result is one of zero length in `MEL_RATE_HZ`-th of a second of
    padding: a batch that weighs nothing, but that a model can run on.
    """
    lengths = [len(waveform) for waveform in waveforms] or [0]
    width = num_samples or max(*lengths, SAMPLE_RATE_HZ // MEL_RATE_HZ)
    padded = torch.zeros(len(lengths), width)
    for row, waveform in enumerate(waveforms):
        padded[row, : len(waveform)] = torch.from_numpy(waveform)
    return padded, torch.tensor(lengths)


def draw_seed(random: np.random.Generator | None) -> int:
    """A seed for augmentation on the device: part of the sample's own stream, 0 in evaluation."""
    return 0 if random is None else int(random.integers(2**62))
