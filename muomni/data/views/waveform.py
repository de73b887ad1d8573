"""Audio clips without text, for models that reconstruct speech: crops of one length."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from muomni.config.models import FRAME_SUBSAMPLING, MEL_HOP, MEL_RATE_HZ, SAMPLE_RATE_HZ
from muomni.data.media.audio import draw_seed, mel_frames, pad_waveforms, read_audio
from muomni.data.sampling.lengths import Lengths
from muomni.data.shards.source import Source
from muomni.data.views.base import Batch, View

CODE_HOP = MEL_HOP * FRAME_SUBSAMPLING


@dataclass(frozen=True, slots=True)
class Crop:
    """A piece of an audio clip, and the seed of what is drawn for it on the device."""

    waveform: np.ndarray
    seed: int


class WaveformView(View[Crop]):
    """Crops of `crop_s` seconds (rounded to whole code frames): at a random place in training, from
    the middle in evaluation. A shorter audio clip is taken whole.

    Batches hold waveform [B, N], lengths [B] in samples and seeds [B]; N is the same in all.
    """

    unit = "audio_s"
    augments = True

    def __init__(self, crop_s: float) -> None:
        self.num_samples = max(1, round(crop_s * SAMPLE_RATE_HZ / CODE_HOP)) * CODE_HOP

    def lengths(self, source: Source) -> Lengths:
        longest = self.num_samples * MEL_RATE_HZ // SAMPLE_RATE_HZ
        return mel_frames(source).clipped(1, longest)

    def example(self, sample: dict[str, Any], random: np.random.Generator | None) -> Crop:
        waveform = read_audio(sample)
        spare = max(0, len(waveform) - self.num_samples)
        start = spare // 2 if random is None else int(random.integers(spare + 1))
        return Crop(waveform[start : start + self.num_samples], draw_seed(random))

    def collate(self, rows: list[list[Crop]]) -> Batch:
        # A row whose sample was broken stays, with length zero, so that shapes do not change.
        crops = [row[0] if row else _EMPTY for row in rows] or [_EMPTY]
        waveform, lengths = pad_waveforms([crop.waveform for crop in crops], self.num_samples)
        return {
            "waveform": waveform,
            "lengths": lengths,
            "seeds": torch.tensor([crop.seed for crop in crops]),
            "units": lengths.sum().float() / SAMPLE_RATE_HZ,
        }


_EMPTY = Crop(np.zeros(0, dtype=np.float32), 0)
