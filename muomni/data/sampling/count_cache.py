"""How many items each window of an epoch gives, kept on disk beside the shards.

Counting the windows of 10^9 samples takes minutes of one processor; a resumed run finds what it counted.
"""

import os
from pathlib import Path

import numpy as np

from muomni.io.atomic_write import open_atomic

# Fewer windows are counted faster than it is worth a file.
_LEAST_WINDOWS = 256


class CountCache:
    """Files `.counts-DIGEST-EPOCH.npy` in `folder`; `digest` covers all that the counts depend on.

    A folder that cannot be written (read-only corpus) only costs time.
    """

    def __init__(self, folder: Path, digest: str) -> None:
        self.folder = folder
        self.digest = digest

    def find(self, epoch: int) -> np.ndarray | None:
        """Counts of an epoch, int32 [num_windows], or None when there are none."""
        path = self._path(epoch)
        return np.load(path) if path.is_file() else None

    def save(self, epoch: int, counts: np.ndarray) -> None:
        """Keep the counts of an epoch, if they are worth it."""
        if len(counts) >= _LEAST_WINDOWS and os.access(self.folder, os.W_OK):
            with open_atomic(self._path(epoch)) as file:
                np.save(file, counts)

    def _path(self, epoch: int) -> Path:
        return self.folder / f".counts-{self.digest[:16]}-{epoch}.npy"
