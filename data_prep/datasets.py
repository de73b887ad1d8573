"""Find datasets, and process their shards in parallel."""

from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

from muomni.data.shards.manifest import MANIFEST_NAME, Manifest, Split
from muomni.errors import MachineError
from muomni.io.count_progress import counted

T = TypeVar("T")
R = TypeVar("R")


def find_manifests(folders: list[Path]) -> list[Manifest]:
    """Load the datasets in the given folders or in their direct subfolders.

    Raises `DataError` for a folder without a dataset.
    """
    found = []
    for folder in folders:
        inside = sorted(folder.glob(f"*/{MANIFEST_NAME}"))
        if (folder / MANIFEST_NAME).is_file() or not inside:
            found.append(Manifest.load(folder))
        else:
            found += [Manifest.load(path.parent) for path in inside]
    return found


def by_shard(manifest: Manifest) -> list[Manifest]:
    """One manifest per shard, so that a worker process receives and checks only its own shard."""
    return [
        manifest.model_copy(update={"splits": {name: Split(shards=(shard,))}})
        for name, split in manifest.splits.items()
        for shard in split.shards
    ]


def map_shards(
    function: Callable[[T], R], shards: Sequence[T], num_workers: int, name: str
) -> list[R]:
    """Apply a picklable function to each shard in worker processes; results keep their order.

    `name` is shown with the progress. Raises `MachineError` if a worker process is killed.
    """
    if num_workers <= 1 or len(shards) <= 1:
        return list(counted(map(function, shards), len(shards), name, "shards"))
    with ProcessPoolExecutor(min(num_workers, len(shards)), get_context("spawn")) as pool:
        try:
            return list(counted(pool.map(function, shards), len(shards), name, "shards"))
        except BrokenProcessPool as error:
            raise MachineError(
                "a worker process was killed (out of memory?); run again with fewer --workers"
            ) from error
