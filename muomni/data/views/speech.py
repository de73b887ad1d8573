"""Audio clips with transcripts, for CTC."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from muomni.config.models import SAMPLE_RATE_HZ
from muomni.data.media.audio import augmentation_seed, pad_waveforms, read_audio
from muomni.data.media.resampling import resample
from muomni.data.sampling.lengths import Lengths, mel_frames
from muomni.data.shards.source import Source
from muomni.data.text.ctc_units import CtcUnits
from muomni.data.text.sample_texts import sample_text
from muomni.data.views.base import EXACT, Batch, Padding, View
from muomni.errors import DataError

# Speed perturbation of Ko et al., 2015, "Audio Augmentation for Speech Recognition", as ratios.
SPEEDS = ((9, 10), (1, 1), (11, 10))
_SLOWEST = SPEEDS[0][1] / SPEEDS[0][0]


@dataclass(frozen=True, slots=True)
class Utterance:
    """An audio clip float32 [num_samples], its labels, and the seed of its augmentation on the device."""

    waveform: np.ndarray
    labels: list[int]
    seed: int


class SpeechView(View[Utterance]):
    """Padded batches: waveform [B, N], lengths [B] in samples, labels [B, L] padded with the
    tokenizer's pad id, label_lengths [B], seeds [B].

    Lengths are mel frames. `perturb_speed` changes the speed of training audio by 0.9, 1, or 1.1.
    """

    unit = "audio_s"
    augments = True

    def __init__(self, units: CtcUnits, perturb_speed: bool, padding: Padding = EXACT) -> None:
        self.units = units
        self.perturb_speed = perturb_speed
        self.padding = padding

    def lengths(self, source: Source) -> Lengths:
        return mel_frames(source, _SLOWEST if self.perturb_speed else 1.0)

    def example(self, sample: dict[str, Any], random: np.random.Generator | None) -> Utterance:
        labels = self.units.encode(sample_text(sample))
        if not labels:
            raise DataError(f"the transcript of sample '{sample['__key__']}' has no words")
        waveform = read_audio(sample)
        if random is not None and self.perturb_speed:
            waveform = change_speed(waveform, *SPEEDS[int(random.integers(len(SPEEDS)))])
        return Utterance(waveform, labels, augmentation_seed(random))

    def collate(self, sequences: list[list[Utterance]]) -> Batch:
        utterances = [utterance for sequence in sequences for utterance in sequence]
        waveforms = [utterance.waveform for utterance in utterances]
        waveform, lengths = pad_waveforms(waveforms, multiple=self.padding.samples)
        label_lengths = torch.tensor([len(u.labels) for u in utterances] or [0])
        width = max(1, int(label_lengths.max()))
        labels = torch.full((len(lengths), width), self.units.tokenizer.pad_id)
        for index, utterance in enumerate(utterances):
            labels[index, : len(utterance.labels)] = torch.tensor(utterance.labels)
        return {
            "waveform": waveform,
            "lengths": lengths,
            "labels": labels,
            "label_lengths": label_lengths,
            "seeds": torch.tensor([utterance.seed for utterance in utterances] or [0]),
            "units": lengths.sum().float() / SAMPLE_RATE_HZ,
        }


def change_speed(waveform: np.ndarray, numerator: int, denominator: int) -> np.ndarray:
    """Change speed and pitch of an audio clip by the factor numerator / denominator."""
    return resample(waveform[:, None], numerator, denominator)[:, 0]
