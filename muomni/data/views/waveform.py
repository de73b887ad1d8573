"""Fixed-length crops of audio clips, for models that reconstruct speech."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from muomni.config.models import FRAME_HOP, MEL_RATE_HZ, SAMPLE_RATE_HZ
from muomni.data.media.audio import augmentation_seed, pad_waveforms, read_audio
from muomni.data.sampling.lengths import Lengths, mel_frames
from muomni.data.shards.source import Source
from muomni.data.views.base import Batch, View


@dataclass(frozen=True, slots=True)
class Crop:
    """A crop of an audio clip, float32 [num_samples], and the seed of its augmentation on the device."""

    waveform: np.ndarray
    seed: int


class WaveformView(View[Crop]):
    """Crops of `crop_s` seconds, rounded to full code frames: random in training, centered in evaluation.

    Batches: waveform [B, N], lengths [B] in samples, seeds [B]; N is constant. Shorter clips are padded.
    """

    unit = "audio_s"
    augments = True

    def __init__(self, crop_s: float) -> None:
        self.num_samples = max(1, round(crop_s * SAMPLE_RATE_HZ / FRAME_HOP)) * FRAME_HOP

    def lengths(self, source: Source) -> Lengths:
        longest = self.num_samples * MEL_RATE_HZ // SAMPLE_RATE_HZ
        return mel_frames(source).clipped(1, longest)

    def example(self, sample: dict[str, Any], random: np.random.Generator | None) -> Crop:
        waveform = read_audio(sample)
        spare = max(0, len(waveform) - self.num_samples)
        start = spare // 2 if random is None else int(random.integers(spare + 1))
        return Crop(waveform[start : start + self.num_samples], augmentation_seed(random))

    def collate(self, sequences: list[list[Crop]]) -> Batch:
        # A broken sample becomes an empty crop, so that shapes do not change.
        crops = [sequence[0] if sequence else _EMPTY for sequence in sequences] or [_EMPTY]
        waveform, lengths = pad_waveforms([crop.waveform for crop in crops], self.num_samples)
        return {
            "waveform": waveform,
            "lengths": lengths,
            "seeds": torch.tensor([crop.seed for crop in crops]),
            "units": lengths.sum().float() / SAMPLE_RATE_HZ,
        }


_EMPTY = Crop(np.zeros(0, dtype=np.float32), 0)
