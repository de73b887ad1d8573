"""Encodes conversations as token sequences with media placeholders and loss targets.

    <bos> [<system> text] <user> content ... <assistant> answer <eos> <user> ... <assistant> ... <eos>

An image in the content is <image_start> + P x <image> + <image_end>, an audio clip <audio_start> +
N x <audio> + <audio_end>; the model replaces the P or N embeddings with media features. Only the text of
an answer and its EOS are predicted. An audio clip in an answer is the spoken answer: it takes no position.
Training, evaluation, and inference share this template, so their prompts are identical.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from muomni.config.models import FRAME_SUBSAMPLING, MEL_HOP, OmniConfig
from muomni.data.media.audio import augmentation_seed, decode_declared_length, resampled_length
from muomni.data.media.image import decode_image
from muomni.data.text.tokenizer import Tokenizer
from muomni.data.text.turns import Part, Turn, find_medium
from muomni.errors import DataError


@dataclass(frozen=True, slots=True)
class PlacedImage:
    """An image, uint8 [3, S, S], and the position of its first <image> token."""

    pixels: np.ndarray
    start: int


@dataclass(frozen=True, slots=True)
class PlacedAudio:
    """An audio clip, float32 [num_samples], at the `num_tokens` positions from `start`.

    `seed` seeds its augmentation on the device.
    """

    waveform: np.ndarray
    start: int
    num_tokens: int
    seed: int


@dataclass(frozen=True, slots=True)
class SpokenAnswer:
    """Audio, float32 [num_samples], of an answer whose text has the `num_tokens` positions from `start`.

    `seed` seeds the Talker's dropout.
    """

    waveform: np.ndarray
    start: int
    num_tokens: int
    seed: int


@dataclass(slots=True)
class Conversation:
    """Token ids with media. `answers[i]` is n if ids[i] belongs to the n-th answer (from 1), else 0."""

    ids: list[int]
    answers: list[int] = field(default_factory=list)
    images: list[PlacedImage] = field(default_factory=list)
    audios: list[PlacedAudio] = field(default_factory=list)
    spoken: list[SpokenAnswer] = field(default_factory=list)


class ConversationEncoder:
    """Applies the template with one tokenizer and the sizes of one model."""

    def __init__(self, tokenizer: Tokenizer, config: OmniConfig) -> None:
        self.tokenizer = tokenizer
        self.image_size = config.vision_encoder.image_size
        self.num_image_tokens = config.num_image_tokens
        self.audio_stack = config.audio_stack

    @property
    def depends_on(self) -> str:
        """Everything besides the sample that determines its number of positions."""
        return (
            f"conversation tokenizer={self.tokenizer.digest} image={self.num_image_tokens} "
            f"audio={self.audio_stack}"
        )

    def num_positions(
        self, turns: Sequence[Turn], media: Mapping[str, bytes], max_positions: int
    ) -> int:
        """Positions of `encode` with the same arguments, without decoding media.

        Raises DataError as `encode` does, except for broken images.
        """
        return len(self._truncated(turns, media, max_positions)[0]) - 1

    def encode(
        self,
        turns: Sequence[Turn],
        media: Mapping[str, bytes],
        max_positions: int,
        random: np.random.Generator | None = None,
    ) -> Conversation:
        """Encode a conversation up to its last answer that fits into `max_positions`.

        `random` generates the seeds of the audio clips; without it (in evaluation) they are 0.
        Raises DataError if there is no answer, none fits, or a medium is missing or broken.
        """
        ids, answers, turns = self._truncated(turns, media, max_positions)
        conversation = Conversation(ids, answers)
        self._place_media(conversation, turns, media, random)
        return conversation

    def prompt(self, turns: Sequence[Turn], media: Mapping[str, bytes]) -> Conversation:
        """Encode turns, followed by the <assistant> token; raises DataError as `encode` does."""
        conversation = Conversation(*self._prompt_ids(turns, media))
        self._place_media(conversation, turns, media)
        return conversation

    def num_prompt_positions(self, turns: Sequence[Turn], media: Mapping[str, bytes]) -> int:
        """Positions of `prompt` with the same arguments, without decoding media; raises DataError."""
        return len(self._prompt_ids(turns, media)[0])

    # -- template ----------------------------------------------------------------------------------
    def _prompt_ids(
        self, turns: Sequence[Turn], media: Mapping[str, bytes]
    ) -> tuple[list[int], list[int]]:
        """Ids and answer numbers of turns, followed by the <assistant> token."""
        ids, answers = [self.tokenizer.bos_id], [0]
        for turn in turns:
            self._append(turn, media, ids, answers)
        return [*ids, self.tokenizer.assistant_id], [*answers, 0]

    def _truncated(
        self, turns: Sequence[Turn], media: Mapping[str, bytes], max_positions: int
    ) -> tuple[list[int], list[int], Sequence[Turn]]:
        """Ids and answer numbers of the longest prefix of turns that ends with an answer and fits."""
        ids, answers = [self.tokenizer.bos_id], [0]
        # The last id is only a target, so it takes no position.
        num_turns = num_ids = num_needed = 0
        for number, turn in enumerate(turns, start=1):
            self._append(turn, media, ids, answers)
            if turn.role == "assistant":
                num_needed = num_needed or len(ids) - 1
                if len(ids) - 1 <= max_positions:
                    num_turns, num_ids = number, len(ids)
        if not num_needed:
            raise DataError("the conversation has no assistant turn")
        if not num_turns:
            raise DataError(
                f"the first answer ends at position {num_needed}, but a sequence has {max_positions} "
                f"positions; raise batch.seq_len or remove the conversation"
            )
        return ids[:num_ids], answers[:num_ids], turns[:num_turns]

    def _append(
        self, turn: Turn, media: Mapping[str, bytes], ids: list[int], answers: list[int]
    ) -> None:
        role_ids = {
            "system": self.tokenizer.system_id,
            "user": self.tokenizer.user_id,
            "assistant": self.tokenizer.assistant_id,
        }
        ids.append(role_ids[turn.role])
        answers.append(0)
        if turn.role == "assistant":
            text = self.answer_ids(turn)
            ids += [*text, self.tokenizer.eos_id]
            answers += [max(answers) + 1] * (len(text) + 1)
            return
        for part in turn.parts:
            ids += self._part_ids(part, media)
        answers += [0] * (len(ids) - len(answers))

    def answer_ids(self, turn: Turn) -> list[int]:
        """Token ids of the text of an assistant turn; raises DataError if it has none."""
        text = " ".join(part.value for part in turn.parts if part.kind == "text")
        if any(part.kind == "image" for part in turn.parts):
            raise DataError("an answer contains an image; answers are text or speech")
        ids = self.tokenizer.encode(text)
        if not ids:
            raise DataError("an answer has no text (a spoken answer needs its transcript)")
        return ids

    def _part_ids(self, part: Part, media: Mapping[str, bytes]) -> list[int]:
        token = self.tokenizer
        if part.kind == "text":
            return token.encode(part.value)
        data = find_medium(media, part.value)
        if part.kind == "image":
            inner = [token.image_id] * self.num_image_tokens
            return [token.image_start_id, *inner, token.image_end_id]
        with _error_prefix(part):
            num_samples = resampled_length(data)
        inner = [token.audio_id] * self.num_audio_tokens(num_samples)
        return [token.audio_start_id, *inner, token.audio_end_id]

    def num_audio_tokens(self, num_samples: int) -> int:
        """Thinker positions of an audio clip with `num_samples` samples at 16 kHz."""
        num_mel = math.ceil(num_samples / MEL_HOP)
        return math.ceil(math.ceil(num_mel / FRAME_SUBSAMPLING) / self.audio_stack)

    # -- media -------------------------------------------------------------------------------------
    def _place_media(
        self,
        conversation: Conversation,
        turns: Sequence[Turn],
        media: Mapping[str, bytes],
        random: np.random.Generator | None = None,
    ) -> None:
        """Decode the media of `turns` and assign them to their placeholders, in order of the ids."""
        ids, token = conversation.ids, self.tokenizer
        starts = iter(
            i + 1 for i, t in enumerate(ids) if t in (token.image_start_id, token.audio_start_id)
        )
        answer = 0
        spoken: list[tuple[np.ndarray, int, int]] = []
        for turn in turns:
            answer += turn.role == "assistant"
            for part in turn.parts:
                if part.kind == "text":
                    continue
                data = find_medium(media, part.value)
                if part.kind == "image":
                    with _error_prefix(part):
                        pixels = decode_image(data, self.image_size)
                    conversation.images.append(PlacedImage(pixels, next(starts)))
                    continue
                with _error_prefix(part):
                    waveform = decode_declared_length(data)
                if turn.role == "assistant":
                    start = conversation.answers.index(answer)
                    num_tokens = len(self.answer_ids(turn))
                    spoken.append((waveform, start, num_tokens))
                else:
                    num_tokens = self.num_audio_tokens(len(waveform))
                    placed = PlacedAudio(
                        waveform, next(starts), num_tokens, augmentation_seed(random)
                    )
                    conversation.audios.append(placed)
        for waveform, start, num_tokens in spoken:
            seed = augmentation_seed(random)
            conversation.spoken.append(SpokenAnswer(waveform, start, num_tokens, seed))


@contextmanager
def _error_prefix(part: Part) -> Iterator[None]:
    """Prefix the message of a DataError with the name of the medium."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{part.value}: {error}") from None
