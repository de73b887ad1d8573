"""Any bytes as a table or text: rows, or a message that names the file and, within it, the line or row."""

import bz2
import csv
import gzip
import io
import re
from pathlib import Path

import pyarrow
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from data_prep.corpus import Item
from data_prep.options import ReaderOptions
from data_prep.readers import find_reader
from data_prep.readers.csv_rows import split_rows
from data_prep.sharding.shard_plan import ShardingOptions, build_plan
from muomni.errors import DataError

FUZZ = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
_PIECES = [
    b'"', b'""', b"\n", b"\r", b"\r\n", b",", b"\t", b";", b"{", b"}", b"[", b"]", b":", b"\\", b"\\ud800",
    b"\0", b"\xff", b"\xef\xbb\xbf", b"\xff\xfe", b"\xe2\x80\xa8", b"null", b"NaN", b"1e999", b"-0", b"9" * 50,
    b"text", b"image", b"caption", b"audio", b"id", b'"text"', b'{"text": "a"}', b'{"text": ["a"]}', b"sep=;",
    b"text,id\n", b"audio\ttext\n", b'{"image": "a.png", "caption": 7}', b"a.png", b"../x", b"file://", b"~/",
    b"\x1f\x8b", b"BZh91AY&SY", b"\x28\xb5\x2f\xfd", b"PK\x03\x04", b"PAR1", b"\xe0\xa4", b" ", b"word",
]  # fmt: skip
CONTENT = st.one_of(
    st.binary(max_size=200), st.lists(st.sampled_from(_PIECES), max_size=40).map(b"".join)
)
PACKED = CONTENT.flatmap(
    lambda data: st.sampled_from(
        [
            data,
            gzip.compress(data),
            bz2.compress(data),
            pyarrow.compress(data, "zstd", asbytes=True),
        ]
    )
)
FORMATS = [
    ("text", "csv"), ("text", "tsv"), ("text", "jsonl"), ("text", "txt"), ("text", "parquet"),
    ("image-caption", "csv"), ("image-caption", "jsonl"), ("image-caption", "cc3m"),
    ("speech", "tsv"), ("speech", "jsonl"),
]  # fmt: skip


def _read(src: Path, task: str, form: str, **options: object) -> list[Item]:
    """The rows of a file, which may be none, as items that can be planned; a message that names the file."""
    reader_options = ReaderOptions(**options)  # type: ignore[arg-type]
    try:
        items = list(find_reader(task, form)(src, reader_options))
    except DataError as error:
        assert str(src) in str(error) and "\n" not in str(error)
        assert len(str(error)) < 600
        return []
    for item in items:
        assert re.search(r"\d+$", item.source), item.source
        assert not item.problem or len(item.problem.message) < 400
        assert item.problem or item.texts or item.span
    keys = {item.key: item for item in items}
    if keys:
        sharding = ShardingOptions("x", task, form, reader_options.as_text(), src)  # type: ignore[arg-type]
        build_plan(keys.values(), sharding)
    return items


@pytest.mark.parametrize(("task", "form"), FORMATS)
@FUZZ
@given(content=PACKED)
@example(content=b"")
@example(content=b"PAR1" + bytes(8) + b"PAR1")
@example(content=gzip.compress(b'{"text": "a"}\n')[:-3])
def test_any_bytes_are_rows_or_a_message(
    tmp_path: Path, task: str, form: str, content: bytes
) -> None:
    src = tmp_path / "file"
    src.write_bytes(content)
    _read(src, task, form)


@FUZZ
@given(
    content=CONTENT, quotes=st.sampled_from(["", "yes", "no"]), delimiter=st.sampled_from(",;\t|x")
)
def test_any_bytes_with_any_options(
    tmp_path: Path, content: bytes, quotes: str, delimiter: str
) -> None:
    src = tmp_path / "file"
    src.write_bytes(content)
    for form in ("csv", "tsv"):
        _read(src, "text", form, quotes=quotes, delimiter=delimiter)


CELL = st.text(st.sampled_from('a1 ",\n.é'), max_size=8)


@FUZZ
@given(rows=st.lists(st.tuples(CELL, CELL, CELL), min_size=1, max_size=8))
def test_every_line_is_in_a_row_or_in_a_message(rows: list[tuple[str, ...]]) -> None:
    """No line of a table is swallowed: each is read as a row, or named, or part of a quoted field."""
    lines = ["".join([",".join(row).replace("\n", " "), "\n"]) for row in rows]
    num_read = 0
    for fields in split_rows(iter(lines), ",", has_quotes=True):
        if isinstance(fields, list):
            num_read += 1 + sum(cell.count("\n") for cell in fields)
        else:
            num_read += 1
    assert num_read == len(lines)


@FUZZ
@given(rows=st.lists(st.tuples(st.text(max_size=9), st.text(max_size=9)), min_size=1, max_size=6))
def test_rows_written_as_csv_are_read_unchanged_unless_they_look_like_two(
    rows: list[tuple[str, str]],
) -> None:
    rows = [(a.replace("\r", ""), b.replace("\r", "") + "?") for a, b in rows]
    file = io.StringIO()
    csv.writer(file, quoting=csv.QUOTE_ALL).writerows(rows)
    lines = io.StringIO(file.getvalue(), newline="")
    read = list(split_rows(iter(lines), ",", has_quotes=True))
    assert read == [list(row) for row in rows]
