"""Text, spelled, with the audio clip that speaks it, for the Talker; batched by duration."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from muomni.config.models import SAMPLE_RATE_HZ
from muomni.data.media.audio import mel_frames, pad_waveforms, read_audio
from muomni.data.sampling.lengths import Lengths
from muomni.data.shards.source import Source
from muomni.data.text.tokenizer import Spelling, Tokenizer
from muomni.data.views.base import Batch, View
from muomni.data.views.characters import pad_spelled
from muomni.errors import DataError


@dataclass(frozen=True, slots=True)
class SpokenText:
    """Token ids of a text, without BOS and EOS, and its audio clip, float32 [num_samples]."""

    ids: list[int]
    spelling: Spelling
    waveform: np.ndarray


class TtsView(View[SpokenText]):
    """Batches `text_ids`, `character_ids`, `text_mask` [B, Tl], `waveform` [B, N], `lengths` [B] in samples.

    Each character of a text has a place, with the token that it belongs to (see `Talker`).
    Lengths for the plan are mel frames. A batch without a usable sample has one empty row.
    """

    unit = "audio_s"

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def lengths(self, source: Source) -> Lengths:
        return mel_frames(source)

    def example(self, sample: dict[str, Any], random: np.random.Generator | None) -> SpokenText:
        key = sample["__key__"]
        if "txt" not in sample:
            raise DataError(f"sample '{key}' has no text (.txt)")
        try:
            ids = self.tokenizer.encode(sample["txt"].decode("utf-8"))
        except UnicodeDecodeError:
            raise DataError(f"the text of sample '{key}' is not UTF-8") from None
        if not ids:
            raise DataError(f"the text of sample '{key}' is empty")
        return SpokenText(ids, self.tokenizer.spell(ids), read_audio(sample))

    def collate(self, rows: list[list[SpokenText]]) -> Batch:
        examples = [example for row in rows for example in row]
        spelled = [(example.ids, example.spelling) for example in examples]
        waveform, lengths = pad_waveforms([example.waveform for example in examples])
        return {
            **pad_spelled(spelled, self.tokenizer.pad_id),
            "waveform": waveform,
            "lengths": lengths,
            "units": lengths.sum().float() / SAMPLE_RATE_HZ,
        }
