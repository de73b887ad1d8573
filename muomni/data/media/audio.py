"""Audio clips of samples: the audio member as a waveform, and padded batches of waveforms."""

from typing import Any

import numpy as np
import torch

from muomni.config.models import MEL_RATE_HZ, SAMPLE_RATE_HZ
from muomni.data.media.decode import AUDIO_EXTENSIONS, decode_audio
from muomni.data.sampling.lengths import Lengths
from muomni.data.shards.source import Source
from muomni.errors import DataError


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
