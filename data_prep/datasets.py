"""Finds the datasets that a command line names."""

from pathlib import Path

from muomni.data.manifest import MANIFEST_NAME, Manifest


def find_manifests(folders: list[Path]) -> list[Manifest]:
    """The datasets in the given folders or directly below them.

    Raises `DataError` for a folder without any.
    """
    found = []
    for folder in folders:
        inside = sorted(folder.glob(f"*/{MANIFEST_NAME}"))
        if (folder / MANIFEST_NAME).is_file() or not inside:
            found.append(Manifest.load(folder))
        else:
            found += [Manifest.load(path.parent) for path in inside]
    return found
