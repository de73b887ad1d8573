"""Convert a corpus to a dataset: list, plan, write shards, and finalize."""

import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from data_prep.corpus import require_folder
from data_prep.options import ReaderOptions
from data_prep.readers import find_reader
from data_prep.sharding.finalize import finalize
from data_prep.sharding.listings import FILTERED, QUARANTINE
from data_prep.sharding.plan_file import (
    PLAN_NAME,
    load_plan_file,
    missing_shards,
    plan_file,
    store_plan_file,
)
from data_prep.sharding.shard_plan import ShardingOptions, build_plan
from data_prep.sharding.sharder import write_shards
from muomni.data.shards.exclusion_mask import FOLDER as EXCLUDE
from muomni.data.shards.manifest import MANIFEST_NAME, SPLIT_NAMES, Manifest
from muomni.errors import DataError
from muomni.io.count_progress import Progress, counted

OpenProgress = Callable[[int | None, str], AbstractContextManager[Progress]]


def prepare(
    options: ShardingOptions,
    reader_options: ReaderOptions,
    out: Path,
    num_workers: int,
    task: tuple[int, int],
    open_progress: OpenProgress,
) -> Manifest | None:
    """Create the dataset `out`, or the part of one array task (index, number of tasks).

    Returns the manifest, or None while other tasks are unfinished.
    """
    if out.exists() and not out.is_dir():
        raise DataError(f"--out {out} is a file; choose a folder")
    if reader_options.media_root:
        require_folder(reader_options.media_root, "media folder")
    read = find_reader(options.task, options.reader)
    items = counted(
        read(options.source, reader_options), None, f"{options.name} (listing)", "items"
    )
    plan = build_plan(items, options)
    summary = store_plan_file(out, plan_file(plan))
    for note in plan.notes:
        print(f"warning: {note}", flush=True)
    # Samples that a retry moved to shards of its own.
    plan = plan.without(summary.retried_keys)
    index, num_tasks = task
    num_own = sum(len(shard.items) for shard in plan.shards[index::num_tasks])
    with open_progress(num_own, f"{options.name} ({options.task})") as progress:
        write_shards(plan, out, num_workers, task, progress)
    if missing_shards(out, summary):
        return None
    return finalize(out)


def remove_dataset(out: Path) -> None:
    """Delete a dataset that data_prep created, and nothing else in its folder.

    Raises `DataError` if the folder is not empty and has no plan file.
    """
    if not out.exists():
        return
    if load_plan_file(out) is None:
        if any(out.iterdir()):
            raise DataError(f"--overwrite: {out} was not created by data_prep; delete it yourself")
        return
    (out / MANIFEST_NAME).unlink(missing_ok=True)
    for name in (*SPLIT_NAMES, QUARANTINE, FILTERED, EXCLUDE):
        if (out / name).is_dir():
            shutil.rmtree(out / name)
    for name in ("README.md", PLAN_NAME):
        (out / name).unlink(missing_ok=True)
