"""Lhotse manifests: `*recordings*.jsonl[.gz]` with `*supervisions*`, or `*cuts*`.

Each supervision is a sample: a segment of its recording, cut out unless it covers the whole file. Paths
are relative to the manifest's folder or to `--media`. Mixed and padded cuts and audio with transforms (from
augmentation) are skipped, since they are not stored in files. `lhotse_shar.py` reads the Shar format.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from data_prep.corpus import (
    BAD_RECORD,
    MISSING_TRANSCRIPT,
    BadSampleError,
    Clip,
    Item,
    Problem,
    declared_split,
)
from data_prep.options import ReaderOptions
from data_prep.readers.media_paths import find_media
from data_prep.readers.rows import Row, speech_item
from data_prep.readers.text_files import Record, read_json_lines
from data_prep.values import shown, text_value
from muomni.data.shards.tar_index import clutter_kind
from muomni.errors import DataError

_SUFFIXES = (".jsonl", ".jsonl.gz")
# Durations in manifests are rounded.
_ROUNDING_S = 0.001
# Position, supervision, its recording, and the recording's time at the supervision's zero.
_Supervision = tuple[str, object, Record | None, object]


def read_lhotse(src: Path, options: ReaderOptions) -> Iterator[Item]:
    """List the supervisions of a manifest, or of all manifests in a folder (cuts only without others).

    Raises `DataError` if there is no manifest, or one of a pair is missing.
    """
    for path in _manifests(src):
        root = options.media_root or path.parent
        name = path.name.partition(".")[0]
        read = _read_cuts if "cuts" in path.name else _read_pair
        split = next((s for s in map(declared_split, name.split("_")) if s), None)
        for number, (position, supervision, audio, offset_s) in enumerate(read(path), start=1):
            row = Row(f"{name}-{number:08d}", f"{path.name} {position}", {"split": split})
            try:
                row.values.update(_values(supervision, audio, offset_s, root))
            except BadSampleError as error:
                row = Row(row.name, row.source, {}, error.problem)
            yield speech_item(row, root, options)


def _manifests(src: Path) -> list[Path]:
    paths = (path for path in src.glob("*") if not clutter_kind(path.name))
    files = (
        [src] if src.is_file() else sorted(path for path in paths if path.name.endswith(_SUFFIXES))
    )
    if any(path.name.startswith("cuts.") for path in files) and any(src.glob("recording.*.tar")):
        raise DataError(f"{src} is in Lhotse's Shar format; use --format shar")
    for kind in ("supervisions", "cuts"):
        found = [path for path in files if kind in path.name]
        if found:
            return found
    raise DataError(
        f"{src} contains no *supervisions*.jsonl[.gz] or *cuts*.jsonl[.gz] of Lhotse; check --src"
    )


def _read_pair(path: Path) -> Iterator[_Supervision]:
    """The supervisions of a file, with the audio clips of the manifest next to it."""
    beside = path.with_name(path.name.replace("supervisions", "recordings"))
    audio_clips: dict[object, Record] = {}
    for number, audio in read_json_lines(beside, "recording manifest"):
        if isinstance(audio, Problem):
            raise DataError(f"{beside} line {number} is broken: {audio.message}; create it again")
        audio_clips[audio.get("id")] = audio
    for number, supervision in read_json_lines(path, "supervision manifest"):
        is_bad = isinstance(supervision, Problem)
        audio = None if is_bad else audio_clips.get(supervision.get("recording_id"))
        yield f"line {number}", supervision, audio, 0.0


def _read_cuts(path: Path) -> Iterator[_Supervision]:
    """The supervisions of cuts; their times are relative to the cut."""
    for position, cut, supervisions in read_cuts(path):
        for supervision in supervisions:
            audio = cut.get("recording")
            yield (
                position,
                supervision,
                audio if isinstance(audio, dict) else None,
                cut.get("start"),
            )


def read_cuts(path: Path) -> Iterator[tuple[str, Record, list[object]]]:
    """Position, cut, and supervisions of each line; a problem stands for those of a line that has none."""
    for number, cut in read_json_lines(path, "cut manifest"):
        position = f"line {number}"
        if isinstance(cut, Problem):
            yield position, {}, [cut]
            continue
        kind = cut.get("type", "MonoCut")
        supervisions = cut.get("supervisions")
        if kind not in ("MonoCut", "MultiCut") or not isinstance(cut.get("recording"), dict):
            problem = Problem(
                BAD_RECORD, f"the {shown(kind)[1:-1]} is not a segment of one recording"
            )
            yield position, cut, [problem]
        elif isinstance(supervisions, list) and supervisions:
            yield position, cut, supervisions
        else:
            yield position, cut, [Problem(MISSING_TRANSCRIPT, "the cut has no supervision")]


def _values(supervision: object, audio: Record | None, offset_s: object, root: Path) -> Record:
    record = supervision_record(supervision)
    if audio is None:
        raise BadSampleError(BAD_RECORD, f"no recording {shown(record.get('recording_id'))}")
    if audio.get("transforms"):
        raise BadSampleError(BAD_RECORD, "the recording has transforms, so it is not a file")
    source, channel = source_of(audio, record.get("channel"))
    if source.get("type") != "file":
        kind = shown(source.get("type"))[1:-1]
        raise BadSampleError(BAD_RECORD, f"the recording is a {kind}, not a file")
    path = find_media(root, text_value(source.get("source"), "source"), "source")
    start_s = seconds(offset_s) + seconds(record.get("start"))
    clip = segment(Clip(path, start_s, seconds(record.get("duration")), channel), audio)
    return {**supervision_values(record), "audio": clip or path}


def supervision_record(supervision: object) -> Record:
    """A supervision as JSON object; raises `BadSampleError` for a problem and for other values."""
    if isinstance(supervision, Problem):
        raise BadSampleError(supervision.reason, supervision.message)
    if not isinstance(supervision, dict):
        raise BadSampleError(BAD_RECORD, "a supervision is not a JSON object")
    return supervision


def supervision_values(record: Record) -> Record:
    """The columns of a supervision besides `audio`."""
    return {column: record.get(column) for column in ("id", "text", "speaker", "language")}


def segment(clip: Clip, audio: Record) -> Clip | None:
    """The segment with rounded start; None if it is a whole recording."""
    is_all = clip.start_s == 0 and clip.duration_s > seconds(audio.get("duration")) - _ROUNDING_S
    return (
        None if is_all and clip.channel is None else replace(clip, start_s=round(clip.start_s, 6))
    )


def source_of(audio: Record, channel: object) -> tuple[Record, int | None]:
    """The source of a channel, and the channel's index if the source has several.

    Raises `BadSampleError` if there is none.
    """
    sources = audio.get("sources")
    for source in sources if isinstance(sources, list) else ():
        channels: list[object] = (isinstance(source, dict) and source.get("channels")) or [0]
        if not isinstance(source, dict) or (isinstance(channel, int) and channel not in channels):
            continue
        is_one_of_many = isinstance(channel, int) and len(channels) > 1
        return source, channels.index(channel) if is_one_of_many else None
    raise BadSampleError(BAD_RECORD, f"the recording has no source with channel {shown(channel)}")


def seconds(value: object) -> float:
    """A time of a manifest; raises `BadSampleError` if it is not a number."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise BadSampleError(BAD_RECORD, f"a time is not a number of seconds: {shown(value)}")
    return float(value)
