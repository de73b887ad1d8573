"""Samples that stay in their shards but are never used: masks beside a dataset.

A mask is two files, written by whoever finds samples to leave out (a deduplication, a later check):

    DATASET/exclude/NAME.json    {"split": "train", "ids_file": "NAME.npy", "num_ids": 7}
    DATASET/exclude/NAME.npy     uint64 [n], n >= 0, strictly ascending

The numbers are sample ids inside that split: the place of a sample in the split's shards, counted from 0
in manifest order, as `SplitReader.read` takes it. All masks of a folder apply together; a sample may
be in several. The `.npy` file stands in the same folder and is to be written before the `.json`, each
atomically: a mask counts from the moment its `.json` is there. `num_ids` may be left out; other keys
are for their writer and are not looked at.

Training skips excluded samples, evaluation of the split too. Masks enter the plan's digest: a run cannot
be resumed after they changed.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from muomni.data.shards.manifest import Manifest
from muomni.errors import DataError

FOLDER = "exclude"
_CHECKED_AT_ONCE = 1 << 22


@dataclass(frozen=True, slots=True)
class Exclusion:
    """Excluded ids of one split, strictly ascending uint64 (memory-mapped where they are one file),
    and a digest of them ("" when nothing is excluded)."""

    ids: np.ndarray
    digest: str


class KeptSamples:
    """The ids of a split without the excluded ones, as a sequence that is computed place by place.

    `first` is added to all ids. `excluded` is strictly ascending.
    """

    def __init__(
        self, num_samples: int, excluded: np.ndarray | None = None, first: int = 0
    ) -> None:
        self.num_samples = num_samples
        self.first = first
        self._excluded = np.empty(0, dtype=np.uint64) if excluded is None else excluded

    def __len__(self) -> int:
        return self.num_samples - len(self._excluded)

    def __getitem__(self, places: np.ndarray) -> np.ndarray:
        """The ids at `places` among the kept ones, int64 [len(places)]."""
        # Excluded id number j has ids[j] - j kept ones below it, so it stands before a kept sample when
        # that is at most the sample's place: a bisection finds how many do, over a mapped file too.
        low = np.zeros(len(places), dtype=np.int64)
        high = np.full(len(places), len(self._excluded))
        while (is_open := low < high).any():
            middle = (low + high) // 2
            probe = np.minimum(middle, len(self._excluded) - 1)
            is_before = self._excluded[probe].astype(np.int64) - probe <= places
            low = np.where(is_open & is_before, middle + 1, low)
            high = np.where(is_open & ~is_before, middle, high)
        return places + low + self.first


def read_exclusion(manifest: Manifest, split: str) -> Exclusion:
    """What all masks of a dataset exclude from a split.

    Raises DataError that names the file when a mask is malformed or does not belong to the dataset.
    """
    found = [
        ids
        for path in mask_files(manifest.root)
        if (ids := read_mask(path, manifest, split)) is not None
    ]
    if not found:
        return Exclusion(np.empty(0, dtype=np.uint64), "")
    ids = found[0]
    for more in found[1:]:
        ids = np.union1d(ids, more)
    digest = hashlib.sha256()
    for start in range(0, len(ids), _CHECKED_AT_ONCE):
        digest.update(ids[start : start + _CHECKED_AT_ONCE].tobytes())
    return Exclusion(ids, digest.hexdigest() if len(ids) else "")


def mask_files(root: Path) -> list[Path]:
    """The `.json` files of a dataset's masks, by name."""
    return sorted((root / FOLDER).glob("*.json"))


def read_mask(path: Path, manifest: Manifest, split: str | None = None) -> np.ndarray | None:
    """The ids of a mask, uint64 [n]; None when a `split` is given and the mask is about another.

    Raises DataError that names the file when it is malformed or does not belong to the dataset.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        mask_split, ids_file = str(content["split"]), str(content["ids_file"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f'{path} is no mask ({error}); it needs {{"split": ..., "ids_file": ...}}'
        ) from None
    if mask_split not in manifest.splits:
        raise DataError(
            f"{path} excludes samples of split '{mask_split}', which {manifest.root} has not; it has "
            f"{', '.join(manifest.splits)}"
        )
    if split not in (None, mask_split):
        return None
    ids = _read_ids(path.parent / ids_file, manifest.split(mask_split).num_samples)
    if content.get("num_ids", len(ids)) != len(ids):
        raise DataError(
            f"{path} tells of {content['num_ids']} samples, its ids are {len(ids)}; make the mask again"
        )
    return ids


def _read_ids(path: Path, num_samples: int) -> np.ndarray:
    try:
        ids = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read the ids of a mask, {path}: {error}") from None
    if ids.dtype != np.uint64 or ids.ndim != 1:
        raise DataError(f"{path} holds {ids.dtype} {list(ids.shape)}, a mask needs uint64 [n]")
    for start in range(0, len(ids), _CHECKED_AT_ONCE):
        part = ids[max(0, start - 1) : start + _CHECKED_AT_ONCE]
        if not (part[1:] > part[:-1]).all():
            raise DataError(f"the ids in {path} are not strictly ascending; sort them, each once")
    if len(ids) and int(ids[-1]) >= num_samples:
        raise DataError(
            f"{path} excludes sample {int(ids[-1])}, but its split has {num_samples} samples"
        )
    return ids
