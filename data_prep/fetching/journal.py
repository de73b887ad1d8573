"""The folder of `fetch`: a journal of finished URLs, and tables of results.

The journal gets a line whenever a URL is finished, so a run that is killed repeats only what it was
downloading. Files are named after the SHA-256 of their URL, so the table may grow or change its order.
"""

import json
from collections import Counter
from dataclasses import dataclass, field
from datetime import date, time, timedelta
from decimal import Decimal
from pathlib import Path

from data_prep.fetching.url_table import UrlRow, UrlTable
from data_prep.readers.text_files import Record
from data_prep.values import is_missing, shown
from muomni.errors import DataError
from muomni.io.atomic_write import open_atomic
from muomni.io.count_progress import counted
from muomni.io.hashing import sha256_bytes

JOURNAL, RESULTS, TABLE = "journal.jsonl", "results.jsonl", "table.jsonl"
NOT_FETCHED = "not-fetched"
_DIGEST_CHARS, _FOLDER_CHARS = 32, 3

# What happened to a URL: a line of the journal, with `ok`, `temporary`, `reason`, and facts of the response.
Result = dict[str, object]


def digest_of(url: str) -> int:
    """The first 128 bits of the SHA-256 of a URL."""
    return int(sha256_bytes(url.encode(errors="surrogatepass"))[:_DIGEST_CHARS], 16)


def stem_of(digest: int) -> str:
    """Relative path of a file without its extension: one of 4,096 folders, and the rest of the digest."""
    name = f"{digest:0{_DIGEST_CHARS}x}"
    return f"{name[:_FOLDER_CHARS]}/{name[_FOLDER_CHARS:]}"


class Journal:
    """The last result of each URL; memory holds only the positions of the lines.

    Raises `DataError` for a damaged line. A last line without an end was cut by a kill and is removed.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, path = folder, folder / JOURNAL
        self._starts: dict[int, int] = {}
        self._end = 0
        self._writer = path.open("ab")
        self._reader = path.open("rb")
        lines = counted(self._reader, None, f"{folder.name} (journal)", "URLs")
        for number, line in enumerate(lines, start=1):
            if not line.endswith(b"\n"):
                self._writer.truncate(self._end)
                break
            try:
                digest = digest_of(json.loads(line)["url"])
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise DataError(
                    f"{path} line {number} is damaged; delete this line, and rerun"
                ) from error
            self._starts[digest] = self._end
            self._end += len(line)

    def close(self) -> None:
        """Close the file."""
        self._writer.close()
        self._reader.close()

    def get(self, digest: int) -> Result | None:
        """The last result of a URL, if there is one; a file that is gone or has another size does not count."""
        start = self._starts.get(digest)
        if start is None:
            return None
        self._reader.seek(start)
        result: Result = json.loads(self._reader.readline())
        return result if not result["ok"] or self._has_file(result) else None

    def add(self, digest: int, result: Result) -> None:
        """Append the result of a URL."""
        line = json_line(result)
        self._writer.write(line)
        self._writer.flush()
        self._starts[digest] = self._end
        self._end += len(line)

    def _has_file(self, result: Result) -> bool:
        try:
            return (self._folder / str(result["path"])).stat().st_size == result["bytes"]
        except OSError:
            return False


def json_line(record: Record) -> bytes:
    """A record as one line of JSON; NaN becomes null, dates and decimals texts, and invalid UTF-8 is kept.

    Raises `DataError` that names a field with a value that JSON does not have, such as bytes.
    """
    values = {name: None if is_missing(value) else value for name, value in record.items()}
    try:
        text = _encode(values)
    except (TypeError, ValueError):
        name = next(name for name, value in values.items() if not _is_json(value))
        raise DataError(
            f"the table of results is JSON, which cannot hold {name!r}: {shown(values[name])}; remove this "
            "column from the table of URLs"
        ) from None
    return f"{text}\n".encode(errors="surrogatepass")


def _encode(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, default=_as_text)


def _is_json(value: object) -> bool:
    try:
        _encode(value)
    except (TypeError, ValueError):
        return False
    return True


def _as_text(value: object) -> str:
    if isinstance(value, date | time | timedelta | Decimal):
        return str(value)
    raise TypeError(f"no JSON for {type(value).__name__}")


@dataclass(slots=True)
class Summary:
    """Numbers of rows: all, those with a file, and the others by reason; and of distinct files and bytes."""

    num_rows: int = 0
    num_ok: int = 0
    num_temporary: int = 0
    num_files: int = 0
    num_bytes: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    columns: dict[str, None] = field(default_factory=dict)


def write_tables(table: UrlTable, journal: Journal, folder: Path) -> Summary:
    """Write the result of every row, and the table of the rows that have a file."""
    summary = Summary()
    seen: set[int] = set()
    with open_atomic(folder / RESULTS) as results, open_atomic(folder / TABLE) as rows:
        for row in counted(table.rows(), None, f"{folder.name} (results)", "rows"):
            digest = digest_of(row.url)
            result = _row_result(row, journal, digest)
            results.write(json_line({"row": row.number, "url": row.url, **result}))
            summary.num_rows += 1
            if not result["ok"]:
                summary.reasons[str(result["reason"])] += 1
                summary.num_temporary += bool(result["temporary"])
                continue
            record = {table.path_column: result["path"], **row.values, "url": row.url}
            summary.columns |= dict.fromkeys(record)
            rows.write(json_line(record))
            summary.num_ok += 1
            if digest not in seen:
                seen.add(digest)
                summary.num_files += 1
                summary.num_bytes += int(str(result["bytes"]))
    return summary


def _row_result(row: UrlRow, journal: Journal, digest: int) -> Result:
    problem = row.problem
    if problem:
        return failed(problem.reason, problem.message)
    return journal.get(digest) or failed(NOT_FETCHED, "the URL was not fetched", is_temporary=True)


def failed(
    reason: str, message: str, *, is_temporary: bool = False, http_status: int | None = None
) -> Result:
    """The result of a URL without a file."""
    return {
        "ok": False,
        "temporary": is_temporary,
        "http_status": http_status,
        "reason": reason,
        "message": message,
    }
