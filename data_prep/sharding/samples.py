"""The samples of a corpus, before splits and shards: keys made unique, and captions of an image joined.

Both depend only on the order in which the reader lists the corpus, so every process gets the same samples.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import chain

import numpy as np

from data_prep.corpus import DROPPED_TURNS, Item, clean_key
from muomni.data.shards.manifest import Task, hash64

# What `changed` of a manifest counts.
CAPTION_JOINED = "caption-joined"
KEY_RENAMED = "key-renamed"
TURNS_DROPPED = "turns-dropped"


def collect(items: Iterable[Item], task: Task) -> tuple[list[Item], dict[str, int]]:
    """All samples with unique keys, and how many were changed, by reason."""
    listed, renamed = unique_keys(items)
    samples = list(join_captions(listed)) if task == "image-caption" else listed
    counts = {
        CAPTION_JOINED: len(listed) - len(samples),
        KEY_RENAMED: sum(item.key in renamed for item in samples) if renamed else 0,
        TURNS_DROPPED: sum(DROPPED_TURNS in item.metadata for item in samples),
    }
    return samples, {name: count for name, count in counts.items() if count}


def unique_keys(listed: Iterable[Item]) -> tuple[list[Item], frozenset[str]]:
    """Items with unique keys, and those keys that are new.

    The first item keeps a repeated key; the others get `-2`, `-3`, ... in the order of the corpus, skipping
    keys that occur themselves. Besides the items, this takes 24 bytes for each one.
    """
    items = list(listed)
    hashes = np.fromiter((hash64(item.key) for item in items), np.uint64, len(items))
    known, counts = np.unique(hashes, return_counts=True)
    numbers: dict[int, int] = {}
    renamed: dict[int, str] = {}
    for position in np.flatnonzero(np.isin(hashes, known[counts > 1])).tolist():
        number = int(hashes[position])
        if number not in numbers:
            numbers[number] = 1
            continue
        key = items[position].key
        while True:
            numbers[number] += 1
            name = clean_key(f"{key}-{numbers[number]}")
            if hash64(name) not in renamed and not _contains(known, hash64(name)):
                break
        renamed[hash64(name)] = name
        items[position] = replace(items[position], key=name)
    return items, frozenset(renamed.values())


def join_captions(items: Iterable[Item]) -> Iterator[Item]:
    """Join adjacent items of one image file that differ in their captions only, as the first of them.

    Equal captions are kept. Bad items in between stay apart.
    """
    run: list[Item] = []
    for item in items:
        if item.problem:
            yield item
            continue
        if run and not _is_same_image(run[0], item):
            yield _joined(run)
            run = []
        run.append(item)
    if run:
        yield _joined(run)


def _is_same_image(one: Item, other: Item) -> bool:
    return (
        len(one.media) == 1
        and isinstance(one.media[0], str)
        and (one.media, one.group, one.declared_split, one.metadata)
        == (other.media, other.group, other.declared_split, other.metadata)
    )


def _joined(run: list[Item]) -> Item:
    if len(run) == 1:
        return run[0]
    return replace(run[0], texts=tuple(chain.from_iterable(item.texts for item in run)))


def _contains(ordered: np.ndarray, number: int) -> bool:
    position = int(np.searchsorted(ordered, np.uint64(number)))
    return position < len(ordered) and int(ordered[position]) == number
