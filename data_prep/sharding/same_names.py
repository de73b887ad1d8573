"""Groups of images that share a file name in several folders, as frames and renderings do.

A reader groups an image by its file name, so that it is in the same split in every corpus that has it. In
a corpus where that name stands for several files (`scene1/rgb.png` and `scene2/rgb.png`), each file is its
own group instead.
"""

import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from data_prep.corpus import Cell, Item, image_group, image_path_group


def separate_same_names(items: Iterable[Item], roots: list[Path]) -> list[Item]:
    """The items, with groups by path below one of `roots` for names that several files have."""
    items = list(items)
    paths: dict[str, str] = {}
    shared: set[str] = set()
    for item in items:
        path = _image_path(item)
        if path is not None and paths.setdefault(item.group, path) != path:
            shared.add(item.group)
    return [_by_path(item, roots) if item.group in shared else item for item in items]


def _by_path(item: Item, roots: list[Path]) -> Item:
    path = _image_path(item)
    if path is None:
        return item
    base = next((root for root in roots if Path(path).is_relative_to(root)), None)
    relative = path if base is None else Path(path).relative_to(base).as_posix()
    return replace(item, group=image_path_group(relative))


def _image_path(item: Item) -> str | None:
    """The path of the image that gives the item its group, if one does."""
    for source in item.inputs:
        name = source.file if isinstance(source, Cell) else source
        if isinstance(name, str) and image_group(name) == item.group:
            return os.path.normpath(name)
    return None
