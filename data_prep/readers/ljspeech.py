"""LJSpeech: `metadata.csv` with lines `ID|text|normalized text` and no header, and `wavs/ID.wav`.

The text of a sample is the third column, or the second if the third is empty. Group: its words, so that
a prompt recorded twice stays in one split.
"""

from collections.abc import Iterator
from pathlib import Path

from data_prep.corpus import (
    BAD_RECORD,
    Item,
    Problem,
    clean_key,
    require_file,
    text_problem,
    transcript_group,
)
from data_prep.options import ReaderOptions
from data_prep.readers.text_files import read_text


def read_ljspeech(src: Path, options: ReaderOptions) -> Iterator[Item]:
    """List the lines of SRC/metadata.csv; raises `DataError` if it is missing."""
    path = require_file(src / "metadata.csv", "LJSpeech table")
    text = read_text(path)
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield _item(line.rstrip("\r"), number, src, options)


def _item(line: str, number: int, src: Path, options: ReaderOptions) -> Item:
    fields = line.split("|")
    source = f"metadata.csv line {number}"
    if len(fields) not in (2, 3) or not fields[0].strip():
        message = f"expected ID|text|normalized text, found {len(fields)} fields"
        return Item(
            key=f"metadata-line-{number:08d}",
            group=source,
            source=source,
            problem=Problem(BAD_RECORD, message),
        )
    name = fields[0].strip()
    raw = fields[1]
    normalized = fields[2] if len(fields) == 3 and fields[2].strip() else raw
    problem = text_problem(normalized, "the transcript") or text_problem(raw, "the transcript")
    text = " ".join(normalized.split())
    metadata = {
        "speaker": options.speaker or "ljspeech",
        "language": options.language,
        "original_text": "" if problem or text == raw else raw,
    }
    return Item(
        key=clean_key(name),
        group=transcript_group(text.encode(errors="replace").decode()),
        source=source,
        texts=() if problem else (text,),
        media=(str(src / "wavs" / f"{name}.wav"),),
        metadata=metadata,
        problem=problem,
    )
