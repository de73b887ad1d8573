"""From an item to the members of a sample: reads its files, checks them, counts their cost.

Files are copied as they are unless the treatment asks for more; parts of audio clips are cut without
loss. Raises `BadSampleError` for a sample that cannot be used, and for a sound one that a filter leaves
out. Filters look at images and audio clips as they came, and at texts as they go in.
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
    Part,
    Problem,
    TextSpan,
)
from data_prep.filters import Filters, unwanted_image, unwanted_speech, unwanted_text
from data_prep.media.checks import checked_audio, checked_image, decoded_audio
from data_prep.media.convert import read_cell
from data_prep.media.treatment import Treatment, treat_text
from muomni.data.shards.manifest import Task
from muomni.data.shards.writer import SampleCost

# Made once: `json.dumps` with these options would make one for each sample.
_JSON = json.JSONEncoder(ensure_ascii=False, sort_keys=True)
_MAX_METRIC = 2**32 - 1
_MAX_MEDIA = 2**16 - 1


@dataclass(frozen=True, slots=True)
class EncodedSample:
    """Members as (extension, bytes) in their order in the tar, and the cost of the sample."""

    members: tuple[tuple[str, bytes], ...]
    cost: SampleCost


def encode(item: Item, task: Task, filters: Filters, treatment: Treatment) -> EncodedSample:
    """Make the sample of an item; raises `BadSampleError` with reason and message.

    A sample is filtered only after it proved sound, so filters do not hide how many are bad.
    """
    _leave_out(item.problem)
    sample = _ENCODERS[task](item, filters, treatment)
    _check_metrics(sample)
    return sample


def _check_metrics(sample: EncodedSample) -> None:
    """The columns of a shard hold metrics of 32 bits, and of 16 bits where they count media."""
    cost = sample.cost
    num_bytes = sum(len(data) for _, data in sample.members)
    largest = max(num_bytes, cost.duration_ms, cost.num_chars, cost.num_pixels)
    if largest > _MAX_METRIC or max(cost.num_images, cost.num_audios) > _MAX_MEDIA:
        raise BadSampleError(BAD_RECORD, f"a sample of {num_bytes} bytes and {cost} is absurd")


def _leave_out(problem: Problem | None) -> None:
    """Raise the problem of a sample where it has one."""
    if problem:
        raise BadSampleError(problem.reason, problem.message)


def _json(content: dict[str, object]) -> bytes:
    return _JSON.encode(content).encode()


def _encode_text(item: Item, filters: Filters, treatment: Treatment) -> EncodedSample:
    data = item.texts[0].encode() if item.span is None else _read_span(item.span)
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise BadSampleError(BAD_UTF8, f"{item.source} is not valid UTF-8") from error
    original, text = text, treat_text(treatment, text)
    if not text.strip():
        raise BadSampleError(EMPTY_TEXT, f"{item.source} is empty")
    _leave_out(unwanted_text(filters, text))
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
    try:
        with open(span.path, "rb") as file:
            file.seek(span.start)
            return file.read(span.num_bytes)
    except OSError as error:
        raise BadSampleError(MISSING_MEDIA, f"cannot read {span.path}: {error.strerror}") from error


def _encode_image_caption(item: Item, filters: Filters, treatment: Treatment) -> EncodedSample:
    image = checked_image(item.media[0], treatment)
    _leave_out(unwanted_image(filters, *image.original_size))
    texts = tuple(treat_text(treatment, caption) for caption in item.texts)
    captions = _wanted_captions(tuple(filter(str.strip, texts)), filters)
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


def _wanted_captions(captions: tuple[str, ...], filters: Filters) -> list[str]:
    """The captions that pass; the problem of the first one is raised where none does."""
    if not captions:
        raise BadSampleError(EMPTY_TEXT, "the caption is empty after normalization")
    problems = [unwanted_text(filters, caption) for caption in captions]
    if all(problems):
        _leave_out(problems[0])
    return [text for text, problem in zip(captions, problems, strict=True) if problem is None]


def _encode_speech(item: Item, filters: Filters, treatment: Treatment) -> EncodedSample:
    original, text = item.texts[0], treat_text(treatment, item.texts[0])
    if filters.needs_levels:
        audio, samples = decoded_audio(item.media[0], treatment)
    else:
        audio, samples = checked_audio(item.media[0], treatment), None
    facts = audio.facts
    duration_s = facts.duration_ms / 1000
    if not text.strip():
        raise BadSampleError(EMPTY_TEXT, "the transcript is empty after normalization")
    _leave_out(unwanted_text(filters, text))
    _leave_out(unwanted_speech(filters, samples, audio.original_rate_hz, duration_s, len(text)))
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
    members = (
        (audio.extension, audio.data),
        ("json", _json(content)),
        ("txt", text.encode()),
    )
    cost = SampleCost(duration_ms=facts.duration_ms, num_chars=len(text), num_audios=1)
    return EncodedSample(members, cost)


def _encode_conversation(item: Item, filters: Filters, treatment: Treatment) -> EncodedSample:
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
                medium = checked_image(part.value, treatment)
                unwanted = unwanted or unwanted_image(filters, *medium.original_size)
                num_pixels += medium.num_pixels
                num_images += 1
            else:
                medium = checked_audio(part.value, treatment)
                duration_ms += medium.facts.duration_ms
            name = f"{len(media)}.{medium.extension}"
            media.append((name, medium.data))
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
        raise BadSampleError(BAD_RECORD, "an answer holds an image; only text and speech can be")


def _present(metadata: dict[str, str]) -> dict[str, object]:
    return {name: text for name, text in metadata.items() if text}


_ENCODERS: dict[Task, Callable[[Item, Filters, Treatment], EncodedSample]] = {
    "text": _encode_text,
    "image-caption": _encode_image_caption,
    "speech": _encode_speech,
    "tts": _encode_speech,
    "sft": _encode_conversation,
}
