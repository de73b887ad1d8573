"""Paths as a user writes them: `~` is the home folder, and relative paths start at the working directory."""

import os
from pathlib import Path

_MAX_NAME_BYTES = 255
_PIPE = "pipe:"


def absolute(text: str) -> str:
    """Return a path or URL in a form that does not depend on the working directory.

    `~` is expanded, and a relative path becomes absolute; URLs and `pipe:COMMAND` stay as they are. Raises
    ValueError for a text that names no path.
    """
    if not text.strip():
        raise ValueError("a path must not be empty")
    if text.startswith(_PIPE) or "://" in text:
        return text
    if "\0" in text or any(len(os.fsencode(name)) > _MAX_NAME_BYTES for name in text.split("/")):
        raise ValueError("this is not a path: a name is too long or has a null character")
    try:
        return str(Path(text).expanduser().absolute())
    except RuntimeError:
        raise ValueError(f"the home folder of {text.split('/')[0]} is unknown") from None


def portable(path: Path, folder: Path) -> str:
    """Return a path below `folder` relative to it, so that both can be moved, and others as absolute."""
    target, base = path.absolute(), folder.absolute()
    return str(target.relative_to(base)) if target.is_relative_to(base) else str(target)
