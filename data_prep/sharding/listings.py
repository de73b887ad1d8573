"""Lists of samples that were left out, JSON lines, a file a shard: `quarantine/` and `filtered/`."""

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from muomni.errors import DataError
from muomni.io.atomic_write import write_atomic

# Bad samples, and sound ones that a filter left out.
QUARANTINE = "quarantine"
FILTERED = "filtered"

# Keys: key, source, reason, message.
LeftOut = dict[str, str]


def listing_path(folder: Path, shard_path: str) -> Path:
    """The list of a shard in one of the two folders."""
    return folder / Path(shard_path).with_suffix(".jsonl").name


def store_listing(folder: Path, shard_path: str, left_out: list[LeftOut]) -> None:
    """List what a shard leaves out; an empty list leaves no file, not even of an earlier run."""
    path = listing_path(folder, shard_path)
    if left_out:
        lines = "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in left_out)
        write_atomic(path, lines.encode())
    else:
        with suppress(FileNotFoundError):
            path.unlink()


def load_listing(folder: Path, shard_path: str) -> list[LeftOut]:
    """What a shard leaves out; raises `DataError` for a list that is damaged."""
    path = listing_path(folder, shard_path)
    return list(_lines(path)) if path.exists() else []


def all_listed(folder: Path) -> Iterator[LeftOut]:
    """The samples of all lists in a folder."""
    for path in sorted(folder.glob("*.jsonl")):
        yield from _lines(path)


def printable(text: str) -> str:
    """A text that UTF-8 can hold: bytes that were none are written as escapes."""
    return text.encode(errors="backslashreplace").decode()


def _lines(path: Path) -> Iterator[LeftOut]:
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            if not {"key", "source", "reason", "message"} <= entry.keys():
                raise ValueError("a line lacks key, source, reason or message")
            yield entry
    except (ValueError, AttributeError) as error:
        raise DataError(
            f"{path} is damaged ({error}); restore it, or make the dataset again"
        ) from error
