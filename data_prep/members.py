"""The members of a stored sample: its texts, its media, and its cost."""

from muomni.data.media.decode import AudioFacts, declared_length, image_size, read_audio
from muomni.data.media.formats import Kind, media_of, only_medium
from muomni.data.shards.manifest import Task
from muomni.data.shards.writer import SampleCost
from muomni.data.text.sample_texts import sample_captions, sample_text
from muomni.data.text.turns import find_medium, read_turns
from muomni.errors import DataError

__all__ = ["Sample", "measure", "media_of", "sample_texts", "trained_media"]

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


def trained_media(sample: Sample, task: Task) -> list[tuple[Kind, bytes]]:
    """The images and audio clips of a sample that training reads, in order.

    Raises `DataError` if a member that the task needs is missing, or ambiguous.
    """
    if task == "sft":
        named = {name: data for name, data in sample.items() if isinstance(data, bytes)}
        parts = [part for turn in read_turns(sample) for part in turn.parts]
        return [
            (part.kind, find_medium(named, part.value)) for part in parts if part.kind != "text"
        ]
    if task == "text":
        return []
    kind: Kind = "image" if task == "image-caption" else "audio"
    return [(kind, only_medium(sample, kind)[1])]


def measure(sample: Sample, task: Task) -> SampleCost:
    """Decode all media of a sample and compute its cost.

    Raises `DataError` if a member that the task needs is missing or broken.
    """
    media = trained_media(sample, task)
    texts = sample_texts(sample, task)
    if not any(text.strip() for text in texts):
        raise DataError(f"it has no text (members: {_names(sample)})")
    sizes = [image_size(data) for kind, data in media if kind == "image"]
    durations_ms = [_duration_ms(data, task) for kind, data in media if kind == "audio"]
    counted = texts[:1] if task == "image-caption" else texts
    return SampleCost(
        duration_ms=sum(durations_ms),
        num_chars=sum(len(text) for text in counted),
        num_pixels=sum(width * height for width, height in sizes),
        num_images=len(sizes),
        num_audios=len(durations_ms),
    )


def _duration_ms(data: bytes, task: Task) -> int:
    samples, rate_hz = read_audio(data)
    # Stage `sft` assigns positions by the header before it decodes.
    declared = declared_length(data) if task == "sft" else None
    if declared is not None and declared[0] != len(samples):
        raise DataError(
            f"broken audio clip (its header declares {declared[0]} samples, it has {len(samples)})"
        )
    return AudioFacts.of(samples, rate_hz).duration_ms


def _names(sample: Sample) -> str:
    return ", ".join(name for name in sample if name != "__key__")
