"""NeMo manifests: JSON lines {"audio_filepath", "text", "duration"}, and "offset" for segments.

A line is the segment [offset, offset + duration) of its audio file, as NeMo reads it: without an offset the
first `duration` seconds. Lines with a "shard_id" are about files in
tars (`nemo_tars.py`). Paths are relative to the manifest or to `--media`. Optional: "speaker" and "lang".
"""

from collections.abc import Callable, Iterator
from pathlib import Path

from data_prep.corpus import (
    BAD_RECORD,
    BadSampleError,
    Clip,
    Item,
    Media,
    Member,
    Problem,
    declared_split,
    transcript_group,
)
from data_prep.options import ReaderOptions
from data_prep.readers.media_paths import find_media
from data_prep.readers.nemo_tars import TarredAudio
from data_prep.readers.rows import Row, speech_item
from data_prep.readers.text_files import Record, read_json_lines
from data_prep.values import is_missing, shown, text_value

_AUDIO = "audio_filepath"


def read_nemo(src: Path, options: ReaderOptions) -> Iterator[Item]:
    """List the lines of a manifest, whose name may declare a split, such as `train_manifest.json`.

    Raises `DataError` if it is missing, or its tars are.
    """
    root = options.media_root or src.parent
    cut, is_tarred = _survey(src)
    tars = TarredAudio(root, options.skipped) if is_tarred else None
    find = (lambda record, name: find_media(root, name, _AUDIO)) if tars is None else tars.find
    for number, record in read_json_lines(src, "NeMo manifest"):
        name, source = f"{src.stem}-{number:08d}", f"{src.name} line {number}"
        values: dict[str, object] = {"split": declared_split(src.name)}
        problem = record if isinstance(record, Problem) else None
        try:
            if not isinstance(record, Problem):
                values.update(_values(record, find, cut, options))
        except BadSampleError as error:
            problem = error.problem
        yield speech_item(Row(name, source, values, problem), root, options)
    if tars is not None:
        tars.count_unused()


def _survey(src: Path) -> tuple[set[object], bool]:
    """The audio files of which an offset selects a part, and whether lines have a `shard_id`."""
    cut, is_tarred = set[object](), False
    for _, record in read_json_lines(src, "NeMo manifest"):
        if isinstance(record, Problem):
            continue
        if not is_missing(record.get("offset")) and isinstance(record.get(_AUDIO), str):
            cut.add(record[_AUDIO])
        is_tarred = is_tarred or not is_missing(record.get("shard_id"))
    return cut, is_tarred


def _values(
    record: Record,
    find: Callable[[Record, str], str | Member],
    cut: set[object],
    options: ReaderOptions,
) -> Record:
    text_field = options.columns.get("text", "text")
    if is_missing(record.get(text_field)):
        raise BadSampleError(BAD_RECORD, f"no field {text_field!r} (it has {_names(record)})")
    text = text_value(record[text_field], text_field)
    name = text_value(record.get(_AUDIO), _AUDIO)
    if not name:
        raise BadSampleError(BAD_RECORD, f"no field {_AUDIO!r} (it has {_names(record)})")
    is_whole = is_missing(record.get("offset")) and name not in cut
    values: Record = {
        "audio": _segment(record, find(record, name)),
        "text": text,
        "speaker": record.get("speaker"),
        "language": record.get("lang") or record.get("language"),
    }
    if is_whole and not options.group_by:
        # As of files without segments: the words.
        values["group"] = transcript_group(text.encode(errors="replace").decode())
    return values


def _segment(record: Record, audio: str | Member) -> Media:
    offset_s, duration_s = _seconds(record, "offset"), _seconds(record, "duration")
    if duration_s is None and not offset_s:
        return audio
    if duration_s is None:
        raise BadSampleError(BAD_RECORD, "it has an offset but no duration")
    member = audio if isinstance(audio, Member) else None
    path = audio.path if isinstance(audio, Member) else audio
    return Clip(path, offset_s or 0.0, duration_s, member=member)


def _seconds(record: Record, field: str) -> float | None:
    """A time in seconds, which may be a number as text; None if it is missing."""
    value = record.get(field)
    if is_missing(value):
        return None
    try:
        if isinstance(value, int | float | str) and not isinstance(value, bool):
            return float(value)
    except ValueError:
        pass
    raise BadSampleError(BAD_RECORD, f"{field!r} is not a number of seconds: {shown(value)}")


def _names(record: Record) -> str:
    return shown(", ".join(record))[1:-1]
