"""Texts as characters with the audio clips that speak them, for the Talker."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from muomni.config.models import FRAME_HOP, FRAME_SUBSAMPLING, SAMPLE_RATE_HZ
from muomni.data.media.audio import augmentation_seed, pad_waveforms, read_audio
from muomni.data.sampling.lengths import Lengths, mel_frames
from muomni.data.shards.source import Source
from muomni.data.text.sample_texts import sample_text
from muomni.data.text.tokenizer import Characters, Tokenizer
from muomni.data.views.base import EXACT, Batch, Padding, View, round_up
from muomni.errors import DataError


@dataclass(frozen=True, slots=True)
class SpokenText:
    """Token ids (without BOS and EOS) and characters of a text, and its audio clip, float32 [num_samples].

    `seed` seeds the model's dropout.
    """

    ids: list[int]
    characters: Characters
    waveform: np.ndarray
    seed: int


class TtsView(View[SpokenText]):
    """Batches of `pad_characters` [B, Tl], `waveform` [B, N], `lengths` [B] in samples, and `seeds` [B].

    Lengths are mel frames. In training, a random silence of less than a code frame precedes each clip. A batch
    without a usable sample has one empty example.
    """

    unit = "audio_s"
    augments = True

    def __init__(self, tokenizer: Tokenizer, padding: Padding = EXACT) -> None:
        self.tokenizer = tokenizer
        self.padding = padding

    def lengths(self, source: Source) -> Lengths:
        return mel_frames(source, extra=FRAME_SUBSAMPLING)

    def example(self, sample: dict[str, Any], random: np.random.Generator | None) -> SpokenText:
        ids = self.tokenizer.encode(sample_text(sample))
        if not ids:
            raise DataError(f"the text of sample '{sample['__key__']}' is empty")
        characters, seed = self.tokenizer.characters(ids), augmentation_seed(random)
        waveform = read_audio(sample)
        if random is not None:
            # Frames that start elsewhere have other codes, so that few clips are not memorized.
            waveform = np.pad(waveform, (int(random.integers(FRAME_HOP)), 0))
        return SpokenText(ids, characters, waveform, seed)

    def collate(self, sequences: list[list[SpokenText]]) -> Batch:
        examples = [example for sequence in sequences for example in sequence]
        texts = [(example.ids, example.characters) for example in examples]
        waveforms = [example.waveform for example in examples]
        waveform, lengths = pad_waveforms(waveforms, multiple=self.padding.samples)
        return {
            **pad_characters(texts, self.tokenizer.pad_id, self.padding.tokens),
            "waveform": waveform,
            "lengths": lengths,
            "seeds": torch.tensor([example.seed for example in examples] or [0]),
            "units": lengths.sum().float() / SAMPLE_RATE_HZ,
        }


def pad_characters(
    texts: Sequence[tuple[list[int], Characters]], pad_id: int, multiple: int = 1
) -> Batch:
    """Token ids and characters of B texts as padded tensors with one position per character.

    `text_ids` [B, Tl] holds the token that each character belongs to, `character_ids` [B, Tl] the
    character, `text_mask` bool [B, Tl] is False in padding. Tl is a multiple of `multiple`. Without texts, B
    is 1 and all is padding.
    """
    width = max([len(characters.ids) for _, characters in texts], default=0)
    shape = (max(1, len(texts)), round_up(max(1, width), multiple))
    text_ids = torch.full(shape, pad_id)
    character_ids = torch.zeros(shape, dtype=torch.long)
    text_mask = torch.zeros(shape, dtype=torch.bool)
    for index, (ids, characters) in enumerate(texts):
        target = (index, slice(len(characters.ids)))
        text_ids[target] = torch.tensor(ids, dtype=torch.long)[characters.token_positions]
        character_ids[target] = torch.tensor(characters.ids, dtype=torch.long)
        text_mask[target] = True
    return {"text_ids": text_ids, "character_ids": character_ids, "text_mask": text_mask}
