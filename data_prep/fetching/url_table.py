"""The rows of a table of URLs: CSV, TSV, JSON lines, or Parquet files, one row at a time."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from yarl import URL

from data_prep.corpus import BadSampleError, Problem
from data_prep.readers.text_files import (
    Record,
    read_delimited,
    read_json_records,
    require_columns,
)
from data_prep.values import shown, text_value
from muomni.errors import DataError

if TYPE_CHECKING:
    import pyarrow

FORMATS = ("csv", "tsv", "jsonl", "parquet")
BAD_URL = "bad-url"
_MAX_URL_CHARS = 8192
_ROWS_AT_A_TIME = 1024


@dataclass(frozen=True, slots=True)
class UrlTable:
    """A table; `columns` maps our names to its names, of which `url` is needed.

    `path_column` gets the path of the downloaded file, so the table must not have it.
    """

    src: Path
    form: str
    columns: dict[str, str]
    path_column: str

    def rows(self) -> Iterator["UrlRow"]:
        """All rows, numbered from 1; raises `DataError` as the readers of tables do."""
        theirs = set(self.columns.values())
        is_checked = False
        for number, record in self._records():
            if isinstance(record, Problem):
                yield UrlRow(number, "", {}, record)
                continue
            values = {
                name: value
                for name, value in record.items()
                if name not in theirs and name not in self.columns
            }
            values |= {ours: record[name] for ours, name in self.columns.items() if name in record}
            if not is_checked or self.form == "jsonl":
                self._check(values, is_first=not is_checked)
                is_checked = True
            yield self._row(number, values)

    def _row(self, number: int, values: Record) -> "UrlRow":
        try:
            url = text_value(values.pop("url", None), "url").strip()
        except BadSampleError as error:
            return UrlRow(number, "", values, error.problem)
        try:
            return UrlRow(number, url, values, target=parse_url(url))
        except ValueError as error:
            return UrlRow(number, url, values, Problem(BAD_URL, str(error)))

    def _check(self, values: Record, is_first: bool) -> None:
        """Raise `DataError` for a needed column that is missing, or a column that would be replaced."""
        if is_first:
            require_columns(self.src, tuple(values), ("url",))
        if self.path_column in values:
            raise DataError(
                f"column {self.path_column!r} of {self.src} would be replaced by the paths of the downloaded "
                f"files; rename it with --columns NAME={self.path_column}"
            )

    def _records(self) -> Iterator[tuple[int, Record | Problem]]:
        if self.form == "parquet":
            return enumerate(_parquet_records(self.src), start=1)
        if self.form == "jsonl":
            return read_json_records(self.src, "table")
        is_tsv = self.form == "tsv"
        return read_delimited(self.src, "\t" if is_tsv else ",", has_quotes=not is_tsv)


@dataclass(frozen=True, slots=True)
class UrlRow:
    """A row: its URL as in the table and to request, its other values, and why it cannot be fetched."""

    number: int
    url: str
    values: Record
    problem: Problem | None = None
    target: URL | None = None


def parse_url(text: str) -> URL:
    """A URL to request; spaces and other characters than ASCII are encoded, everything else is kept.

    Raises `ValueError` with the reason for text that is not an HTTP or HTTPS URL.
    """
    if not text:
        raise ValueError("the row has no URL")
    if len(text) > _MAX_URL_CHARS:
        raise ValueError(f"the URL has more than {_MAX_URL_CHARS} characters")
    # Encoding again would change signed URLs.
    is_encoded = text.isascii() and text.isprintable() and " " not in text
    try:
        text.encode()
        url = URL(text, encoded=is_encoded)
        is_complete = bool(url.scheme and url.raw_host and url.port)
        (url.raw_host or "").encode("idna")  # as the look-up does
    except ValueError as error:
        raise ValueError(f"{shown(text)} is not a URL: {error}") from None
    if url.scheme not in ("http", "https"):
        raise ValueError(f"{shown(text)} is not an HTTP or HTTPS URL")
    if not is_complete:
        raise ValueError(f"{shown(text)} is not a URL: it names no host")
    return url.with_fragment(None)


def _parquet_records(src: Path) -> Iterator[Record]:
    """The rows of a Parquet file, or of all *.parquet below a folder, without columns of bytes."""
    if not src.exists():
        raise DataError(f"Parquet source {src} does not exist; check --src")
    paths = [src] if src.is_file() else sorted(src.rglob("*.parquet"))
    if not paths:
        raise DataError(f"{src} contains no *.parquet file; check --src")
    import pyarrow
    import pyarrow.parquet

    for path in paths:
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                names = [field.name for field in file.schema_arrow if not _has_bytes(field.type)]
                for batch in file.iter_batches(_ROWS_AT_A_TIME, columns=names):
                    yield from batch.to_pylist()
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"cannot read {path}: {error}; download it again") from error


def _has_bytes(kind: "pyarrow.DataType") -> bool:
    """Whether values of a type contain bytes, which JSON lines cannot hold."""
    import pyarrow.types as types

    tests = (types.is_binary, types.is_large_binary, types.is_fixed_size_binary)
    inner = (kind.field(number).type for number in range(kind.num_fields))
    return any(test(kind) for test in tests) or any(map(_has_bytes, inner))
