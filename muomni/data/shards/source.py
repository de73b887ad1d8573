"""Concatenates several datasets of one task."""

from bisect import bisect_right
from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np

from muomni.data.shards.exclusion_mask import IncludedSamples, read_exclusion
from muomni.data.shards.manifest import Manifest
from muomni.data.shards.reader import SplitReader
from muomni.errors import DataError


class Source:
    """The samples of one split of all datasets, in manifest order.

    Excluded samples keep their ids; `included` skips them. Picklable; files are opened on first use.
    Raises DataError if the split has no samples. Without `check_files`, a file that does not match the
    manifest raises only when it is read.
    """

    def __init__(self, manifests: list[Manifest], split: str, check_files: bool = True) -> None:
        self.split = split
        self.manifests = [manifest for manifest in manifests if split in manifest.splits]
        self.readers = [SplitReader(manifest, split, check_files) for manifest in self.manifests]
        self.starts = np.cumsum([0] + [len(reader) for reader in self.readers])
        self._bounds: list[int] = self.starts.tolist()
        self.exclusions = [read_exclusion(manifest, split) for manifest in self.manifests]
        if self.num_included == 0:
            names = ", ".join(manifest.location for manifest in manifests)
            excluded = f" (masks exclude {len(self)})" if len(self) else ""
            raise DataError(
                f"split '{split}' of {names} has no samples{excluded}; choose another split, or shard the "
                f"corpus with a larger fraction for this one"
            )

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def num_included(self) -> int:
        """Number of samples that no mask excludes."""
        return len(self) - sum(len(exclusion.ids) for exclusion in self.exclusions)

    def included(self, dataset: int) -> IncludedSamples:
        """Samples of dataset number `dataset` that no mask excludes."""
        ids = self.exclusions[dataset].ids
        return IncludedSamples(len(self.readers[dataset]), ids, int(self.starts[dataset]))

    @cached_property
    def all_included(self) -> IncludedSamples:
        """Samples of all datasets that no mask excludes."""
        if len(self.readers) == 1:
            return self.included(0)
        parts = zip(self.exclusions, self.starts[:-1].astype(np.uint64), strict=True)
        return IncludedSamples(
            len(self), np.concatenate([part.ids + start for part, start in parts])
        )

    @property
    def columns(self) -> np.ndarray:
        """Structured array of `manifest.COLUMNS` of all samples, in memory; only for small splits."""
        return np.concatenate([reader.columns for reader in self.readers])

    def column(self, name: str, ids: np.ndarray) -> np.ndarray:
        """A column of `manifest.COLUMNS` for the samples `ids`, int64 [len(ids)]."""
        return self.gather(ids, lambda dataset, own: self.readers[dataset].column(name, own))

    def datasets_of(self, ids: np.ndarray) -> np.ndarray:
        """The number of each sample's dataset, int64 [len(ids)]."""
        return np.searchsorted(self.starts, ids, side="right") - 1

    def gather(
        self, ids: np.ndarray, values_of: Callable[[int, np.ndarray], np.ndarray]
    ) -> np.ndarray:
        """Values of the samples `ids`, int64 [len(ids)].

        `values_of` gets the number of a dataset and sample ids within it.
        """
        owners = self.datasets_of(ids)
        values = np.empty(len(ids), dtype=np.int64)
        for number in np.unique(owners).tolist():
            is_its = owners == number
            values[is_its] = values_of(number, ids[is_its] - self.starts[number])
        return values

    @property
    def fingerprint(self) -> str:
        """Identifies the samples and their order."""
        return "+".join(f"{m.name}:{m.fingerprint}" for m in self.manifests)

    @property
    def exclusion_digest(self) -> str:
        """Identifies the samples that masks exclude."""
        return "+".join(exclusion.digest for exclusion in self.exclusions)

    def __getstate__(self) -> dict[str, object]:
        # The workers of a loader need neither the records of all shards nor masks.
        state = self.__dict__.copy()
        state.pop("all_included", None)
        manifests = [manifest.without_shards() for manifest in self.manifests]
        return {**state, "manifests": manifests, "exclusions": []}

    def read(self, index: int) -> dict[str, Any]:
        """The members of sample `index` as extension -> bytes, and its key as "__key__" -> str."""
        reader, within = self.locate(index)
        return self.readers[reader].read(within)

    def locate(self, index: int) -> tuple[int, int]:
        """The number of a sample's dataset, and the sample's id within it."""
        reader = bisect_right(self._bounds, index) - 1
        return reader, index - self._bounds[reader]

    @property
    def is_remote(self) -> bool:
        """Whether any dataset is at a URL."""
        return any(manifest.origin is not None for manifest in self.manifests)

    def expect(self, indices: np.ndarray) -> None:
        """Announce the samples (ids) to read next, in order, so that remote datasets prefetch them."""
        owners = self.datasets_of(indices)
        for number, reader in enumerate(self.readers):
            reader.expect(indices[owners == number] - int(self.starts[number]))

    def origin(self, index: int) -> dict[str, Any]:
        """The id, dataset, split, shard, number in the shard, and key of a sample.

        The key is None if the shard cannot be read.
        """
        reader, within = self.locate(index)
        try:
            key = self.read(index)["__key__"]
        except DataError:
            key = None
        shard, number = self.readers[reader].locate(within)
        return {
            "id": int(index), "dataset": str(self.manifests[reader].location), "split": self.split,
            "shard": shard, "number_in_shard": number, "key": key,
        }  # fmt: skip

    def describe(self, index: int) -> str:
        """Location of a sample, with its key if the shard can be read, for messages."""
        reader, within = self.locate(index)
        location = f"sample {within} of {self.manifests[reader].location}/{self.split}"
        try:
            return f"{location} (key {self.read(index)['__key__']})"
        except DataError:
            return location
