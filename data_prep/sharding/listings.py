"""JSON-lines listings of skipped samples, one file per shard, in `quarantine/` and `filtered/`."""

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from muomni.data.text.graphemes import cut_middle
from muomni.errors import DataError
from muomni.io.atomic_write import write_atomic

# Bad samples, and valid samples that a filter dropped.
QUARANTINE = "quarantine"
FILTERED = "filtered"

# Keys: key, source, reason, and message.
SkippedSample = dict[str, str]
_MAX_CHARS = 400


def listing_path(folder: Path, shard_path: str) -> Path:
    """Path of a shard's listing in one of the two folders."""
    return folder / Path(shard_path).with_suffix(".jsonl").name


def store_listing(folder: Path, shard_path: str, skipped: list[SkippedSample]) -> None:
    """Write the listing of a shard; an empty one is deleted, including that of an earlier run."""
    path = listing_path(folder, shard_path)
    if skipped:
        lines = "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in skipped)
        write_atomic(path, lines.encode())
    else:
        with suppress(FileNotFoundError):
            path.unlink()


def load_listing(folder: Path, shard_path: str) -> list[SkippedSample]:
    """The listing of a shard; raises `DataError` if it is damaged."""
    path = listing_path(folder, shard_path)
    return list(_lines(path)) if path.exists() else []


def all_listed(folder: Path) -> Iterator[SkippedSample]:
    """All samples listed in a folder."""
    for path in sorted(folder.glob("*.jsonl")):
        yield from _lines(path)


def printable(text: str) -> str:
    """The text with invalid UTF-8 escaped, and cut in the middle if it is long."""
    return cut_middle(text.encode(errors="backslashreplace").decode(), _MAX_CHARS)


def _lines(path: Path) -> Iterator[SkippedSample]:
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            if not {"key", "source", "reason", "message"} <= entry.keys():
                raise ValueError("a line lacks key, source, reason, or message")
            yield entry
    except (ValueError, AttributeError) as error:
        raise DataError(
            f"{path} is damaged ({error}); restore it, or create the dataset again"
        ) from error
