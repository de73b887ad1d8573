"""Random access to the samples of one split, by index and `os.pread`.

No file is read through or kept in memory: a sample costs one `pread` on the tar. Readers are
picklable and open files lazily, so the workers of a DataLoader each have their own descriptors.
"""

import os
from collections import OrderedDict
from functools import cached_property

import numpy as np

from muomni.data.manifest import COLUMNS, Manifest, ShardRecord
from muomni.data.shard_writer import columns_path
from muomni.data.tar_index import index_path, parse_members, read_index, split_member_name
from muomni.errors import DataError

_MAX_OPEN_FILES = 256


class SplitReader:
    """The samples of `split`, numbered through its shards in manifest order.

    At construction each shard's size and sample count are compared with the manifest, so a
    truncated or mixed-up copy fails at once (`DataError`) and not in the middle of an epoch.
    """

    def __init__(self, manifest: Manifest, split: str) -> None:
        self.manifest = manifest
        self.split = split
        self._shards: tuple[ShardRecord, ...] = manifest.split(split).shards
        self._check_shards()
        counts = [shard.num_samples for shard in self._shards]
        # First sample id of each shard, and the number of all samples at the end.
        self._starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype(np.int64)
        self._reset_handles()

    def __len__(self) -> int:
        return int(self._starts[-1])

    @cached_property
    def columns(self) -> np.ndarray:
        """Structured array of `manifest.COLUMNS`, one row a sample, in sample order."""
        if not self._shards:
            return np.empty(0, dtype=COLUMNS)
        root = self.manifest.root
        parts = [np.load(columns_path(root / shard.path), mmap_mode="r") for shard in self._shards]
        return np.concatenate(parts)

    def read(self, index: int) -> dict[str, bytes | str]:
        """The members of sample `index` as extension -> bytes, and its key as "__key__" -> str.

        Raises `IndexError` outside the split, `DataError` when the shard cannot be read.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)} in {self.manifest.root}/{self.split}")
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        within = index - int(self._starts[shard])
        offsets = self._offsets_of(shard)
        start, end = int(offsets[within]), int(offsets[within + 1])
        path = self.manifest.root / self._shards[shard].path
        try:
            buffer = os.pread(self._descriptor_of(shard), end - start, start)
        except OSError as error:
            raise DataError(f"cannot read {path} at byte {start}: {error.strerror}") from error
        if len(buffer) < end - start:
            raise DataError(f"{path} ends inside sample {within}; make or copy the shard again")
        sample: dict[str, bytes | str] = {}
        for name, data_start, num_bytes in parse_members(buffer, str(path)):
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

    def __getstate__(self) -> dict[str, object]:
        state = self.__dict__.copy()
        for name in ("_descriptors", "_offsets", "columns"):
            state.pop(name, None)
        return state

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._reset_handles()

    def __del__(self) -> None:
        for descriptor in getattr(self, "_descriptors", {}).values():
            os.close(descriptor)

    def _reset_handles(self) -> None:
        self._descriptors: OrderedDict[int, int] = OrderedDict()
        self._offsets: dict[int, np.ndarray] = {}

    def _descriptor_of(self, shard: int) -> int:
        if shard in self._descriptors:
            self._descriptors.move_to_end(shard)
            return self._descriptors[shard]
        if len(self._descriptors) >= _MAX_OPEN_FILES:
            os.close(self._descriptors.popitem(last=False)[1])
        path = self.manifest.root / self._shards[shard].path
        self._descriptors[shard] = os.open(path, os.O_RDONLY)
        return self._descriptors[shard]

    def _offsets_of(self, shard: int) -> np.ndarray:
        if shard not in self._offsets:
            path = self.manifest.root / self._shards[shard].path
            self._offsets[shard] = np.asarray(read_index(index_path(path)))
        return self._offsets[shard]

    def _check_shards(self) -> None:
        for shard in self._shards:
            check_shard(self.manifest, shard)


def check_shard(manifest: Manifest, shard: ShardRecord) -> None:
    """Compare size, index and columns of a shard with the manifest, without reading the tar.

    Raises `DataError` that names the file.
    """
    path = manifest.root / shard.path
    advice = "copy or make the dataset again"
    try:
        num_bytes = path.stat().st_size
        num_index_bytes = index_path(path).stat().st_size
        num_rows = len(np.load(columns_path(path), mmap_mode="r"))
    except FileNotFoundError as error:
        raise DataError(f"{error.filename} is missing; {advice}") from error
    except (OSError, ValueError) as error:
        raise DataError(f"the sidecars of {path} cannot be read ({error}); {advice}") from error
    if num_bytes != shard.num_bytes:
        raise DataError(
            f"{path} has {num_bytes} bytes, the manifest says {shard.num_bytes}; {advice}"
        )
    expected = 8 * (shard.num_samples + 1)
    if num_index_bytes != expected:
        raise DataError(
            f"{index_path(path)} has {num_index_bytes} bytes, {shard.num_samples} samples need "
            f"{expected}; {advice}"
        )
    if num_rows != shard.num_samples:
        raise DataError(
            f"{columns_path(path)} has {num_rows} rows, the manifest says {shard.num_samples} "
            f"samples; {advice}"
        )
    end = int(read_index(index_path(path))[-1])
    if end > num_bytes:
        raise DataError(f"{index_path(path)} points behind the end of {path}; {advice}")
