"""Lhotse manifests: `*recordings*.jsonl[.gz]` with `*supervisions*`, or `*cuts*`.

Each supervision is a sample: a segment of its recording, cut out unless it covers the whole file. Paths
are relative to the manifest's folder or to `--media`. Mixed and padded cuts and audio with transforms (from
augmentation) are skipped, since they are not stored in files.
"""

from collections.abc import Iterator
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
from data_prep.readers.rows import Row, speech_item
from data_prep.readers.text_files import Record, read_json_lines
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
    inside = sorted(path for path in src.glob("*") if path.name.endswith(_SUFFIXES))
    files = [src] if src.is_file() else inside
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
    for number, cut in read_json_lines(path, "cut manifest"):
        position = f"line {number}"
        problem = cut if isinstance(cut, Problem) else _cut_problem(cut)
        if isinstance(cut, Problem) or problem:
            yield position, problem, None, None
            continue
        audio, supervisions = cut["recording"], cut["supervisions"]
        assert isinstance(audio, dict) and isinstance(supervisions, list)
        for supervision in supervisions:
            yield position, supervision, audio, cut.get("start")


def _cut_problem(cut: Record) -> Problem | None:
    kind = cut.get("type", "MonoCut")
    if kind not in ("MonoCut", "MultiCut") or not isinstance(cut.get("recording"), dict):
        return Problem(BAD_RECORD, f"the {kind} is not a segment of one recording")
    supervisions = cut.get("supervisions")
    if not isinstance(supervisions, list) or not supervisions:
        return Problem(MISSING_TRANSCRIPT, "the cut has no supervision")
    return None


def _values(supervision: object, audio: Record | None, offset_s: object, root: Path) -> Record:
    if isinstance(supervision, Problem):
        raise BadSampleError(supervision.reason, supervision.message)
    if not isinstance(supervision, dict):
        raise BadSampleError(BAD_RECORD, "a supervision is not a JSON object")
    if audio is None:
        raise BadSampleError(BAD_RECORD, f"no recording {supervision.get('recording_id')!r}")
    start_s = _seconds(offset_s) + _seconds(supervision.get("start"))
    duration_s = _seconds(supervision.get("duration"))
    path, channel = _source(audio, supervision.get("channel"))
    is_all = start_s == 0 and duration_s > _seconds(audio.get("duration")) - _ROUNDING_S
    clip = Clip(str(root / path), round(start_s, 6), duration_s, channel)
    return {
        "id": supervision.get("id"),
        "audio": path if is_all and channel is None else clip,
        **{column: supervision.get(column) for column in ("text", "speaker", "language")},
    }


def _source(audio: Record, channel: object) -> tuple[str, int | None]:
    """The file of a channel, and the channel's index if the file has several."""
    if audio.get("transforms"):
        raise BadSampleError(BAD_RECORD, "the recording has transforms, so it is not a file")
    sources = audio.get("sources")
    for source in sources if isinstance(sources, list) else ():
        channels: list[object] = (isinstance(source, dict) and source.get("channels")) or [0]
        if not isinstance(source, dict) or (isinstance(channel, int) and channel not in channels):
            continue
        if source.get("type") != "file":
            raise BadSampleError(BAD_RECORD, f"the recording is a {source.get('type')}, not a file")
        is_one_of_many = isinstance(channel, int) and len(channels) > 1
        return str(source.get("source")), channels.index(channel) if is_one_of_many else None
    raise BadSampleError(BAD_RECORD, f"the recording has no source with channel {channel!r}")


def _seconds(value: object) -> float:
    if not isinstance(value, int | float):
        raise BadSampleError(BAD_RECORD, f"a time is not a number of seconds: {value!r}")
    return float(value)
