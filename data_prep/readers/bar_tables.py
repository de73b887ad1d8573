"""Tables in the style of LJSpeech: fields separated by `|`, without quotes, usually without a header.

    ID|text                     ID|text|normalized text        ID|text|normalized text|speaker
    path|speaker|text           ID|text|speaker                path|speaker|language|text

A header line or `--columns` names the columns; otherwise they follow from what all lines have in common:
texts have spaces, and speakers repeat. What is not clear is an error that shows how to name the columns.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from data_prep.corpus import BAD_RECORD, Problem
from data_prep.readers.text_files import read_text
from data_prep.readers.walk import audio_by_stem
from data_prep.values import shown
from muomni.errors import DataError

_HEADERS = {
    "audio": "id file audio audio_file audio_path wav wav_file wav_path wav_filename path filename "
    "file_name name utterance",
    "text": "text transcription transcript raw_text sentence",
    "normalized": "normalized normalized_text text_normalized normalized_transcription",
    "speaker": "speaker speaker_name speaker_id spk sid",
    "language": "language lang language_id",
}
_NAMES = {header: name for name, headers in _HEADERS.items() for header in headers.split()}
# Columns after the first: whether a value has a space ("w") or none has ("t"), and their names.
_PATTERNS = {
    "w": ("text",),
    "t": ("text",),
    "ww": ("text", "normalized"),
    "wt": ("text", "speaker"),
    "tw": ("speaker", "text"),
    "wwt": ("text", "normalized", "speaker"),
    "tww": ("speaker", "text", "normalized"),
    "ttw": ("speaker", "language", "text"),
}


def read_bar_table(
    path: Path, columns: dict[str, str]
) -> Iterator[tuple[int, dict[str, str] | Problem]]:
    """Line number (from 1) and fields of each line by name: `audio`, `text`, and others if present.

    `columns` (from `--columns`) maps names to headers or to numbers from 1. Raises `DataError` if the file is
    missing or its columns are not clear.
    """
    lines = enumerate(read_text(path).split("\n"), start=1)
    rows = [(number, line.rstrip("\r").split("|")) for number, line in lines if line.strip()]
    header = [field.strip().lower() for field in rows[0][1]] if rows else []
    has_header = len(header) > 1 and _NAMES.get(header[0]) == "audio" and header[1] in _NAMES
    if has_header:
        rows = rows[1:]
    width = Counter(len(fields) for _, fields in rows).most_common(1)[0][0] if rows else 0
    if columns:
        names = _named(path, columns, header if has_header else [])
    elif has_header:
        names = {_NAMES[field]: index for index, field in enumerate(header) if field in _NAMES}
    else:
        names = _guessed(path, [fields for _, fields in rows if len(fields) == width])
    is_plain = names == {"audio": 0, "text": 1, "normalized": 2}
    for number, fields in rows:
        if len(fields) == width or (is_plain and len(fields) == 2):
            values = {n: fields[i].strip() for n, i in names.items() if i < len(fields)}
            values["text"] = fields[names["text"]]
            message = "" if values["audio"] else "the line has no name of an audio file"
        else:
            values, message = {}, f"the line has {len(fields)} fields, most lines have {width}"
        yield number, Problem(BAD_RECORD, message) if message else values


def _named(path: Path, columns: dict[str, str], header: list[str]) -> dict[str, int]:
    """The columns of `--columns`, as headers or numbers."""
    names = {}
    for name, column in columns.items():
        if column.lower() in header:
            names[name] = header.index(column.lower())
        elif column.isdigit() and int(column) > 0:
            names[name] = int(column) - 1
        else:
            raise DataError(
                f"{path} has no column {column!r}; --columns takes numbers from 1"
                + (f", or one of {', '.join(header)}" if header else "")
            )
    for name in ("audio", "text"):
        if name not in names:
            raise DataError(f"--columns does not name the column of {name!r} in {path}")
    return names


def _guessed(path: Path, rows: list[list[str]]) -> dict[str, int]:
    """The columns of a table without header, by what all its lines have in common."""
    values = [[row[i].strip() for row in rows] for i in range(1, len(rows[0]))] if rows else []
    if any(values):
        # Empty columns at the end are texts that were not normalized.
        while len(values) > 1 and not any(values[-1]):
            values.pop()
    pattern = "".join("w" if any(" " in text for text in column) else "t" for column in values)
    if pattern == "tt":
        pattern = "tw" if _repeats(values[0]) and values[0] != values[1] else "ww"
    elif pattern == "tw" and not _repeats(values[0]) and not audio_by_stem([rows[0][0].strip()]):
        pattern = "?"
    if not values or pattern in _PATTERNS:
        return {
            "audio": 0,
            **{n: i for i, n in enumerate(_PATTERNS.get(pattern, ("text",)), start=1)},
        }
    raise DataError(
        f"the columns of {path} are not clear: {shown('|'.join(rows[0]))}; name them, for example with "
        "--columns audio=1,text=2,normalized=3 or --columns audio=1,speaker=2,text=3"
    )


def _repeats(column: list[str]) -> bool:
    return len(set(column)) < len(column)
