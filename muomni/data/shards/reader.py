"""Random access to the samples of one split, by index and `os.pread`.

Reading a sample is one `pread` on its tar; no file is read completely. Readers are picklable and open
files lazily, so each worker of a DataLoader has its own descriptors.
"""

import mmap
import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from muomni.data.shards.manifest import COLUMNS, Manifest, ShardRecord
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
_CHECK_THREADS, _CHECK_BATCH = 16, 512
_MAX_HEADER_BYTES = 1024
_ADVICE = "copy or rebuild the dataset"


@dataclass(frozen=True, slots=True)
class _OpenTar:
    """An open tar: offsets of its samples, and its size in the manifest.

    `offsets` is a memoryview of the mapped index, which is much faster to index than a numpy array.
    """

    descriptor: int
    offsets: memoryview
    num_bytes: int


class MappedFiles:
    """Memory-maps the last `num` items of `dtype` in each file, after its header; keeps 256 files open.

    A map takes about 10 µs, `np.load` 100 µs, which matters since every shuffle window touches other
    shards. Raises DataError if a file is missing or too short.
    """

    def __init__(self, dtype: np.dtype) -> None:
        self.dtype = dtype
        self._arrays: OrderedDict[str, np.ndarray] = OrderedDict()

    def __call__(self, path: str, num: int) -> np.ndarray:
        """Items [num] of a file; they stay valid after the file is closed."""
        if path in self._arrays:
            self._arrays.move_to_end(path)
            return self._arrays[path]
        if len(self._arrays) >= _MAX_OPEN_FILES:
            self._arrays.popitem(last=False)
        self._arrays[path] = _map(path, self.dtype, num)
        return self._arrays[path]


def _map(path: str, dtype: np.dtype, num: int) -> np.ndarray:
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; {_ADVICE}") from error
    try:
        num_bytes = os.fstat(descriptor).st_size
        start = num_bytes - num * dtype.itemsize
        if start < 0 or num_bytes == 0:
            raise DataError(f"{path} has {num_bytes} bytes, too few for {num} entries; {_ADVICE}")
        content = mmap.mmap(descriptor, num_bytes, access=mmap.ACCESS_READ)
    finally:
        os.close(descriptor)
    return np.frombuffer(content, dtype=dtype, count=num, offset=start)


class SplitReader:
    """The samples of `split`, numbered through its shards in manifest order.

    `check_files` compares the sizes of all shards and sidecars with the manifest at construction, so a
    truncated or mixed copy raises `DataError` before the run starts. One process of a run needs to check;
    every file is checked again when it is opened. Remote tars are checked when they enter the cache.
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
        # First sample id of each shard, then the total number of samples.
        self._starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype(np.int64)
        self._reset_handles()

    def __len__(self) -> int:
        return int(self._starts[-1])

    @cached_property
    def columns(self) -> np.ndarray:
        """Structured array of `manifest.COLUMNS`, one row per sample, in sample order.

        Loads all samples into memory; `column` reads only the requested ones.
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

        Raises `IndexError` outside of the split, `DataError` if the shard cannot be read.
        """
        shard, within = self._shard_and_number(index)
        path = self._paths[shard]
        tar = self._open_tars.get(shard) or self._open(shard)
        start, end = tar.offsets[within], tar.offsets[within + 1]
        if not start <= end <= tar.num_bytes:
            raise DataError(
                f"{path}{INDEX_SUFFIX} has an offset that is decreasing or past the end of {path}; {_ADVICE}"
            )
        try:
            buffer = os.pread(tar.descriptor, end - start, start)
        except OSError as error:
            raise DataError(f"cannot read {path} at byte {start}: {error.strerror}") from error
        if len(buffer) < end - start:
            raise DataError(f"{path} ends inside sample {within}; {_ADVICE}")
        sample: dict[str, bytes | str] = {}
        for name, data_start, num_bytes in parse_members(buffer, path):
            key, extension = split_member_name(name)
            if sample.setdefault("__key__", key) != key:
                raise DataError(
                    f"{path}: the index joins {key!r} and {sample['__key__']!r} to one sample; "
                    "run `python -m data_prep verify --full` on the dataset"
                )
            sample[extension] = buffer[data_start : data_start + num_bytes]
        if not sample:
            raise DataError(f"{path}: sample {within} is empty; the index does not match the tar")
        return sample

    def locate(self, index: int) -> tuple[str, int]:
        """Path of the shard of sample `index`, and the sample's number in it; raises IndexError."""
        shard, within = self._shard_and_number(index)
        return self._paths[shard], within

    def _shard_and_number(self, index: int) -> tuple[int, int]:
        bounds = self._bounds
        if not 0 <= index < bounds[-1]:
            raise IndexError(f"sample {index} of {len(self)} in {self.manifest.root}/{self.split}")
        shard = bisect_right(bounds, index) - 1
        return shard, index - bounds[shard]

    def expect(self, indices: np.ndarray) -> None:
        """Announce the samples (ids) to read next, in order, so that a remote dataset prefetches them."""
        if self._cached is not None and len(indices):
            shards = np.searchsorted(self._starts, indices, side="right") - 1
            self._cached.expect(list(dict.fromkeys(shards.tolist())))

    def __getstate__(self) -> dict[str, object]:
        state = self.__dict__.copy()
        for name in ("_open_tars", "_offsets", "_columns", "_bounds", "columns"):
            state.pop(name, None)
        # Workers do not need the records of up to 100,000 shards.
        state["manifest"] = self.manifest.without_shards()
        return state

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._reset_handles()

    def __del__(self) -> None:
        for tar in getattr(self, "_open_tars", {}).values():
            os.close(tar.descriptor)

    def _reset_handles(self) -> None:
        # By shard number, in the order of opening.
        self._open_tars: dict[int, _OpenTar] = {}
        self._offsets = MappedFiles(np.dtype("<u8"))
        self._columns = MappedFiles(COLUMNS)
        # A memoryview: bisecting it is much faster than a numpy array.
        self._bounds = self._starts.data

    def _num_in(self, shard: int) -> int:
        return int(self._starts[shard + 1] - self._starts[shard])

    def _open(self, shard: int) -> _OpenTar:
        """Open a tar and its index; closes the tar opened first if too many are open."""
        max_open = _MAX_OPEN_FILES if self._cached is None else MAX_OPEN_TARS
        if len(self._open_tars) >= max_open:
            os.close(self._open_tars.pop(next(iter(self._open_tars))).descriptor)
        path = self._paths[shard]
        offsets = self._offsets(path + INDEX_SUFFIX, self._num_in(shard) + 1)
        descriptor = self._descriptor_of(shard)
        # The map of a damaged file can be unaligned, but a memoryview must be aligned.
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
    """Compare the sizes of all shards and sidecars with the manifest, without opening them.

    Raises `DataError` that names the file.
    """
    folder = os.fspath(manifest.root)

    def check(part: Sequence[ShardRecord]) -> None:
        for shard in part:
            _check_sizes(f"{folder}/{shard.path}", shard)

    parts = [shards[i : i + _CHECK_BATCH] for i in range(0, len(shards), _CHECK_BATCH)]
    if len(parts) <= 1:
        check(shards)
        return
    # A network file system has a high latency but answers many requests at once.
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
            f"{path} has {num_bytes} bytes, the manifest declares {shard.num_bytes}; {_ADVICE}"
        )
    expected = 8 * (shard.num_samples + 1)
    if index_bytes != expected:
        raise DataError(
            f"{index} has {index_bytes} bytes, {shard.num_samples} samples need {expected}; {_ADVICE}"
        )
    header_bytes = columns_bytes - shard.num_samples * COLUMNS.itemsize
    # A .npy header is padded to a multiple of 64 bytes and has a few hundred bytes here.
    if not 0 < header_bytes < _MAX_HEADER_BYTES or header_bytes % 64:
        raise DataError(
            f"{columns} has {columns_bytes} bytes, which does not match the {shard.num_samples} samples "
            f"in the manifest; {_ADVICE}"
        )


def check_shard(manifest: Manifest, shard: ShardRecord) -> None:
    """Compare sizes, index, and columns of a shard with the manifest, without reading the tar.

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
            f"{columns_path(path)} does not match the {shard.num_samples} samples and the columns of the "
            f"manifest; {_ADVICE}"
        )
    if int(read_index(index_path(path))[-1]) > shard.num_bytes:
        raise DataError(f"{index_path(path)} has an offset past the end of {path}; {_ADVICE}")
