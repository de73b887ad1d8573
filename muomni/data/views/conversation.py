"""Conversations with media for supervised fine-tuning, packed into sequences.

A batch has at least one image slot, one audio slot, and one speech slot. Empty slots hold zeros, and all
their positions are the pad index, so every module runs in every micro-batch on every rank (otherwise
ZeRO-3 collectives deadlock). Positions index the B * T positions of the flattened sequences; the pad
index is B * T.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from muomni.config.models import OmniConfig
from muomni.data.media.audio import pad_waveforms
from muomni.data.sampling.lengths import Lengths, measured_lengths
from muomni.data.sampling.packing import document_starts, longest_document
from muomni.data.shards.source import Source
from muomni.data.text.chat_template import Conversation, ConversationEncoder
from muomni.data.text.tokenizer import Tokenizer
from muomni.data.text.turns import read_turns
from muomni.data.views.base import EXACT, Batch, Padding, View
from muomni.data.views.text import IGNORE
from muomni.data.views.tts import pad_characters
from muomni.errors import DataError


class ConversationView(View[Conversation]):
    """Batches of sequences of `seq_len` positions, packed with conversations.

    Keys (B sequences of T positions; I images, A audio clips, S spoken answers, each >= 1):
    `input_ids`, `labels`, `document_ids` [B, T]; `document_starts` [N] (`packing.document_starts`),
    `longest_document` (0-d, stays on the host);
    `answer_ids` [B, T], the number of the answer in the batch that a label belongs to (0 = none);
    `sees_image`, `sees_audio` [B, T], True for labels of answers after an image or audio clip;
    `images` [I, 3, side, side] uint8, `image_positions` [I, P];
    `audios` [A, N], `audio_lengths` [A] in samples, `audio_seeds` [A], `audio_positions` [A, L];
    `speech` [S, N], `speech_lengths` [S] in samples, `speech_seeds` [S], `speech_text_ids`,
    `speech_character_ids`, `speech_text_mask` [S, Tl] (`pad_characters`), and `speech_positions` [S, Tl], the
    position of the token that each character of a spoken answer belongs to.
    """

    unit = "tokens"
    augments = True

    def __init__(
        self,
        tokenizer: Tokenizer,
        config: OmniConfig,
        seq_len: int,
        padding: Padding = EXACT,
    ) -> None:
        self.encoder = ConversationEncoder(tokenizer, config)
        self.tokenizer = tokenizer
        self.seq_len = seq_len
        self.padding = padding

    def lengths(self, source: Source, num_workers: int = 1) -> Lengths:
        """Positions of each conversation, at most `seq_len`; measured by `num_workers` processes."""
        depends_on = f"{self.encoder.depends_on} context={self.seq_len}"
        measured = measured_lengths(source, self._measure, depends_on, num_workers)
        return measured.clipped(1, self.seq_len)

    def _measure(self, sample: dict[str, Any]) -> int:
        return self.encoder.num_positions(read_turns(sample), sample, self.seq_len)

    def example(self, sample: dict[str, Any], random: np.random.Generator | None) -> Conversation:
        try:
            return self.encoder.encode(read_turns(sample), sample, self.seq_len, random)
        except DataError as error:
            raise DataError(f"conversation '{sample['__key__']}': {error}") from None

    def collate(self, sequences: list[list[Conversation]]) -> Batch:
        shape = (len(sequences), self.seq_len)
        batch = {
            "input_ids": torch.full(shape, self.tokenizer.pad_id),
            "labels": torch.full(shape, IGNORE),
            "document_ids": torch.zeros(shape, dtype=torch.long),
            "answer_ids": torch.zeros(shape, dtype=torch.long),
            "sees_image": torch.zeros(shape, dtype=torch.bool),
            "sees_audio": torch.zeros(shape, dtype=torch.bool),
        }
        placed: list[tuple[int, Conversation]] = []
        num_answers = 0
        for row, conversations in enumerate(sequences):
            start = 0
            for number, conversation in enumerate(conversations, start=1):
                placed.append((row * self.seq_len + start, conversation))
                end = start + len(conversation.ids) - 1
                target = (row, slice(start, end))
                batch["input_ids"][target] = torch.tensor(conversation.ids[:-1])
                batch["document_ids"][target] = number
                _add_answers(batch, target, conversation, num_answers)
                num_answers += max(conversation.answers)
                start = end
        starts = document_starts(batch["document_ids"].numpy())
        return {
            **batch,
            **media_slots(placed, self.encoder, len(sequences) * self.seq_len, self.padding),
            **self._speech_slots(placed, len(sequences) * self.seq_len),
            "document_starts": torch.from_numpy(starts),
            "longest_document": torch.tensor(longest_document(starts)),
            "units": (batch["labels"] != IGNORE).sum().float(),
        }

    def _speech_slots(self, placed: list[tuple[int, Conversation]], pad_index: int) -> Batch:
        spoken = [(base, c, speech) for base, c in placed for speech in c.spoken]
        texts = []
        for _, conversation, speech in spoken:
            ids = conversation.ids[speech.start : speech.start + speech.num_tokens]
            texts.append((ids, self.tokenizer.characters(ids)))
        padded = pad_characters(texts, self.tokenizer.pad_id, self.padding.tokens)
        positions = torch.full(padded["text_ids"].shape, pad_index)
        for slot, ((base, _, speech), (_, characters)) in enumerate(
            zip(spoken, texts, strict=True)
        ):
            of_tokens = torch.tensor(characters.token_positions, dtype=torch.long)
            positions[slot, : len(of_tokens)] = of_tokens + base + speech.start
        waveforms, lengths = pad_waveforms(
            [speech.waveform for _, _, speech in spoken], multiple=self.padding.samples
        )
        return {
            "speech": waveforms,
            "speech_lengths": lengths,
            "speech_seeds": torch.tensor([speech.seed for _, _, speech in spoken] or [0]),
            **{f"speech_{name}": tensor for name, tensor in padded.items()},
            "speech_positions": positions,
        }


def _add_answers(
    batch: Batch, target: tuple[int, slice], conversation: Conversation, num_before: int
) -> None:
    """Write labels, answer ids, and media masks of one conversation to `target`."""
    answers = torch.tensor(conversation.answers[1:])
    ids = torch.tensor(conversation.ids[1:])
    is_answer = answers > 0
    batch["labels"][target] = torch.where(is_answer, ids, IGNORE)
    batch["answer_ids"][target] = torch.where(is_answer, answers + num_before, 0)
    positions = torch.arange(len(ids))
    for name, media in (("sees_image", conversation.images), ("sees_audio", conversation.audios)):
        if media:
            batch[name][target] = is_answer & (positions >= media[0].start)


def media_slots(
    placed: Sequence[tuple[int, Conversation]],
    encoder: ConversationEncoder,
    pad_index: int,
    padding: Padding = EXACT,
) -> Batch:
    """Image and audio slots of conversations, given with their start in the flattened sequences."""
    images = [(base + image.start, image) for base, c in placed for image in c.images]
    audios = [(base + audio.start, audio) for base, c in placed for audio in c.audios]
    side, num_tokens = encoder.image_size, encoder.num_image_tokens
    pixels = torch.zeros(max(1, len(images)), 3, side, side, dtype=torch.uint8)
    image_positions = torch.full((max(1, len(images)), num_tokens), pad_index)
    for slot, (start, image) in enumerate(images):
        pixels.numpy()[slot] = image.pixels
        image_positions[slot] = torch.arange(start, start + num_tokens)
    waveforms, lengths = pad_waveforms(
        [audio.waveform for _, audio in audios], multiple=padding.samples
    )
    width = encoder.num_audio_tokens(waveforms.shape[1])
    audio_positions = torch.full((len(waveforms), width), pad_index)
    for slot, (start, audio) in enumerate(audios):
        audio_positions[slot, : audio.num_tokens] = torch.arange(start, start + audio.num_tokens)
    return {
        "images": pixels,
        "image_positions": image_positions,
        "audios": waveforms,
        "audio_lengths": lengths,
        "audio_seeds": torch.tensor([audio.seed for _, audio in audios] or [0]),
        "audio_positions": audio_positions,
    }
