"""Random access to the samples of one split, by index and `os.pread`.

No file is read through or kept in memory: a sample costs one `pread` on the tar. Readers are
picklable and open files lazily, so the workers of a DataLoader each have their own descriptors.
"""

import os
from bisect import bisect_right
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from muomni.data.shards.manifest import COLUMNS, Manifest, ShardRecord
from muomni.data.shards.mapped_files import MappedFiles
from muomni.data.shards.remote import MAX_OPEN_TARS, CachedTars
from muomni.data.shards.tar_index import (
    INDEX_SUFFIX,
    index_path,
    parse_members,
    read_index,
    split_member_name,
)
from muomni.data.shards.writer import COLUMNS_SUFFIX, columns_path
from muomni.errors import DataError

_MAX_OPEN_FILES = 256
_CHECK_THREADS, _CHECKED_TOGETHER = 16, 512
_MOST_HEADER_BYTES = 1024
_ADVICE = "copy or make the dataset again"


@dataclass(frozen=True, slots=True)
class _OpenTar:
    """A tar that is read: where its samples begin, and how large the manifest says it is.

    The offsets are a view of the map of the index, which gives numbers in a fraction of numpy's time.
    """

    descriptor: int
    offsets: memoryview
    num_bytes: int


class SplitReader:
    """The samples of `split`, numbered through its shards in manifest order.

    With `check_files`, the sizes of all shards and sidecars are compared with the manifest at
    construction, so a truncated or mixed-up copy fails at once (`DataError`) and not in the middle of
    an epoch. One process of a run does that; each file is checked by its first reader in any case.
    The tars of a remote dataset are checked when they enter the cache.
    """

    def __init__(self, manifest: Manifest, split: str, check_files: bool = True) -> None:
        self.manifest = manifest
        self.split = split
        shards = manifest.split(split).shards
        self._cached = None if manifest.origin is None else CachedTars(manifest, split)
        if check_files and self._cached is None:
            check_sizes(manifest, shards)
        counts = [shard.num_samples for shard in shards]
        self._paths = [str(manifest.root / shard.path) for shard in shards]
        self._tar_bytes = np.array([shard.num_bytes for shard in shards], dtype=np.int64)
        # First sample id of each shard, and the number of all samples at the end.
        self._starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype(np.int64)
        self._reset_handles()

    def __len__(self) -> int:
        return int(self._starts[-1])

    @cached_property
    def columns(self) -> np.ndarray:
        """Structured array of `manifest.COLUMNS`, one row a sample, in sample order.

        It is whole in memory: for splits that fit there; `column` reads what is asked for.
        """
        parts = [np.load(columns_path(Path(path)), mmap_mode="r") for path in self._paths]
        return np.concatenate(parts) if parts else np.empty(0, dtype=COLUMNS)

    def column(self, name: str, ids: np.ndarray) -> np.ndarray:
        """One of `manifest.COLUMNS` for the samples `ids`: [len(ids)]."""
        values = np.empty(len(ids), dtype=COLUMNS[name])
        order = np.argsort(ids, kind="stable")
        ascending = ids[order]
        shards = np.searchsorted(self._starts, ascending, side="right") - 1
        cuts = np.flatnonzero(np.diff(shards)) + 1
        for start, end in zip([0, *cuts.tolist()], [*cuts.tolist(), len(ids)], strict=True):
            if start < end:
                shard = int(shards[start])
                path = self._paths[shard].removesuffix(".tar") + COLUMNS_SUFFIX
                rows = self._columns(path, self._num_in(shard))
                values[order[start:end]] = rows[name][ascending[start:end] - self._starts[shard]]
        return values

    def read(self, index: int) -> dict[str, bytes | str]:
        """The members of sample `index` as extension -> bytes, and its key as "__key__" -> str.

        Raises `IndexError` outside the split, `DataError` when the shard cannot be read.
        """
        shard, within = self._place(index)
        path = self._paths[shard]
        tar = self._open_tars.get(shard) or self._open(shard)
        start, end = tar.offsets[within], tar.offsets[within + 1]
        if not start <= end <= tar.num_bytes:
            raise DataError(
                f"{path}{INDEX_SUFFIX} points behind the end of {path} or backward; {_ADVICE}"
            )
        try:
            buffer = os.pread(tar.descriptor, end - start, start)
        except OSError as error:
            raise DataError(f"cannot read {path} at byte {start}: {error.strerror}") from error
        if len(buffer) < end - start:
            raise DataError(f"{path} ends inside sample {within}; make or copy the shard again")
        sample: dict[str, bytes | str] = {}
        for name, data_start, num_bytes in parse_members(buffer, path):
            key, extension = split_member_name(name)
            if sample.setdefault("__key__", key) != key:
                raise DataError(
                    f"{path}: the index puts {key!r} and {sample['__key__']!r} into one sample; "
                    "run `python -m data_prep verify --full` on the dataset"
                )
            sample[extension] = buffer[data_start : data_start + num_bytes]
        if not sample:
            raise DataError(f"{path}: sample {within} is empty; the index does not fit the tar")
        return sample

    def locate(self, index: int) -> tuple[str, int]:
        """The path of the shard of sample `index`, and the sample's number in it; raises IndexError."""
        shard, within = self._place(index)
        return self._paths[shard], within

    def _place(self, index: int) -> tuple[int, int]:
        bounds = self._bounds
        if not 0 <= index < bounds[-1]:
            raise IndexError(f"sample {index} of {len(self)} in {self.manifest.root}/{self.split}")
        shard = bisect_right(bounds, index) - 1
        return shard, index - bounds[shard]

    def expect(self, indices: np.ndarray) -> None:
        """Say which samples (ids) are read next, in order, so that a remote dataset fetches ahead."""
        if self._cached is not None and len(indices):
            shards = np.searchsorted(self._starts, indices, side="right") - 1
            self._cached.expect(list(dict.fromkeys(shards.tolist())))

    def __getstate__(self) -> dict[str, object]:
        state = self.__dict__.copy()
        for name in ("_open_tars", "_offsets", "_columns", "_bounds", "columns"):
            state.pop(name, None)
        # What workers are sent; the records of 100,000 shards are for opening alone.
        state["manifest"] = self.manifest.without_shards()
        return state

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._reset_handles()

    def __del__(self) -> None:
        for tar in getattr(self, "_open_tars", {}).values():
            os.close(tar.descriptor)

    def _reset_handles(self) -> None:
        # By the number of the shard, the one that was opened first at the front.
        self._open_tars: dict[int, _OpenTar] = {}
        self._offsets = MappedFiles(np.dtype("<u8"))
        self._columns = MappedFiles(COLUMNS)
        # The same numbers as Python's own, which are found in a fraction of numpy's time.
        self._bounds = self._starts.data

    def _num_in(self, shard: int) -> int:
        return int(self._starts[shard + 1] - self._starts[shard])

    def _open(self, shard: int) -> _OpenTar:
        """Open a tar and its index; the one that was opened first is closed where too many are open."""
        max_open = _MAX_OPEN_FILES if self._cached is None else MAX_OPEN_TARS
        if len(self._open_tars) >= max_open:
            os.close(self._open_tars.pop(next(iter(self._open_tars))).descriptor)
        path = self._paths[shard]
        offsets = self._offsets(path + INDEX_SUFFIX, self._num_in(shard) + 1)
        descriptor = self._descriptor_of(shard)
        # A file of odd length (a damaged one) is not aligned, which a view of numbers must be.
        aligned = np.require(offsets, requirements="A").data
        tar = _OpenTar(descriptor, aligned, int(self._tar_bytes[shard]))
        self._open_tars[shard] = tar
        return tar

    def _descriptor_of(self, shard: int) -> int:
        path = self._paths[shard]
        try:
            if self._cached is not None:
                return self._cached.open(shard)
            return os.open(path, os.O_RDONLY)
        except OSError as error:
            raise DataError(f"cannot open {error.filename or path}: {error.strerror}") from error


def check_sizes(manifest: Manifest, shards: Sequence[ShardRecord]) -> None:
    """Compare the sizes of all shards and sidecars with the manifest; opens no file.

    Raises `DataError` that names the file.
    """
    folder = os.fspath(manifest.root)

    def check(part: Sequence[ShardRecord]) -> None:
        for shard in part:
            _check_sizes(f"{folder}/{shard.path}", shard)

    parts = [shards[i : i + _CHECKED_TOGETHER] for i in range(0, len(shards), _CHECKED_TOGETHER)]
    if len(parts) <= 1:
        check(shards)
        return
    # Answers of a network file system take long, but many are waited for at once.
    with ThreadPoolExecutor(_CHECK_THREADS) as pool:
        for _ in pool.map(check, parts):
            continue


def _check_sizes(path: str, shard: ShardRecord) -> None:
    index, columns = f"{path}{INDEX_SUFFIX}", f"{path.removesuffix('.tar')}{COLUMNS_SUFFIX}"
    try:
        num_bytes, index_bytes, columns_bytes = (
            os.stat(name).st_size for name in (path, index, columns)
        )
    except FileNotFoundError as error:
        raise DataError(f"{error.filename} is missing; {_ADVICE}") from error
    except OSError as error:
        raise DataError(f"{error.filename} cannot be read ({error.strerror}); {_ADVICE}") from error
    if num_bytes != shard.num_bytes:
        raise DataError(
            f"{path} has {num_bytes} bytes, the manifest says {shard.num_bytes}; {_ADVICE}"
        )
    expected = 8 * (shard.num_samples + 1)
    if index_bytes != expected:
        raise DataError(
            f"{index} has {index_bytes} bytes, {shard.num_samples} samples need {expected}; {_ADVICE}"
        )
    header_bytes = columns_bytes - shard.num_samples * COLUMNS.itemsize
    # A .npy header is padded to 64 bytes; one of ours has a few hundred.
    if not 0 < header_bytes < _MOST_HEADER_BYTES or header_bytes % 64:
        raise DataError(
            f"{columns} has {columns_bytes} bytes, which does not fit the {shard.num_samples} samples of "
            f"the manifest; {_ADVICE}"
        )


def check_shard(manifest: Manifest, shard: ShardRecord) -> None:
    """Compare sizes, index and columns of a shard with the manifest, without reading the tar.

    Raises `DataError` that names the file.
    """
    path = manifest.root / shard.path
    _check_sizes(str(path), shard)
    try:
        columns = np.load(columns_path(path), mmap_mode="r")
    except (OSError, ValueError) as error:
        raise DataError(f"{columns_path(path)} cannot be read ({error}); {_ADVICE}") from error
    if columns.dtype != COLUMNS or len(columns) != shard.num_samples:
        raise DataError(
            f"{columns_path(path)} holds {len(columns)} rows of another kind than "
            f"{shard.num_samples} samples need; {_ADVICE}"
        )
    if int(read_index(index_path(path))[-1]) > shard.num_bytes:
        raise DataError(f"{index_path(path)} points behind the end of {path}; {_ADVICE}")
