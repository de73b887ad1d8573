"""Conversations with media for supervised fine-tuning, packed into rows.

A batch always has at least one image slot, one audio slot and one speech slot; a slot that nothing
fills holds zeros and points nowhere, so that every module runs in every micro-batch on every rank
(ZeRO-3 would wait for ever otherwise). Places are positions in the flattened [rows * context] row
block; the number one past its end means nowhere.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from muomni.config.models import OmniConfig
from muomni.data.media.audio import pad_waveforms
from muomni.data.sampling.lengths import Lengths
from muomni.data.sampling.measure import measured_lengths
from muomni.data.sampling.packing import document_starts
from muomni.data.shards.source import Source
from muomni.data.text.chat_template import Conversation, ConversationEncoder
from muomni.data.text.tokenizer import Tokenizer
from muomni.data.text.turns import read_turns
from muomni.data.views.base import Batch, View
from muomni.data.views.characters import pad_spelled
from muomni.data.views.text import IGNORE
from muomni.errors import DataError


class ConversationView(View[Conversation]):
    """Rows of `context` positions, each filled with several conversations.

    Keys of a batch (R rows of T positions; I images, An audio clips, S spoken answers, each >= 1):
    `input_ids`, `labels`, `document_ids` [R, T]; `document_starts` [N] (`packing.document_starts`);
    `answer_ids` [R, T] numbers the answer that a label belongs to (0 = none) through the batch; `sees_image`,
    `sees_audio` [R, T] mark the labels of answers that follow an image or audio clip;
    `images` [I, 3, side, side] uint8, `image_places` [I, P];
    `audios` [A, N], `audio_lengths` [A] in samples, `audio_seeds` [A], `audio_places` [A, L];
    `speech` [S, N], `speech_lengths` [S], `speech_text_ids`, `speech_character_ids`, `speech_text_mask`
    [S, Tl] with a place for each character of a spoken answer, and `speech_places` [S, Tl] where its token
    stands in the rows.
    """

    unit = "tokens"
    augments = True

    def __init__(self, tokenizer: Tokenizer, config: OmniConfig, context: int, rows: int) -> None:
        self.encoder = ConversationEncoder(tokenizer, config)
        self.tokenizer = tokenizer
        self.context = context
        self.rows = rows

    def lengths(self, source: Source) -> Lengths:
        depends_on = f"{self.encoder.depends_on} context={self.context}"
        return measured_lengths(source, self._measure, depends_on).clipped(1, self.context)

    def _measure(self, sample: dict[str, Any]) -> int:
        return self.encoder.num_positions(read_turns(sample), sample, self.context)

    def example(self, sample: dict[str, Any], random: np.random.Generator | None) -> Conversation:
        try:
            return self.encoder.encode(read_turns(sample), sample, self.context, random)
        except DataError as error:
            raise DataError(f"conversation '{sample['__key__']}': {error}") from None

    def collate(self, rows: list[list[Conversation]]) -> Batch:
        shape = (self.rows, self.context)
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
        for row, conversations in enumerate(rows):
            start = 0
            for number, conversation in enumerate(conversations, start=1):
                placed.append((row * self.context + start, conversation))
                end = start + len(conversation.ids) - 1
                place = (row, slice(start, end))
                batch["input_ids"][place] = torch.tensor(conversation.ids[:-1])
                batch["document_ids"][place] = number
                _add_answers(batch, place, conversation, num_answers)
                num_answers += max(conversation.answers)
                start = end
        return {
            **batch,
            **media_slots(placed, self.encoder, self.rows * self.context),
            **self._speech_slots(placed),
            "document_starts": torch.from_numpy(document_starts(batch["document_ids"].numpy())),
            "units": (batch["labels"] != IGNORE).sum().float(),
        }

    def _speech_slots(self, placed: list[tuple[int, Conversation]]) -> Batch:
        spoken = [(base, c, speech) for base, c in placed for speech in c.spoken]
        spelled = []
        for _, conversation, speech in spoken:
            ids = conversation.ids[speech.start : speech.start + speech.num_tokens]
            spelled.append((ids, self.tokenizer.spell(ids)))
        text = pad_spelled(spelled, self.tokenizer.pad_id)
        places = torch.full(text["text_ids"].shape, self.rows * self.context)
        for slot, ((base, _, speech), (_, spelling)) in enumerate(
            zip(spoken, spelled, strict=True)
        ):
            at_tokens = torch.tensor(spelling.places, dtype=torch.long) + base + speech.start
            places[slot, : len(at_tokens)] = at_tokens
        waveforms, lengths = pad_waveforms([speech.waveform for _, _, speech in spoken])
        return {
            "speech": waveforms,
            "speech_lengths": lengths,
            **{f"speech_{name}": tensor for name, tensor in text.items()},
            "speech_places": places,
        }


def _add_answers(
    batch: Batch, place: tuple[int, slice], conversation: Conversation, num_before: int
) -> None:
    """Labels of one conversation, which answer each belongs to and which media that has seen."""
    answers = torch.tensor(conversation.answers[1:])
    ids = torch.tensor(conversation.ids[1:])
    is_answer = answers > 0
    batch["labels"][place] = torch.where(is_answer, ids, IGNORE)
    batch["answer_ids"][place] = torch.where(is_answer, answers + num_before, 0)
    positions = torch.arange(len(ids))
    for name, media in (("sees_image", conversation.images), ("sees_audio", conversation.audios)):
        if media:
            batch[name][place] = is_answer & (positions >= media[0].start)


def media_slots(
    placed: Sequence[tuple[int, Conversation]], encoder: ConversationEncoder, nowhere: int
) -> Batch:
    """Images and audio clips of conversations that start at the given flat positions."""
    images = [(base + image.start, image) for base, c in placed for image in c.images]
    audios = [(base + audio.start, audio) for base, c in placed for audio in c.audios]
    side, num_tokens = encoder.image_size, encoder.num_image_tokens
    pixels = torch.zeros(max(1, len(images)), 3, side, side, dtype=torch.uint8)
    image_places = torch.full((max(1, len(images)), num_tokens), nowhere)
    for slot, (start, image) in enumerate(images):
        pixels.numpy()[slot] = image.pixels
        image_places[slot] = torch.arange(start, start + num_tokens)
    waveforms, lengths = pad_waveforms([audio.waveform for _, audio in audios])
    width = encoder.num_audio_tokens(waveforms.shape[1])
    audio_places = torch.full((len(waveforms), width), nowhere)
    for slot, (start, audio) in enumerate(audios):
        audio_places[slot, : audio.num_tokens] = torch.arange(start, start + audio.num_tokens)
    return {
        "images": pixels,
        "image_places": image_places,
        "audios": waveforms,
        "audio_lengths": lengths,
        "audio_seeds": torch.tensor([audio.seed for _, audio in audios] or [0]),
        "audio_places": audio_places,
    }
