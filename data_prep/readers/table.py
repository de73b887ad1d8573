"""Generic tables: CSV or TSV with a header, or JSONL with an object a line.

Standard columns: `id`, `image` and `caption`; `audio` and `text`; `text`; and, where present, `group`,
`split`, `speaker`, `language`. `--columns image=path,caption=title` gives other names. Media paths are
relative to the table's folder, or to `--media`.
"""

import csv
import json
from collections.abc import Iterator
from pathlib import Path

from data_prep.corpus import (
    BAD_RECORD,
    EMPTY_TEXT,
    Item,
    Problem,
    ReaderOptions,
    clean_key,
    picture_group,
    require_file,
    text_problem,
    transcript_group,
)
from muomni.data.manifest import SPLIT_NAMES, hash64
from muomni.errors import DataError

Row = dict[str, object]
_MAX_FIELD_CHARS = 1 << 30


def read_image_table(src: Path, options: ReaderOptions) -> Iterator[Item]:
    """Rows with a picture and its caption; `caption` may be a list in JSONL."""
    root = options.media_root or src.parent
    for number, row in _rows(src, options, ("image", "caption")):
        image = str(row.get("image") or "")
        value = row.get("caption")
        captions = [str(text) for text in value] if isinstance(value, list) else [str(value or "")]
        texts = tuple(" ".join(text.split()) for text in captions if text.strip())
        problem = next((p for p in (text_problem(t, "the caption") for t in texts) if p), None)
        if not texts:
            problem = Problem(EMPTY_TEXT, "the caption is empty")
        group = str(row.get("group") or "") or picture_group(image)
        yield _item(src, number, row, group, texts, str(root / image) if image else "", problem)


def read_speech_table(src: Path, options: ReaderOptions) -> Iterator[Item]:
    """Rows with a recording and its text; group: column `group`, else the words of the text."""
    root = options.media_root or src.parent
    for number, row in _rows(src, options, ("audio", "text")):
        audio = str(row.get("audio") or "")
        text = str(row.get("text") or "")
        problem = text_problem(text, "the transcript")
        text = " ".join(text.split())
        group = str(row.get("group") or "")
        if not group and options.group_by == "speaker":
            group = f"speaker:{row.get('speaker', '')}"
        group = group or transcript_group(text.encode(errors="replace").decode())
        metadata = {
            "speaker": options.speaker or str(row.get("speaker") or ""),
            "language": options.language or str(row.get("language") or ""),
        }
        media = str(root / audio) if audio else ""
        yield _item(src, number, row, group, (text,), media, problem, metadata)


def read_text_table(src: Path, options: ReaderOptions) -> Iterator[Item]:
    """Rows with a text each; group: column `group`, else the words of the text."""
    for number, row in _rows(src, options, ("text",)):
        text = str(row.get("text") or "")
        problem = text_problem(text, "the text")
        words = " ".join(text.lower().split()).encode(errors="surrogatepass")
        group = str(row.get("group") or "") or f"text:{hash64(words):016x}"
        yield _item(src, number, row, group, (text,), None, problem)


def _item(
    src: Path,
    number: int,
    row: Row,
    group: str,
    texts: tuple[str, ...],
    media: str | None,
    problem: Problem | None,
    metadata: dict[str, str] | None = None,
) -> Item:
    if media == "":
        problem = Problem(BAD_RECORD, "the row names no media file")
    if "" in row:
        problem = Problem(BAD_RECORD, str(row[""]))
    split = str(row.get("split") or "") or None
    if split is not None and split not in SPLIT_NAMES:
        problem = Problem(BAD_RECORD, f"split {split!r} is none of {', '.join(SPLIT_NAMES)}")
    return Item(
        key=clean_key(str(row.get("id") or f"{src.stem}-{number:08d}")),
        group=group.encode(errors="replace").decode(),
        source=f"{src.name} row {number}",
        declared_split=split,
        texts=() if problem else texts,
        media=(media,) if media else (),
        metadata={} if problem or metadata is None else metadata,
        problem=problem,
    )


def _rows(src: Path, options: ReaderOptions, needed: tuple[str, ...]) -> Iterator[tuple[int, Row]]:
    """Number and content of each row, under the standard column names; problems under ""."""
    require_file(src, "table")
    renamed = {theirs: ours for ours, theirs in options.columns.items()}
    read = _read_jsonl if src.suffix in (".jsonl", ".json", ".ndjson") else _read_csv
    with src.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        for number, row in read(src, file):
            row = {renamed.get(name, name): value for name, value in row.items()}
            missing = [name for name in needed if name not in row]
            if missing and "" not in row and (number == 1 or read is _read_csv):
                raise DataError(
                    f"{src} has no column {missing[0]!r} (it has {', '.join(row)}); "
                    f"name it with --columns {missing[0]}=NAME"
                )
            yield number, row


def _read_csv(src: Path, file: Iterator[str]) -> Iterator[tuple[int, Row]]:
    csv.field_size_limit(_MAX_FIELD_CHARS)
    rows = csv.reader(file, delimiter="\t" if src.suffix == ".tsv" else ",")
    header = next(rows, None)
    if header is None:
        raise DataError(f"table {src} is empty, without even a line of column names; check --src")
    try:
        for number, fields in enumerate(rows, start=1):
            if not fields:
                continue
            row: Row = dict(zip(header, fields, strict=False))
            if len(fields) != len(header):
                row = dict.fromkeys(header, "")
                row[""] = f"the row has {len(fields)} fields, the header {len(header)}"
            yield number, row
    except csv.Error as error:
        raise DataError(f"cannot read {src}: {error}") from error


def _read_jsonl(_src: Path, file: Iterator[str]) -> Iterator[tuple[int, Row]]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            row: object = json.loads(line)
        except ValueError as error:
            yield number, {"": f"the line is no JSON: {error}"}
            continue
        yield number, dict(row) if isinstance(row, dict) else {"": "the line is no JSON object"}
