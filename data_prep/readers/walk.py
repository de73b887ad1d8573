"""Search a folder for files: through links to folders, without clutter, with suffixes in any case.

Every reader that searches folders uses these functions, so that all see the same files and count those
that they skip.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from data_prep.skipped_files import SkippedFiles
from muomni.data.shards.tar_index import clutter_kind
from muomni.errors import DataError


def walk(root: Path, skipped: SkippedFiles) -> Iterator[tuple[Path, list[str]]]:
    """Each folder below `root`, in sorted order, with the sorted names of its files.

    Links to folders are followed after all other folders, and every folder is listed once, so cycles end.
    Raises `DataError` for a folder that cannot be listed.
    """
    seen: set[tuple[int, int]] = set()
    waiting = [root]
    while waiting:
        links: list[Path] = []
        for start in waiting:
            if start is not root and _identity(start) in seen:
                skipped.num_links += 1
                continue
            yield from _walk_tree(start, seen, links, skipped)
        waiting = sorted(links)


def find_files(root: Path, suffixes: tuple[str, ...], skipped: SkippedFiles) -> list[Path]:
    """All files below `root` with one of the suffixes (in lower case), sorted; others are counted."""
    found = []
    for folder, names in walk(root, skipped):
        for name in names:
            if name.lower().endswith(suffixes):
                found.append(folder / name)
            else:
                skipped.add_other(name)
    return sorted(found)


def _walk_tree(
    start: Path, seen: set[tuple[int, int]], links: list[Path], skipped: SkippedFiles
) -> Iterator[tuple[Path, list[str]]]:
    """Walk real folders; links to folders are appended to `links`."""
    for path, subfolders, names in os.walk(start, onerror=_refuse):
        folder = Path(path)
        seen.add(_identity(folder))
        kept = []
        for name in sorted(subfolders):
            if kind := clutter_kind(name):
                skipped.clutter[kind] += sum(len(files) for _, _, files in os.walk(folder / name))
            elif (folder / name).is_symlink():
                links.append(folder / name)
            elif _identity(folder / name) not in seen:
                kept.append(name)
        subfolders[:] = kept
        files = []
        for name in sorted(names):
            if kind := clutter_kind(name):
                skipped.clutter[kind] += 1
            else:
                files.append(name)
        yield folder, files


def _refuse(error: OSError) -> None:
    raise DataError(
        f"cannot list the folder {error.filename}: {error.strerror}; check its permissions"
    )


def _identity(folder: Path) -> tuple[int, int]:
    facts = os.stat(folder)
    return facts.st_dev, facts.st_ino
