"""Masks beside a dataset that exclude samples from use without changing the shards.

A mask is two files, written by a tool that selects samples to exclude (e.g. deduplication):

    DATASET/exclude/NAME.json    {"split": "train", "ids_file": "NAME.npy", "num_ids": 7}
    DATASET/exclude/NAME.npy     uint64 [n], n >= 0, strictly ascending

The ids are sample ids in that split: the index of a sample in the split's shards, counted from 0 in
manifest order, as in `SplitReader.read`. All masks of a folder apply, and a sample can be in several.
The `.npy` file is in the same folder and must be written before the `.json` file, both atomically: a mask
takes effect with its `.json`. `num_ids` is optional; other keys are ignored.

Training and evaluation skip excluded samples. Masks are part of the plan's digest: a run cannot be
resumed after they change.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from muomni.data.shards.manifest import Manifest
from muomni.errors import DataError

FOLDER = "exclude"
_CHUNK_IDS = 1 << 22


@dataclass(frozen=True, slots=True)
class Exclusion:
    """Excluded ids of one split, strictly ascending uint64 (memory-mapped if there is one mask), and
    their digest ("" if nothing is excluded)."""

    ids: np.ndarray
    digest: str


class IncludedSamples:
    """The ids of a split without the excluded ones, as a lazily computed sequence.

    `excluded` is strictly ascending. `first` is added to all ids.
    """

    def __init__(
        self, num_samples: int, excluded: np.ndarray | None = None, first: int = 0
    ) -> None:
        self.num_samples = num_samples
        self.first = first
        self._excluded = np.empty(0, dtype=np.uint64) if excluded is None else excluded

    def __len__(self) -> int:
        return self.num_samples - len(self._excluded)

    def __getitem__(self, indices: np.ndarray) -> np.ndarray:
        """The ids at `indices` of the sequence, int64 [len(indices)]."""
        # excluded[j] - j included ids are below excluded[j], so it precedes the included id at index i if
        # that is at most i. Bisection finds the number of such j, also in a memory-mapped file.
        low = np.zeros(len(indices), dtype=np.int64)
        high = np.full(len(indices), len(self._excluded))
        while (is_open := low < high).any():
            middle = (low + high) // 2
            probe = np.minimum(middle, len(self._excluded) - 1)
            is_before = self._excluded[probe].astype(np.int64) - probe <= indices
            low = np.where(is_open & is_before, middle + 1, low)
            high = np.where(is_open & ~is_before, middle, high)
        return indices + low + self.first


def read_exclusion(manifest: Manifest, split: str) -> Exclusion:
    """The union of all masks of a dataset for a split.

    Raises DataError that names the file if a mask is malformed or does not match the dataset.
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
    for start in range(0, len(ids), _CHUNK_IDS):
        digest.update(ids[start : start + _CHUNK_IDS].tobytes())
    return Exclusion(ids, digest.hexdigest() if len(ids) else "")


def mask_files(root: Path) -> list[Path]:
    """The `.json` files of a dataset's masks, sorted by name."""
    return sorted((root / FOLDER).glob("*.json"))


def read_mask(path: Path, manifest: Manifest, split: str | None = None) -> np.ndarray | None:
    """The ids of a mask, uint64 [n], or None if it is for another split than `split`.

    Raises DataError that names the file if it is malformed or does not match the dataset.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        mask_split, ids_file = str(content["split"]), str(content["ids_file"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f'{path} is not a mask ({error}); it needs {{"split": ..., "ids_file": ...}}'
        ) from None
    if mask_split not in manifest.splits:
        raise DataError(
            f"{path} excludes samples of split '{mask_split}', but {manifest.root} has "
            f"{', '.join(manifest.splits)}; regenerate or delete the mask"
        )
    if split not in (None, mask_split):
        return None
    ids = _read_ids(path.parent / ids_file, manifest.split(mask_split).num_samples)
    if content.get("num_ids", len(ids)) != len(ids):
        raise DataError(
            f"{path} declares num_ids={content['num_ids']} but contains {len(ids)} ids; regenerate the mask"
        )
    return ids


def _read_ids(path: Path, num_samples: int) -> np.ndarray:
    try:
        ids = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read mask ids {path}: {error}") from None
    if ids.dtype != np.uint64 or ids.ndim != 1:
        raise DataError(f"{path} has {ids.dtype} {list(ids.shape)}; mask ids must be uint64 [n]")
    for start in range(0, len(ids), _CHUNK_IDS):
        part = ids[max(0, start - 1) : start + _CHUNK_IDS]
        if not (part[1:] > part[:-1]).all():
            raise DataError(
                f"the ids in {path} are not strictly ascending; sort them and remove repeats"
            )
    if len(ids) and int(ids[-1]) >= num_samples:
        raise DataError(
            f"{path} excludes sample {int(ids[-1])}, but the split has {num_samples} samples"
        )
    return ids
