"""From an item to the members of a sample: reads its files, checks them, counts their cost.

Files are copied as they are: nothing is transcoded, parts of recordings are cut without loss. Each
picture and recording is decoded once in full, so what reaches a shard can be trained on. Raises
`BadSampleError` otherwise, and for a sound sample that a filter leaves out.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from data_prep.corpus import (
    BAD_RECORD,
    BAD_UTF8,
    BROKEN_AUDIO,
    BROKEN_IMAGE,
    EMPTY_TEXT,
    MISSING_MEDIA,
    BadSampleError,
    Cell,
    Item,
    Media,
    Part,
    Problem,
    TextSpan,
)
from data_prep.filters import Filters, unwanted_picture, unwanted_speech, unwanted_text
from data_prep.media import read_cell, read_media
from muomni.data.decode import (
    AUDIO_EXTENSIONS,
    IMAGE_EXTENSIONS,
    AudioFacts,
    image_size,
    read_audio,
)
from muomni.data.manifest import Task
from muomni.data.shard_writer import SampleCost
from muomni.errors import DataError

# A picture or question may serve many conversations; the last ones are not decoded again.
_NUM_KEPT = 32


@dataclass(frozen=True, slots=True)
class EncodedSample:
    """Members as (extension, bytes) in their order in the tar, and the cost of the sample."""

    members: tuple[tuple[str, bytes], ...]
    cost: SampleCost


def encode(item: Item, task: Task, filters: Filters) -> EncodedSample:
    """Make the sample of an item; raises `BadSampleError` with reason and message.

    A sample is filtered only after it proved sound, so filters do not hide how many are bad.
    """
    _leave_out(item.problem)
    return _ENCODERS[task](item, filters)


@lru_cache(maxsize=_NUM_KEPT)
def checked_image(media: Media) -> tuple[str, bytes, int, int]:
    """Extension, bytes, width and height of a picture that decodes."""
    extension, data = read_media(media, IMAGE_EXTENSIONS, BROKEN_IMAGE)
    try:
        return extension, data, *image_size(data)
    except DataError as error:
        raise BadSampleError(BROKEN_IMAGE, f"{media}: {error}") from error


@lru_cache(maxsize=_NUM_KEPT)
def checked_audio(media: Media) -> tuple[str, bytes, AudioFacts]:
    """Extension, bytes and facts of a recording that decodes and is not empty."""
    extension, data, samples, sample_rate_hz = _decoded_audio(media)
    return extension, data, AudioFacts.of(samples, sample_rate_hz)


def _decoded_audio(media: Media) -> tuple[str, bytes, np.ndarray, int]:
    """Extension, bytes, samples and their rate; not kept, since samples need much memory."""
    extension, data = read_media(media, AUDIO_EXTENSIONS, BROKEN_AUDIO)
    try:
        return extension, data, *read_audio(data)
    except DataError as error:
        raise BadSampleError(BROKEN_AUDIO, f"{media}: {error}") from error


def _leave_out(problem: Problem | None) -> None:
    """Raise the problem of a sample where it has one."""
    if problem:
        raise BadSampleError(problem.reason, problem.message)


def _json(content: dict[str, object]) -> bytes:
    return json.dumps(content, ensure_ascii=False, sort_keys=True).encode()


def _encode_text(item: Item, filters: Filters) -> EncodedSample:
    data = item.texts[0].encode() if item.span is None else _read_span(item.span)
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise BadSampleError(BAD_UTF8, f"{item.source} is not valid UTF-8") from error
    if not text.strip():
        raise BadSampleError(EMPTY_TEXT, f"{item.source} is empty")
    _leave_out(unwanted_text(filters, text))
    members = [("txt", data)]
    if item.metadata:
        members.append(("json", _json(dict(item.metadata))))
    return EncodedSample(tuple(members), SampleCost(num_chars=len(text)))


def _read_span(span: TextSpan | Cell) -> bytes:
    if isinstance(span, Cell):
        return read_cell(span) or b""
    try:
        with open(span.path, "rb") as file:
            file.seek(span.start)
            return file.read(span.num_bytes)
    except OSError as error:
        raise BadSampleError(MISSING_MEDIA, f"cannot read {span.path}: {error.strerror}") from error


def _encode_image_caption(item: Item, filters: Filters) -> EncodedSample:
    extension, data, width, height = checked_image(item.media[0])
    _leave_out(unwanted_picture(filters, width, height))
    captions = _wanted_captions(item.texts, filters)
    content: dict[str, object] = {**_present(item.metadata), "captions": captions}
    members = ((extension, data), ("json", _json(content)), ("txt", captions[0].encode()))
    cost = SampleCost(num_chars=len(captions[0]), num_pixels=width * height, num_images=1)
    return EncodedSample(members, cost)


def _wanted_captions(captions: tuple[str, ...], filters: Filters) -> list[str]:
    """The captions that pass; the problem of the first one is raised where none does."""
    problems = [unwanted_text(filters, caption) for caption in captions]
    if all(problems):
        _leave_out(problems[0])
    return [text for text, problem in zip(captions, problems, strict=True) if problem is None]


def _encode_speech(item: Item, filters: Filters) -> EncodedSample:
    extension, data, samples, sample_rate_hz = _decoded_audio(item.media[0])
    facts = AudioFacts.of(samples, sample_rate_hz)
    text, duration_s = item.texts[0], facts.duration_ms / 1000
    _leave_out(unwanted_text(filters, text))
    _leave_out(unwanted_speech(filters, samples, sample_rate_hz, duration_s, len(text)))
    content: dict[str, object] = {
        **_present(item.metadata),
        "text": text,
        "duration_s": duration_s,
        "sample_rate_hz": sample_rate_hz,
    }
    members = ((extension, data), ("json", _json(content)), ("txt", text.encode()))
    cost = SampleCost(duration_ms=facts.duration_ms, num_chars=len(text), num_audios=1)
    return EncodedSample(members, cost)


def _encode_conversation(item: Item, filters: Filters) -> EncodedSample:
    _check_turns(item)
    unwanted: Problem | None = None
    media: list[tuple[str, bytes]] = []
    turns: list[dict[str, object]] = []
    num_chars = num_pixels = num_images = duration_ms = 0
    for turn in item.turns:
        content: list[dict[str, str]] = []
        for part in turn.parts:
            if part.kind == "text":
                content.append({"type": "text", "text": part.value})
                num_chars += len(part.value)
                continue
            if part.kind == "image":
                extension, data, width, height = checked_image(part.value)
                unwanted = unwanted or unwanted_picture(filters, width, height)
                num_pixels += width * height
                num_images += 1
            else:
                extension, data, facts = checked_audio(part.value)
                duration_ms += facts.duration_ms
            name = f"{len(media)}.{extension}"
            media.append((name, data))
            content.append({"type": part.kind, "name": name})
        turns.append({"role": turn.role, "content": content})
    _leave_out(unwanted)
    cost = SampleCost(
        duration_ms=duration_ms,
        num_chars=num_chars,
        num_pixels=num_pixels,
        num_images=num_images,
        num_audios=len(media) - num_images,
    )
    body: dict[str, object] = {**_present(item.metadata), "turns": turns}
    return EncodedSample((("json", _json(body)), *media), cost)


def _check_turns(item: Item) -> None:
    if not item.turns or item.turns[-1].role != "assistant":
        raise BadSampleError(BAD_RECORD, "the conversation does not end with an answer")
    for turn in item.turns:
        if not turn.parts:
            raise BadSampleError(EMPTY_TEXT, f"a turn of {turn.role} is empty")
        if turn.role == "assistant":
            _check_answer(turn.parts)


def _check_answer(parts: tuple[Part, ...]) -> None:
    kinds = [part.kind for part in parts]
    if "text" not in kinds:
        raise BadSampleError(
            EMPTY_TEXT, "an answer has no text (a spoken one needs its transcript)"
        )
    if "image" in kinds:
        raise BadSampleError(BAD_RECORD, "an answer holds a picture; only text and speech can be")


def _present(metadata: dict[str, str]) -> dict[str, object]:
    return {name: text for name, text in metadata.items() if text}


_ENCODERS: dict[Task, Callable[[Item, Filters], EncodedSample]] = {
    "text": _encode_text,
    "image-caption": _encode_image_caption,
    "speech": _encode_speech,
    "tts": _encode_speech,
    "sft": _encode_conversation,
}
