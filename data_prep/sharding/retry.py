"""Encode quarantined samples again, and add the valid ones as new shards.

Finished shards keep their bytes and samples their ids, since new shards follow the others of their
split. A retried sample moves from the listing of its shard to the new shard or, if it fails again, to
the listing of that. The plan file records new shards first and everything else is derived from it, so
the next retry completes one that was killed.
"""

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from data_prep.corpus import Item
from data_prep.readers import find_reader
from data_prep.sharding.finalize import finalize
from data_prep.sharding.listings import (
    FILTERED,
    QUARANTINE,
    SkippedSample,
    load_listing,
    printable,
    store_listing,
)
from data_prep.sharding.plan_file import (
    PlanFile,
    PlannedPath,
    RetryRound,
    complete_plan,
    original_options,
    write_plan_file,
)
from data_prep.sharding.same_names import separate_same_names
from data_prep.sharding.samples import unique_keys
from data_prep.sharding.shard_plan import (
    PlannedShard,
    ShardingOptions,
    order_items,
    split_into_shards,
)
from data_prep.sharding.sharder import write_retry_shards
from data_prep.sharding.splits import Assignment, assign_splits, overlap_problem
from muomni.data.shards.manifest import SPLIT_NAMES, Manifest, hash64
from muomni.data.shards.tar_index import index_path
from muomni.data.shards.writer import (
    columns_path,
    load_columns,
    load_record,
    record_path,
    store_record,
)
from muomni.io.count_progress import Progress


@dataclass(frozen=True, slots=True)
class RetryOutcome:
    """Result of a retry; `gone` are the keys that the corpus no longer lists."""

    manifest: Manifest
    num_tried: int
    num_good: int
    gone: tuple[str, ...]


def retry_bad(
    root: Path, source: Path | None, media_root: Path | None, num_workers: int, progress: Progress
) -> RetryOutcome:
    """Retry all quarantined samples of a dataset; nothing changes if none of them is valid.

    `source` and `media_root` override the location of the corpus. Raises `DataError` if the dataset is
    unfinished or was adopted, and as the reader does.
    """
    plan = complete_plan(root)
    # Complete a retry that was killed after its new shards were recorded.
    _update_listings(root, plan)
    listed = [
        entry for shard in plan.all_shards for entry in load_listing(root / QUARANTINE, shard.path)
    ]
    if not listed:
        return RetryOutcome(finalize(root), 0, 0, ())
    options, reader_options = original_options(root, plan, source, media_root)
    # Captions of an image stay apart, since a joined item would repeat those that were stored.
    read = find_reader(plan.task, plan.reader)
    listing = separate_same_names(read(options.source, reader_options), options.roots)
    items, _ = unique_keys(listing)
    assigned = assign_splits(items, options)
    found = _find(listed, assigned.items, _used_keys(root, plan))
    gone = tuple(entry["key"] for entry in listed if entry["key"] not in found)
    shards = _plan_shards(root, plan, options, assigned, list(found.values()))
    records = write_retry_shards(shards, options, plan.config_digest, root, num_workers, progress)
    num_good = sum(record.num_samples for record in records)
    if num_good == 0:
        _remove(root, shards)
        return RetryOutcome(finalize(root), len(found), 0, gone)
    added = RetryRound(
        keys=tuple(found),
        shards=tuple(
            PlannedPath(path=shard.path, split=shard.split, num_planned=len(shard.items))
            for shard in shards
        ),
    )
    plan = plan.model_copy(update={"retries": (*plan.retries, added)})
    write_plan_file(root, plan)
    _update_listings(root, plan)
    return RetryOutcome(finalize(root), len(found), num_good, gone)


def _find(listed: list[SkippedSample], items: list[Item], used: set[int]) -> dict[str, int]:
    """The positions of listed samples in `items`, by listed key.

    A row without a valid id is listed under a generated key. It is found by its place in the corpus, unless its
    new id is that of another sample.
    """
    keys = {entry["key"] for entry in listed}
    places = {entry["source"]: entry["key"] for entry in listed}
    by_key: dict[str, int] = {}
    by_place: dict[str, int] = {}
    for position, item in enumerate(items):
        place = printable(item.source)
        if item.key in keys:
            by_key[item.key] = position
        elif place in places and hash64(item.key) not in used:
            by_place[places[place]] = position
    return {**by_place, **by_key}


def _plan_shards(
    root: Path, plan: PlanFile, options: ShardingOptions, assigned: Assignment, positions: list[int]
) -> tuple[PlannedShard, ...]:
    """The shards of samples that are tried again; groups stay in the split that has them already."""
    items = [assigned.items[position] for position in positions]
    groups = {hash64(item.group) for item in items}
    stored = _stored_groups(root, plan, np.array(sorted(groups), np.uint64))
    split_of: dict[str, int] = {}
    for number, (item, position) in enumerate(zip(items, positions, strict=True)):
        split_of[item.key] = int(assigned.splits[position])
        splits = stored.get(hash64(item.group), set())
        if not splits or split_of[item.key] in splits or options.overlap == "allow":
            continue
        if options.overlap == "drop":
            items[number] = replace(item, problem=overlap_problem(SPLIT_NAMES[min(splits)]))
        else:
            split_of[item.key] = min(splits)
    ordered = order_items(items, options.seed)
    numbers = np.array([split_of[item.key] for item in ordered], np.int8)
    return split_into_shards(ordered, numbers, options, f"retry{len(plan.retries) + 1}-")


def _stored_groups(root: Path, plan: PlanFile, groups: np.ndarray) -> dict[int, set[int]]:
    """The numbers of the splits that already have these groups."""
    stored: dict[int, set[int]] = {}
    for shard in plan.all_shards:
        hashes = load_columns(columns_path(root / shard.path))["group_hash"]
        for group in np.intersect1d(hashes, groups).tolist():
            stored.setdefault(group, set()).add(SPLIT_NAMES.index(shard.split))
    return stored


def _used_keys(root: Path, plan: PlanFile) -> set[int]:
    """Hashes of the keys in all shards."""
    paths = (columns_path(root / shard.path) for shard in plan.all_shards)
    return {int(number) for path in paths for number in load_columns(path)["key_hash"]}


def _update_listings(root: Path, plan: PlanFile) -> None:
    """Remove retried samples from the listings of their shards, and update the records."""
    rounds = [frozenset(each.keys) for each in plan.retries]
    for shard in plan.shards:
        _update_listing(root, shard.path, frozenset().union(*rounds))
    for number, each in enumerate(plan.retries, start=1):
        for shard in each.shards:
            _update_listing(root, shard.path, frozenset().union(*rounds[number:]))


def _update_listing(root: Path, path: str, left: frozenset[str]) -> None:
    bad = load_listing(root / QUARANTINE, path)
    staying = [entry for entry in bad if entry["key"] not in left]
    if len(staying) < len(bad):
        store_listing(root / QUARANTINE, path, staying)
    record = load_record(root / path)
    assert record is not None, "only finished shards have listings"
    reasons = [entry["reason"] for entry in staying + load_listing(root / FILTERED, path)]
    dropped = dict(sorted(Counter(reasons).items()))
    if dropped != record.dropped:
        planned = record.num_samples + len(reasons)
        update = {"dropped": dropped, "num_planned": planned}
        store_record(root / path, record.model_copy(update=update))


def _remove(root: Path, shards: tuple[PlannedShard, ...]) -> None:
    """Delete the files of a retry without valid samples."""
    for shard in shards:
        tar = root / shard.path
        for path in (record_path(tar), tar, index_path(tar), columns_path(tar)):
            path.unlink(missing_ok=True)
        for folder in (QUARANTINE, FILTERED):
            store_listing(root / folder, shard.path, [])
