"""Cost metrics of a sample that already lies in a tar: for adopted shards and for `verify`."""

import json

from data_prep.train_tokenizer import sample_texts
from muomni.data.media.decode import AUDIO_EXTENSIONS, IMAGE_EXTENSIONS, audio_facts, image_size
from muomni.data.shards.manifest import Task
from muomni.data.shards.writer import SampleCost
from muomni.errors import DataError


def media_of(sample: dict[str, bytes | str], kinds: tuple[str, ...]) -> list[tuple[str, bytes]]:
    """Members of a sample whose last extension is one of `kinds`, in their order."""
    return [
        (name, data)
        for name, data in sample.items()
        if isinstance(data, bytes) and name.rpartition(".")[2].lower() in kinds
    ]


def metrics(sample: dict[str, bytes | str], task: Task) -> SampleCost:
    """Decode all media of a sample, check that it has what its task needs, count its cost.

    Raises `DataError` when a member is missing or broken.
    """
    images = media_of(sample, IMAGE_EXTENSIONS)
    audios = media_of(sample, AUDIO_EXTENSIONS)
    if task == "image-caption" and not images:
        raise DataError(f"no image among its members ({_names(sample)})")
    if task in ("speech", "tts") and not audios:
        raise DataError(f"no audio clip among its members ({_names(sample)})")
    try:
        texts = sample_texts(sample, task)
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"its text members cannot be understood ({error})") from error
    if not any(text.strip() for text in texts):
        raise DataError(f"no text among its members ({_names(sample)})")
    if task == "sft":
        _check_names(sample)
    sizes = [image_size(data) for _, data in images]
    counted = texts[:1] if task == "image-caption" else texts
    return SampleCost(
        duration_ms=sum(audio_facts(data).duration_ms for _, data in audios),
        num_chars=sum(len(text) for text in counted),
        num_pixels=sum(width * height for width, height in sizes),
        num_images=len(images),
        num_audios=len(audios),
    )


def _check_names(sample: dict[str, bytes | str]) -> None:
    """Each medium that a turn names must be a member."""
    for turn in json.loads(sample["json"])["turns"]:
        for part in turn["content"]:
            if part["type"] != "text" and part["name"] not in sample:
                raise DataError(f"a turn names {part['name']!r}, which is no member")


def _names(sample: dict[str, bytes | str]) -> str:
    return ", ".join(name for name in sample if name != "__key__")
