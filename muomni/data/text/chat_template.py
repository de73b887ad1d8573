"""Conversations as token sequences: the template, media placeholders, what is to be learned.

    <bos> [<system> text] <user> content ... <assistant> answer <eos> <user> ... <assistant> ... <eos>

An image in the content is <image_start> + P x <image> + <image_end>, an audio clip <audio_start> +
N x <audio> + <audio_end>; the model writes features over the P or N positions. Only the text of an
answer and its EOS are predicted. An audio clip in an answer is the spoken answer: it takes no position.
Training, evaluation and inference share this file, so they cannot see different prompts.
"""

import io
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import soundfile

from muomni.config.models import FRAME_SUBSAMPLING, MEL_HOP, SAMPLE_RATE_HZ, OmniConfig
from muomni.data.media.audio import draw_seed
from muomni.data.media.decode import broken_audio, decode_audio
from muomni.data.media.image import decode_image
from muomni.data.text.tokenizer import Tokenizer
from muomni.errors import DataError

Role = Literal["system", "user", "assistant"]
ROLES: tuple[Role, ...] = ("system", "user", "assistant")
MediaKind = Literal["image", "audio"]
MEDIA_KINDS: tuple[MediaKind, ...] = ("image", "audio")
PartKind = Literal["text", "image", "audio"]
_PLACEHOLDER = re.compile("(<image>|<audio>)")
# libsndfile reports this many frames or more for streams whose length it does not know.
_UNKNOWN_FRAMES = 2**62
# Resampling rounds the length; a larger difference means that a header lies.
_MAX_SAMPLES_OFF = 8


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of a turn: text itself, or the name of an image or audio clip in the sample."""

    kind: PartKind
    value: str


@dataclass(frozen=True, slots=True)
class Turn:
    """What one side says at once."""

    role: Role
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class PlacedImage:
    """An image, uint8 [3, S, S], and the position of its first <image> token."""

    pixels: np.ndarray
    start: int


@dataclass(frozen=True, slots=True)
class PlacedAudio:
    """An audio clip, float32 [num_samples], the `num_tokens` positions from `start` on that it fills,
    and the seed of what is drawn for it on the device.
    """

    waveform: np.ndarray
    start: int
    num_tokens: int
    seed: int


@dataclass(frozen=True, slots=True)
class SpokenAnswer:
    """The audio clip of an answer whose text stands in `num_tokens` positions from `start` on."""

    waveform: np.ndarray
    start: int
    num_tokens: int


@dataclass(slots=True)
class Conversation:
    """Token ids with media. `answers[i]` is n > 0 where ids[i] belongs to the n-th answer."""

    ids: list[int]
    answers: list[int] = field(default_factory=list)
    images: list[PlacedImage] = field(default_factory=list)
    audios: list[PlacedAudio] = field(default_factory=list)
    spoken: list[SpokenAnswer] = field(default_factory=list)


class ConversationEncoder:
    """Applies the template for one tokenizer and one model's sizes."""

    def __init__(self, tokenizer: Tokenizer, config: OmniConfig) -> None:
        self.tokenizer = tokenizer
        self.image_size = config.vision_encoder.image_size
        self.num_image_tokens = config.num_image_tokens
        self.audio_stack = config.audio_stack

    @property
    def depends_on(self) -> str:
        """What the number of positions of a conversation depends on besides its sample."""
        return (
            f"conversation tokenizer={self.tokenizer.digest} image={self.num_image_tokens} "
            f"audio={self.audio_stack}"
        )

    def num_positions(
        self, turns: Sequence[Turn], media: Mapping[str, bytes], max_positions: int
    ) -> int:
        """Row positions that `encode` of the same arguments takes; decodes no media.

        Raises DataError as `encode` does, broken images excepted.
        """
        return len(self._kept(turns, media, max_positions)[0]) - 1

    def encode(
        self,
        turns: Sequence[Turn],
        media: Mapping[str, bytes],
        max_positions: int,
        random: np.random.Generator | None = None,
    ) -> Conversation:
        """The conversation up to its last answer that still fits into a row of `max_positions`.

        `random` draws the seeds of its audio clips; None, in evaluation, gives zeros.
        Raises DataError when there is no answer, none fits, or a medium is missing or broken.
        """
        ids, answers, turns = self._kept(turns, media, max_positions)
        conversation = Conversation(ids, answers)
        self._place_media(conversation, turns, media, random)
        return conversation

    def prompt(self, turns: Sequence[Turn], media: Mapping[str, bytes]) -> Conversation:
        """The turns and the token after which the model answers; raises DataError as `encode`."""
        ids, answers = [self.tokenizer.bos_id], [0]
        for turn in turns:
            self._append(turn, media, ids, answers)
        conversation = Conversation([*ids, self.tokenizer.assistant_id], [*answers, 0])
        self._place_media(conversation, turns, media)
        return conversation

    # -- template ----------------------------------------------------------------------------------
    def _kept(
        self, turns: Sequence[Turn], media: Mapping[str, bytes], max_positions: int
    ) -> tuple[list[int], list[int], Sequence[Turn]]:
        """Ids and answer numbers of the longest fitting prefix of turns that ends with an answer."""
        ids, answers = [self.tokenizer.bos_id], [0]
        # The last id is only predicted, so it takes no position of its own.
        num_kept_turns = num_kept_ids = num_needed = 0
        for number, turn in enumerate(turns, start=1):
            self._append(turn, media, ids, answers)
            if turn.role == "assistant":
                num_needed = num_needed or len(ids) - 1
                if len(ids) - 1 <= max_positions:
                    num_kept_turns, num_kept_ids = number, len(ids)
        if not num_needed:
            raise DataError("the conversation has no answer of an assistant")
        if not num_kept_turns:
            raise DataError(
                f"the first answer ends at position {num_needed} of a row of {max_positions}; "
                f"raise batch.size or leave the conversation out"
            )
        return ids[:num_kept_ids], answers[:num_kept_ids], turns[:num_kept_turns]

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
        """Token ids of an assistant turn's text; raises DataError when it has none."""
        text = " ".join(part.value for part in turn.parts if part.kind == "text")
        if any(part.kind == "image" for part in turn.parts):
            raise DataError("an answer holds an image; only text and speech can be answered")
        ids = self.tokenizer.encode(text)
        if not ids:
            raise DataError("an answer has no text (a spoken one needs its transcript)")
        return ids

    def _part_ids(self, part: Part, media: Mapping[str, bytes]) -> list[int]:
        token = self.tokenizer
        if part.kind == "text":
            return token.encode(part.value)
        data = find_medium(media, part.value)
        if part.kind == "image":
            inner = [token.image_id] * self.num_image_tokens
            return [token.image_start_id, *inner, token.image_end_id]
        with named(part):
            num_samples = resampled_length(data)
        inner = [token.audio_id] * self.num_audio_tokens(num_samples)
        return [token.audio_start_id, *inner, token.audio_end_id]

    def num_audio_tokens(self, num_samples: int) -> int:
        """Thinker positions of an audio clip of `num_samples` samples at 16 kHz."""
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
        """Decode what the placeholders of `turns` stand for, in the order of the ids."""
        ids, token = conversation.ids, self.tokenizer
        starts = iter(
            i + 1 for i, t in enumerate(ids) if t in (token.image_start_id, token.audio_start_id)
        )
        answer = 0
        for turn in turns:
            answer += turn.role == "assistant"
            for part in turn.parts:
                if part.kind == "text":
                    continue
                data = find_medium(media, part.value)
                if part.kind == "image":
                    with named(part):
                        pixels = decode_image(data, self.image_size)
                    conversation.images.append(PlacedImage(pixels, next(starts)))
                    continue
                with named(part):
                    waveform = _whole_waveform(data)
                if turn.role == "assistant":
                    start = conversation.answers.index(answer)
                    spoken = SpokenAnswer(waveform, start, len(self.answer_ids(turn)))
                    conversation.spoken.append(spoken)
                else:
                    num_tokens = self.num_audio_tokens(len(waveform))
                    placed = PlacedAudio(waveform, next(starts), num_tokens, draw_seed(random))
                    conversation.audios.append(placed)


def cut_at_placeholders(
    text: str, files: Mapping[MediaKind, list[str]]
) -> list[tuple[PartKind, str]]:
    """Cut a text at each `<image>` and `<audio>`, which takes the first name out of its list.

    Gives kinds with stripped text or name; raises DataError for a placeholder whose list is empty.
    """
    parts: list[tuple[PartKind, str]] = []
    for piece in _PLACEHOLDER.split(text):
        if _PLACEHOLDER.fullmatch(piece):
            kind: MediaKind = "image" if piece == "<image>" else "audio"
            if not files[kind]:
                raise DataError(f"a {piece} has no file in {kind!r}")
            parts.append((kind, files[kind].pop(0)))
        elif piece.strip():
            parts.append(("text", piece.strip()))
    return parts


@contextmanager
def named(part: Part) -> Iterator[None]:
    """Put the name of a medium before what is said about its bytes."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{part.value}: {error}") from None


def read_turns(sample: Mapping[str, Any]) -> list[Turn]:
    """The turns in the .json of an sft sample; raises DataError when they are malformed."""
    if "json" not in sample:
        raise DataError("the sample has no .json member with its turns")
    try:
        turns = json.loads(sample["json"])["turns"]
        return [Turn(_role(turn["role"]), tuple(map(_part, turn["content"]))) for turn in turns]
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise DataError(f"its .json holds no list of turns ({error!r})") from None


def _role(name: Any) -> Role:
    if name not in ROLES:
        raise DataError(f"a turn has role {name!r}; roles are {', '.join(ROLES)}")
    return name


def _part(content: dict[str, Any]) -> Part:
    kind = content["type"]
    if kind not in ("text", "image", "audio"):
        raise DataError(f"a part has type {kind!r}; types are text, image and audio")
    return Part(kind, str(content["text" if kind == "text" else "name"]))


def find_medium(media: Mapping[str, bytes], name: str) -> bytes:
    """The bytes of an image or audio clip; raises DataError when the sample lacks it."""
    if name not in media:
        raise DataError(f"a turn names {name}, which the sample does not hold")
    return media[name]


def resampled_length(data: bytes) -> int:
    """Samples of an audio clip at 16 kHz, from its header where that tells; raises DataError."""
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            num_frames, rate_hz = file.frames, int(file.samplerate)
    except (soundfile.SoundFileError, ValueError, OSError) as error:
        raise broken_audio(error) from None
    if not 0 < num_frames < _UNKNOWN_FRAMES:
        return len(decode_audio(data))
    return math.ceil(num_frames * SAMPLE_RATE_HZ / rate_hz)


def _whole_waveform(data: bytes) -> np.ndarray:
    """Decode an audio clip to exactly `resampled_length` samples, for which its row has room."""
    waveform, num_samples = decode_audio(data), resampled_length(data)
    if abs(len(waveform) - num_samples) > _MAX_SAMPLES_OFF:
        raise DataError(
            f"broken audio clip (its header promises {num_samples} samples at 16 kHz, it has "
            f"{len(waveform)})"
        )
    return np.pad(waveform[:num_samples], (0, max(0, num_samples - len(waveform))))
