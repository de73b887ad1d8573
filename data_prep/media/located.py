"""Find the file that a path means, if none has exactly this path.

Manifests differ from the files in capitals, in the Unicode form of accents (NFC, NFD), in spaces around names,
in backslashes, percent-encoding, and suffixes, and in the folders above the corpus. A file is taken only where
no other one could be meant.
"""

import os
import unicodedata
from collections.abc import Iterator
from functools import lru_cache
from urllib.parse import unquote

from data_prep.corpus import MISSING_MEDIA, BadSampleError
from muomni.data.media.formats import AUDIO_FILES, IMAGE_FILES

_SUFFIXES = tuple(f".{extension}" for extension in (*IMAGE_FILES, *AUDIO_FILES))
_MAX_SHOWN_PLACES = 3
_MAX_SHOWN_CHARS = 120
# A large folder may have millions of names.
_NUM_KEPT_FOLDERS = 4


def located(path: str) -> str:
    """The path of an existing file: the given one, else the one that is meant.

    Raises `BadSampleError` with the places that were tried if there is none, or several.
    """
    if os.path.exists(path):
        return path
    tried = [path]
    for folder, names in _readings(path):
        found, place = _in_folder(folder, names), os.path.join(folder, *names)
        if found:
            return found
        if len(tried) < _MAX_SHOWN_PLACES and place not in tried:
            tried.append(place)
    raise BadSampleError(MISSING_MEDIA, _not_found(tried))


def _readings(path: str) -> Iterator[tuple[str, list[str]]]:
    """Existing folders and the names below them that a path may mean, the most literal one first."""
    for text in dict.fromkeys((path, path.replace("\\", "/"), unquote(path.replace("\\", "/")))):
        folder, names = _split(text)
        yield folder, names
        # Of an absolute path of another machine, the last folders are those of this one. A file name
        # alone may belong to another file, unless its folder has the same name.
        for start in range(1, len(names)):
            is_same_folder = names[start - 1] == os.path.basename(folder)
            if start < len(names) - 1 or is_same_folder:
                yield folder, names[start:]


def _split(path: str) -> tuple[str, list[str]]:
    """The deepest folder of a path that exists, and the names below it."""
    folder, names = path, []
    while folder != os.path.dirname(folder) and (not names or not os.path.isdir(folder)):
        folder, name = os.path.split(folder)
        names = [name, *names] if name else names
    return folder, names


def _in_folder(folder: str, names: list[str]) -> str | None:
    """The only file below a folder whose path agrees with `names` in all that matters."""
    for number, name in enumerate(names, start=1):
        is_file = number == len(names)
        present = _names_by_form(folder or os.curdir)
        found = present.get(_form(name), ())
        if not found and is_file:
            with_suffix = (present.get(_form(name + suffix), ()) for suffix in _SUFFIXES)
            found = tuple(each for names in with_suffix for each in names)
        if name not in found and len(found) != 1:
            return None
        folder = os.path.join(folder, name if name in found else found[0])
    return folder


@lru_cache(maxsize=_NUM_KEPT_FOLDERS)
def _names_by_form(folder: str) -> dict[str, tuple[str, ...]]:
    """The names in a folder by what they have in common with other ways to write them."""
    names: dict[str, tuple[str, ...]] = {}
    try:
        for name in os.listdir(folder):
            names[_form(name)] = (*names.get(_form(name), ()), name)
    except OSError:
        return {}
    return names


def _form(name: str) -> str:
    return unicodedata.normalize("NFC", name).strip().casefold()


def _not_found(places: list[str]) -> str:
    *first, last = map(_shown, places)
    return f"found neither {', '.join(first)} nor {last}" if first else f"{last} does not exist"


def _shown(path: str) -> str:
    """A path for a message; of a long one, the end."""
    return repr(path if len(path) <= _MAX_SHOWN_CHARS else f"...{path[-_MAX_SHOWN_CHARS:]}")
