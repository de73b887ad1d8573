"""Search a folder for files: through links to folders, without clutter, with suffixes in any case.

Every reader that searches folders uses these functions, so that all see the same files and count those
that they skip.
"""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from data_prep.skipped_files import SkippedFiles
from muomni.data.media.formats import AUDIO_FILES, IMAGE_FILES
from muomni.data.shards.tar_index import clutter_kind
from muomni.errors import DataError

# The preferred one first, if a corpus has a file in several formats.
AUDIO_SUFFIXES = tuple(f".{extension}" for extension in AUDIO_FILES)
IMAGE_SUFFIXES = tuple(f".{extension}" for extension in IMAGE_FILES)


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


def audio_by_stem(names: Iterable[str]) -> dict[str, str]:
    """The audio files among `names`, by name without suffix; of several, the first in `AUDIO_SUFFIXES`."""
    found: dict[str, str] = {}
    for name in sorted(names, key=_audio_rank):
        if _audio_rank(name) < len(AUDIO_SUFFIXES):
            found.setdefault(os.path.splitext(name)[0], name)
    return found


def without_audio_suffix(name: str) -> str:
    """`a.b` for `a.b.WAV` and for `a.b`."""
    stem = os.path.splitext(name)[0]
    return stem if audio_by_stem([name]) else name


class MediaFiles:
    """The files below a folder that have one of some suffixes, found by name, by path, or without suffix."""

    def __init__(self, root: Path, suffixes: tuple[str, ...], folder: str = "") -> None:
        """Of several files of a name, one in `folder` is preferred, and a suffix that comes earlier."""
        self._root, self._suffixes, self._folder = root, suffixes, folder
        self._paths: dict[str, list[str]] = {}
        for path in find_files(root, suffixes, SkippedFiles()) if root.is_dir() else ():
            relative = path.relative_to(root).as_posix()
            self._paths.setdefault(self._stem(path.name), []).append(relative)

    def find(self, name: str) -> str | None:
        """The path relative to the folder of the file that `name` stands for; None if none or several do."""
        for matches in self._matches(name):
            if len({self._stem(path) for path in matches}) == 1:
                return min(matches, key=self._rank)
        return None

    def not_found(self, name: str) -> str:
        """Why `find` found nothing, with the places it tried."""
        base = self._stem(name).rpartition("/")[2]
        paths = self._paths.get(base, [])
        if paths:
            return f"{name!r} may be {paths[0]} or {paths[1]} in {self._root}; give its path"
        tried = [name, *([f"{self._folder}/{base}.*"] if self._folder else [])]
        return (
            f"no file for {name!r}: tried {', '.join(tried)}, and {base}.* in all folders of "
            f"{self._root}; check --media"
        )

    def _matches(self, name: str) -> Iterator[list[str]]:
        """Files that may be meant, from exact to similar."""
        name = name.replace("\\", "/").lower().removeprefix("./")
        stem = self._stem(name)
        paths = self._paths.get(stem.rpartition("/")[2], [])
        preferred = f"{self._folder}/{stem}"
        yield [path for path in paths if path.lower() == name]
        yield [path for path in paths if self._stem(path) == stem]
        yield [path for path in paths if self._stem(path) == preferred]
        yield [path for path in paths if path.lower().endswith(f"/{name}")]
        yield [path for path in paths if self._stem(path).endswith(f"/{stem}")]
        yield paths

    def _stem(self, path: str) -> str:
        stem, suffix = os.path.splitext(path.replace("\\", "/").lower())
        return stem if suffix in self._suffixes else stem + suffix

    def _rank(self, path: str) -> int:
        return self._suffixes.index(os.path.splitext(path)[1].lower())


def audio_files(root: Path) -> MediaFiles:
    """The audio files below a folder, where those in `wavs` are preferred."""
    return MediaFiles(root, AUDIO_SUFFIXES, "wavs")


def _audio_rank(name: str) -> int:
    suffix = os.path.splitext(name)[1].lower()
    return AUDIO_SUFFIXES.index(suffix) if suffix in AUDIO_SUFFIXES else len(AUDIO_SUFFIXES)


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
