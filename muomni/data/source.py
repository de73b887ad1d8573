"""Several datasets of one task, read as one sequence of samples."""

from pathlib import Path
from typing import Any

import numpy as np

from muomni.data.manifest import Manifest
from muomni.data.shard_reader import SplitReader
from muomni.errors import DataError


class Source:
    """The samples of one split over all given datasets, in manifest order.

    Picklable; files open where they are first read. Raises DataError when the split has no sample.
    """

    def __init__(self, manifests: list[Manifest], split: str) -> None:
        self.split = split
        self.manifests = [manifest for manifest in manifests if split in manifest.splits]
        self.readers = [SplitReader(manifest, split) for manifest in self.manifests]
        self.starts = np.cumsum([0] + [len(reader) for reader in self.readers])
        if len(self) == 0:
            names = ", ".join(str(manifest.root) for manifest in manifests)
            raise DataError(
                f"split '{split}' of {names} holds no sample; shard the corpus with a larger fraction "
                f"for it, or name another split"
            )

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def columns(self) -> np.ndarray:
        """The index columns of all samples (see `tar_index`)."""
        return np.concatenate([reader.columns for reader in self.readers])

    @property
    def fingerprint(self) -> str:
        """Changes when any sample or its order changes."""
        return "+".join(f"{m.name}:{m.fingerprint}" for m in self.manifests)

    def read(self, index: int) -> dict[str, Any]:
        """The members of one sample as extension -> bytes, and its key as "__key__" -> str."""
        reader = int(np.searchsorted(self.starts, index, side="right")) - 1
        return self.readers[reader].read(index - int(self.starts[reader]))

    def describe(self, index: int) -> str:
        """Where a sample lies and, where its shard can be read, what it is called; for messages."""
        reader = int(np.searchsorted(self.starts, index, side="right")) - 1
        root: Path = self.manifests[reader].root
        place = f"sample {index - int(self.starts[reader])} of {root / self.split}"
        try:
            return f"{place} (key {self.read(index)['__key__']})"
        except DataError:
            return place
