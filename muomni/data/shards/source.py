"""Several datasets of one task, read as one sequence of samples."""

from bisect import bisect_right
from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np

from muomni.data.shards.exclusion_mask import KeptSamples, read_exclusion
from muomni.data.shards.manifest import Manifest
from muomni.data.shards.reader import SplitReader
from muomni.errors import DataError


class Source:
    """The samples of one split over all given datasets, in manifest order.

    Samples that masks exclude keep their numbers, but `kept` passes over them. Picklable; files open
    where they are first read. Raises DataError when the split has no sample. Without `check_files`
    a file that does not fit the manifest is noticed only when it is read.
    """

    def __init__(self, manifests: list[Manifest], split: str, check_files: bool = True) -> None:
        self.split = split
        self.manifests = [manifest for manifest in manifests if split in manifest.splits]
        self.readers = [SplitReader(manifest, split, check_files) for manifest in self.manifests]
        self.starts = np.cumsum([0] + [len(reader) for reader in self.readers])
        self._bounds: list[int] = self.starts.tolist()
        self.exclusions = [read_exclusion(manifest, split) for manifest in self.manifests]
        if self.num_kept == 0:
            names = ", ".join(manifest.place for manifest in manifests)
            excluded = f" (masks exclude {len(self)})" if len(self) else ""
            raise DataError(
                f"split '{split}' of {names} holds no sample{excluded}; shard the corpus with a larger "
                f"fraction for it, or name another split"
            )

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def num_kept(self) -> int:
        """Samples that no mask excludes."""
        return len(self) - sum(len(exclusion.ids) for exclusion in self.exclusions)

    def kept(self, dataset: int) -> KeptSamples:
        """The samples of one dataset (its place in `manifests`) that no mask excludes."""
        ids = self.exclusions[dataset].ids
        return KeptSamples(len(self.readers[dataset]), ids, int(self.starts[dataset]))

    @cached_property
    def all_kept(self) -> KeptSamples:
        """The samples of all datasets that no mask excludes."""
        if len(self.readers) == 1:
            return self.kept(0)
        parts = zip(self.exclusions, self.starts[:-1].astype(np.uint64), strict=True)
        return KeptSamples(len(self), np.concatenate([part.ids + start for part, start in parts]))

    @property
    def columns(self) -> np.ndarray:
        """The index columns of all samples (see `tar_index`): only for small splits."""
        return np.concatenate([reader.columns for reader in self.readers])

    def column(self, name: str, ids: np.ndarray) -> np.ndarray:
        """One of `manifest.COLUMNS` for the samples `ids`, as int64 [len(ids)]."""
        return self.gather(ids, lambda dataset, own: self.readers[dataset].column(name, own))

    def datasets_of(self, ids: np.ndarray) -> np.ndarray:
        """The place in `readers` of each sample's dataset: [len(ids)]."""
        return np.searchsorted(self.starts, ids, side="right") - 1

    def gather(
        self, ids: np.ndarray, values_of: Callable[[int, np.ndarray], np.ndarray]
    ) -> np.ndarray:
        """A metric of each of the samples `ids`, as int64 [len(ids)].

        `values_of` gets the place of a dataset in `readers` and the samples' numbers there.
        """
        of_reader = self.datasets_of(ids)
        values = np.empty(len(ids), dtype=np.int64)
        for number in np.unique(of_reader).tolist():
            is_its = of_reader == number
            values[is_its] = values_of(number, ids[is_its] - self.starts[number])
        return values

    @property
    def fingerprint(self) -> str:
        """Changes when any sample or its order changes."""
        return "+".join(f"{m.name}:{m.fingerprint}" for m in self.manifests)

    @property
    def exclusion_digest(self) -> str:
        """Changes when masks exclude other samples."""
        return "+".join(exclusion.digest for exclusion in self.exclusions)

    def __getstate__(self) -> dict[str, object]:
        # What the workers of a loader need to read: neither the records of all shards nor masks.
        state = self.__dict__.copy()
        state.pop("all_kept", None)
        manifests = [manifest.without_shards() for manifest in self.manifests]
        return {**state, "manifests": manifests, "exclusions": []}

    def read(self, index: int) -> dict[str, Any]:
        """The members of one sample as extension -> bytes, and its key as "__key__" -> str."""
        reader, within = self.locate(index)
        return self.readers[reader].read(within)

    def locate(self, index: int) -> tuple[int, int]:
        """The place in `readers` of a sample's dataset, and the sample's number there."""
        reader = bisect_right(self._bounds, index) - 1
        return reader, index - self._bounds[reader]

    @property
    def is_remote(self) -> bool:
        """Whether any of the datasets lies at a URL."""
        return any(manifest.origin is not None for manifest in self.manifests)

    def expect(self, indices: np.ndarray) -> None:
        """Say which samples (ids) are read next, in order, so that remote datasets fetch ahead."""
        owners = self.datasets_of(indices)
        for number, reader in enumerate(self.readers):
            reader.expect(indices[owners == number] - int(self.starts[number]))

    def origin(self, index: int) -> dict[str, Any]:
        """Where a sample comes from: its id, dataset, split and shard, its number there, and its key.

        The key is None where the shard cannot be read.
        """
        reader, within = self.locate(index)
        try:
            key = self.read(index)["__key__"]
        except DataError:
            key = None
        shard, place = self.readers[reader].locate(within)
        return {
            "id": int(index), "dataset": str(self.manifests[reader].place), "split": self.split,
            "shard": shard, "number_in_shard": place, "key": key,
        }  # fmt: skip

    def describe(self, index: int) -> str:
        """Where a sample lies and, where its shard can be read, what it is called; for messages."""
        reader, within = self.locate(index)
        place = f"sample {within} of {self.manifests[reader].place}/{self.split}"
        try:
            return f"{place} (key {self.read(index)['__key__']})"
        except DataError:
            return place
