"""Encode an item as a sample: read its files, check and convert them, and compute its cost.

Files are copied unless preprocessing changes them; segments are cut losslessly. Raises `BadSampleError`
for bad and for filtered samples. Filters see images and audio clips before preprocessing, and texts
after it.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass

from data_prep.corpus import (
    BAD_RECORD,
    BAD_UTF8,
    EMPTY_TEXT,
    MISSING_MEDIA,
    BadSampleError,
    Cell,
    Item,
    PackedSpan,
    Problem,
    TextSpan,
    text_problem,
)
from data_prep.filters import filter_image, filter_speech, filter_text
from data_prep.media.checks import checked_audio, checked_image, decoded_audio
from data_prep.media.convert import read_cell
from data_prep.media.preprocessing import normalize_text
from data_prep.options import Filters, Preprocessing
from data_prep.readers.plain_text import read_packed
from muomni.data.shards.manifest import Task
from muomni.data.shards.writer import SampleCost
from muomni.data.text.turns import Part, Turn, turns_as_json

# Created once: `json.dumps` with these options would create an encoder per sample.
_JSON = json.JSONEncoder(ensure_ascii=False, sort_keys=True)
_MAX_METRIC = 2**32 - 1
_MAX_MEDIA = 2**16 - 1


@dataclass(frozen=True, slots=True)
class EncodedSample:
    """Members as (extension, bytes) in tar order, and the cost of the sample."""

    members: tuple[tuple[str, bytes], ...]
    cost: SampleCost


def encode(item: Item, task: Task, filters: Filters, preprocessing: Preprocessing) -> EncodedSample:
    """Encode an item; raises `BadSampleError` with reason and message.

    Only valid samples are filtered, so filters do not hide bad ones.
    """
    _raise_if(item.problem)
    sample = _ENCODERS[task](item, filters, preprocessing)
    _check_metrics(sample)
    return sample


def _check_metrics(sample: EncodedSample) -> None:
    """Columns store costs in 32 bits, and numbers of media in 16 bits."""
    cost = sample.cost
    num_bytes = sum(len(data) for _, data in sample.members)
    largest = max(num_bytes, cost.duration_ms, cost.num_chars, cost.num_pixels)
    if largest > _MAX_METRIC or max(cost.num_images, cost.num_audios) > _MAX_MEDIA:
        raise BadSampleError(BAD_RECORD, f"a sample of {num_bytes} bytes and {cost} is too large")


def _raise_if(problem: Problem | None) -> None:
    """Raise `BadSampleError` if there is a problem."""
    if problem:
        raise BadSampleError(problem.reason, problem.message)


def _json(content: dict[str, object]) -> bytes:
    return _JSON.encode(content).encode()


def _encode_text(item: Item, filters: Filters, preprocessing: Preprocessing) -> EncodedSample:
    data = item.texts[0].encode() if item.span is None else _read_span(item.span)
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise BadSampleError(BAD_UTF8, f"{item.source} is not valid UTF-8") from error
    original, text = text, normalize_text(preprocessing, text)
    _raise_if(text_problem(text, item.source))
    _raise_if(filter_text(filters, text))
    metadata = dict(item.metadata)
    members = [("txt", data)]
    if text != original:
        members = [("txt", text.encode())]
        metadata["original_text"] = original
    if metadata:
        members.append(("json", _json(dict(metadata))))
    return EncodedSample(tuple(members), SampleCost(num_chars=len(text)))


def _read_span(span: TextSpan | Cell) -> bytes:
    if isinstance(span, Cell):
        return read_cell(span) or b""
    if isinstance(span, PackedSpan):
        return read_packed(span)
    try:
        with open(span.path, "rb") as file:
            file.seek(span.start)
            return file.read(span.num_bytes)
    except OSError as error:
        raise BadSampleError(MISSING_MEDIA, f"cannot read {span.path}: {error.strerror}") from error


def _encode_image_caption(
    item: Item, filters: Filters, preprocessing: Preprocessing
) -> EncodedSample:
    image = checked_image(item.media[0], preprocessing)
    _raise_if(filter_image(filters, *image.original_size))
    texts = tuple(normalize_text(preprocessing, caption) for caption in item.texts)
    captions = _filter_captions(tuple(filter(str.strip, texts)), filters)
    content: dict[str, object] = {**_present(item.metadata), "captions": captions}
    if texts != item.texts:
        content["original_captions"] = item.texts
    members = (
        (image.extension, image.data),
        ("json", _json(content)),
        ("txt", captions[0].encode()),
    )
    cost = SampleCost(num_chars=len(captions[0]), num_pixels=image.num_pixels, num_images=1)
    return EncodedSample(members, cost)


def _filter_captions(captions: tuple[str, ...], filters: Filters) -> list[str]:
    """The captions that pass the filters; without any, the problem of the first one is raised."""
    if not captions:
        raise BadSampleError(EMPTY_TEXT, "the caption is empty after normalization")
    problems = [filter_text(filters, caption) for caption in captions]
    if all(problems):
        _raise_if(problems[0])
    return [text for text, problem in zip(captions, problems, strict=True) if problem is None]


def _encode_speech(item: Item, filters: Filters, preprocessing: Preprocessing) -> EncodedSample:
    original, text = item.texts[0], normalize_text(preprocessing, item.texts[0])
    if filters.needs_levels:
        audio, samples = decoded_audio(item.media[0], preprocessing)
    else:
        audio, samples = checked_audio(item.media[0], preprocessing), None
    facts = audio.facts
    duration_s = facts.duration_ms / 1000
    if not text.strip():
        raise BadSampleError(EMPTY_TEXT, "the transcript is empty after normalization")
    _raise_if(filter_text(filters, text))
    _raise_if(filter_speech(filters, samples, audio.original_rate_hz, duration_s, len(text)))
    content: dict[str, object] = {
        **_present(item.metadata),
        "text": text,
        "duration_s": duration_s,
        "sample_rate_hz": facts.sample_rate_hz,
    }
    if text != original:
        content.setdefault("original_text", original)
    if audio.original_rate_hz != facts.sample_rate_hz:
        content["original_sample_rate_hz"] = audio.original_rate_hz
    if preprocessing.trim_dbfs is not None and audio.original_ms != facts.duration_ms:
        content["original_duration_s"] = audio.original_ms / 1000
    members = ((audio.extension, audio.data), ("json", _json(content)), ("txt", text.encode()))
    cost = SampleCost(duration_ms=facts.duration_ms, num_chars=len(text), num_audios=1)
    return EncodedSample(members, cost)


def _encode_conversation(
    item: Item, filters: Filters, preprocessing: Preprocessing
) -> EncodedSample:
    _check_turns(item)
    filtered: Problem | None = None
    media: list[tuple[str, bytes]] = []
    turns: list[Turn] = []
    num_chars = num_pixels = num_images = duration_ms = 0
    for turn in item.turns:
        stored: list[Part] = []
        for part in turn.parts:
            if part.kind == "text":
                stored.append(part)
                num_chars += len(part.value)
                continue
            if part.kind == "image":
                medium = checked_image(item.medium(part.value), preprocessing)
                filtered = filtered or filter_image(filters, *medium.original_size)
                num_pixels += medium.num_pixels
                num_images += 1
            else:
                medium = checked_audio(item.medium(part.value), preprocessing)
                duration_ms += medium.facts.duration_ms
            name = f"{len(media)}.{medium.extension}"
            media.append((name, medium.data))
            stored.append(Part(part.kind, name))
        turns.append(Turn(turn.role, tuple(stored)))
    _raise_if(filtered)
    cost = SampleCost(
        duration_ms=duration_ms,
        num_chars=num_chars,
        num_pixels=num_pixels,
        num_images=num_images,
        num_audios=len(media) - num_images,
    )
    body: dict[str, object] = {**_present(item.metadata), "turns": turns_as_json(turns)}
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
    if "image" in kinds:
        raise BadSampleError(BAD_RECORD, "an answer has an image; answers are text and speech only")
    if "text" not in kinds:
        raise BadSampleError(
            EMPTY_TEXT, "an answer has no text (a spoken answer needs its transcript)"
        )


def _present(metadata: dict[str, str]) -> dict[str, object]:
    return {name: text for name, text in metadata.items() if text}


_ENCODERS: dict[Task, Callable[[Item, Filters, Preprocessing], EncodedSample]] = {
    "text": _encode_text,
    "image-caption": _encode_image_caption,
    "speech": _encode_speech,
    "tts": _encode_speech,
    "sft": _encode_conversation,
}
