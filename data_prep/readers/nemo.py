"""NeMo manifests: JSON lines {"audio_filepath", "text", "duration"}, and "offset" for segments.

A line with an offset is the segment [offset, offset + duration) of its audio file; a line without is the
whole file. Paths are relative to the manifest or to `--media`. Optional fields: "speaker" and "lang".
"""

from collections.abc import Iterator
from pathlib import Path

from data_prep.corpus import BAD_RECORD, Clip, Item, Problem, declared_split
from data_prep.options import ReaderOptions
from data_prep.readers.rows import Row, speech_item
from data_prep.readers.text_files import Record, read_json_lines


def read_nemo(src: Path, options: ReaderOptions) -> Iterator[Item]:
    """List the lines of a manifest, whose name may declare a split, such as `train_manifest.json`.

    Raises `DataError` if it is missing.
    """
    root = options.media_root or src.parent
    for number, record in read_json_lines(src, "NeMo manifest"):
        name, source = f"{src.stem}-{number:08d}", f"{src.name} line {number}"
        if isinstance(record, Problem):
            yield speech_item(Row(name, source, {}, record), root, options)
            continue
        values: dict[str, object] = {
            **{column: record.get(column) for column in ("text", "speaker")},
            "audio": record.get("audio_filepath"),
            "language": record.get("lang") or record.get("language"),
            "split": declared_split(src.name),
        }
        problem = None
        if values["audio"] and record.get("offset") is not None:
            values["audio"] = clip = _clip(record, root / str(values["audio"]))
            if clip is None:
                problem = Problem(BAD_RECORD, "offset and duration are not both numbers")
        yield speech_item(Row(name, source, values, problem), root, options)


def _clip(record: Record, path: Path) -> Clip | None:
    offset, duration = record.get("offset"), record.get("duration")
    if not isinstance(offset, int | float) or not isinstance(duration, int | float):
        return None
    return Clip(str(path), float(offset), float(duration))
