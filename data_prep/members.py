"""The members of a stored sample: its texts, its media, and its cost."""

from muomni.data.media.decode import AUDIO_EXTENSIONS, IMAGE_EXTENSIONS, audio_facts, image_size
from muomni.data.shards.manifest import Task
from muomni.data.shards.writer import SampleCost
from muomni.data.text.sample_texts import sample_captions, sample_text
from muomni.data.text.turns import read_turns
from muomni.errors import DataError

# A sample as `SplitReader.read` returns it.
Sample = dict[str, bytes | str]


def sample_texts(sample: Sample, task: str) -> list[str]:
    """The document, captions, transcript, or text parts of all turns of a sample.

    Raises `DataError` if it has none, or one of another type.
    """
    if task == "sft":
        parts = [part for turn in read_turns(sample) for part in turn.parts]
        return [part.value for part in parts if part.kind == "text"]
    return sample_captions(sample) if task == "image-caption" else [sample_text(sample)]


def media_of(sample: Sample, extensions: tuple[str, ...]) -> list[tuple[str, bytes]]:
    """Names and bytes of the members whose last extension is in `extensions`, in order."""
    return [
        (name, data)
        for name, data in sample.items()
        if isinstance(data, bytes) and name.rpartition(".")[2].lower() in extensions
    ]


def measure(sample: Sample, task: Task) -> SampleCost:
    """Decode all media of a sample and compute its cost.

    Raises `DataError` if a member that the task needs is missing or broken.
    """
    images = media_of(sample, IMAGE_EXTENSIONS)
    audios = media_of(sample, AUDIO_EXTENSIONS)
    if task == "image-caption" and not images:
        raise DataError(f"it has no image (members: {_names(sample)})")
    if task in ("speech", "tts") and not audios:
        raise DataError(f"it has no audio clip (members: {_names(sample)})")
    texts = sample_texts(sample, task)
    if not any(text.strip() for text in texts):
        raise DataError(f"it has no text (members: {_names(sample)})")
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


def _check_names(sample: Sample) -> None:
    """Each image or audio clip that a turn names must be a member."""
    for turn in read_turns(sample):
        for part in turn.parts:
            if part.kind != "text" and part.value not in sample:
                raise DataError(f"a turn refers to {part.value!r}, which is not a member")


def _names(sample: Sample) -> str:
    return ", ".join(name for name in sample if name != "__key__")
