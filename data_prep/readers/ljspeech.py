"""LJSpeech: `metadata.csv` with lines `ID|text|normalized text` and no header, and `wavs/ID.wav`.

Tables in the style of LJSpeech may have other columns (`bar_tables.py`), and IDs that are file names or paths.
The text of a sample is the normalized one, or the other if that is empty. Group: its words, so that a prompt
recorded twice stays in one split.
"""

from collections.abc import Iterator
from pathlib import Path

from data_prep.corpus import (
    MISSING_MEDIA,
    Item,
    Problem,
    declared_split,
    require_file,
    text_problem,
)
from data_prep.options import ReaderOptions
from data_prep.readers.bar_tables import read_bar_table
from data_prep.readers.rows import Row, speech_item
from data_prep.readers.walk import MediaFiles, audio_files, without_audio_suffix

_NAMES = ("metadata.csv", "metadata.txt")


def read_ljspeech(src: Path, options: ReaderOptions) -> Iterator[Item]:
    """List the lines of SRC/metadata.csv, or of SRC if it is a file, whose name may declare a split.

    Raises `DataError` if it is missing or its columns are not clear.
    """
    paths = [src] if src.is_file() else [path for name in _NAMES if (path := src / name).is_file()]
    path = require_file(paths[0] if paths else src / _NAMES[0], "LJSpeech table")
    root = options.media_root or path.parent
    audio = audio_files(root)
    split = declared_split(path.name)
    for number, fields in read_bar_table(path, options.columns):
        source = f"{path.name} line {number}"
        if isinstance(fields, Problem):
            yield speech_item(Row(f"metadata-line-{number:08d}", source, {}, fields), root, options)
        else:
            yield speech_item(_row(fields, audio, source, split), root, options)


def _row(fields: dict[str, str], audio: MediaFiles, source: str, split: str | None) -> Row:
    name, raw = fields["audio"], fields["text"]
    text = fields.get("normalized", "").strip() or raw
    file = audio.find(name)
    problem = text_problem(raw, "the transcript")
    if file is None and problem is None:
        problem = Problem(MISSING_MEDIA, audio.not_found(name))
    values: dict[str, object] = {
        "audio": file,
        "text": text,
        "split": split,
        "speaker": fields.get("speaker") or ("ljspeech" if name.startswith("LJ") else ""),
        "language": fields.get("language"),
    }
    metadata = {"original_text": "" if problem or " ".join(text.split()) == raw else raw}
    return Row(without_audio_suffix(name), source, values, problem, metadata)
