"""A process that reads batches with a worker until it is killed."""

import sys
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch.utils.data import Dataset

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from muomni.data.loading.loader import LoadedBatch, Loader


class Numbers(Dataset[LoadedBatch]):
    """Batches without samples."""

    source = SimpleNamespace(is_remote=False)

    def __getitem__(self, index: int) -> LoadedBatch:
        return LoadedBatch({}, 0, (), {})


if __name__ == "__main__":
    dataset: Any = Numbers()
    batches: Any = count()
    for index, _ in enumerate(Loader(dataset, batches, num_workers=1)):
        if index == 1:
            print("reading", flush=True)
