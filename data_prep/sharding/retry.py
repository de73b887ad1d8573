"""Runs the samples in `quarantine/` again and adds those that are good now as new shards.

Finished shards keep their bytes and samples their ids: new shards follow the others of their split. A
sample that is tried again moves from the list of its shard to the new shard, or to the list of that
when it is bad once more. The plan file names new shards first, all that follows is derived from it, so
a retry that was killed is completed by the next one.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from data_prep.corpus import Item
from data_prep.readers import READERS
from data_prep.sharding.finalize import finalize
from data_prep.sharding.listings import (
    FILTERED,
    QUARANTINE,
    LeftOut,
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
from data_prep.sharding.shard_plan import PlannedShard, cut_into_shards, in_order
from data_prep.sharding.sharder import Progress, write_retried
from muomni.data.shards.manifest import Manifest, hash64
from muomni.data.shards.tar_index import index_path
from muomni.data.shards.writer import (
    columns_path,
    load_columns,
    load_record,
    record_path,
    store_record,
)
from muomni.errors import DataError


@dataclass(frozen=True, slots=True)
class RetryOutcome:
    """What a retry came to; `gone` are the keys that the corpus does not list any more."""

    manifest: Manifest
    num_tried: int
    num_good: int
    gone: tuple[str, ...]


def retry_bad(
    root: Path, source: Path | None, media_root: Path | None, num_workers: int, progress: Progress
) -> RetryOutcome:
    """Try all quarantined samples of a dataset again; without a good one nothing changes.

    `source` and `media_root` say where the corpus lies now, when it was moved. Raises `DataError` for
    a dataset that is not finished or was not made here, and as the reader does.
    """
    plan = complete_plan(root)
    # Completes a retry that was killed after its new shards were named.
    _settle(root, plan)
    listed = [
        entry for shard in plan.all_shards for entry in load_listing(root / QUARANTINE, shard.path)
    ]
    if not listed:
        return RetryOutcome(finalize(root), 0, 0, ())
    options, reader_options = original_options(root, plan, source, media_root)
    items = READERS[plan.task][plan.reader](options.source, reader_options)
    found, declared = _find(listed, items, _used_keys(root, plan))
    gone = tuple(entry["key"] for entry in listed if entry["key"] not in found)
    infix = f"retry{len(plan.retries) + 1}-"
    shards = cut_into_shards(in_order(found.values(), options.seed), declared, options, infix)
    records = write_retried(shards, options, plan.config_digest, root, num_workers, progress)
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
    _settle(root, plan)
    return RetryOutcome(finalize(root), len(found), num_good, gone)


def _find(
    listed: list[LeftOut], items: Iterable[Item], used: set[int]
) -> tuple[dict[str, Item], set[str]]:
    """The items of listed samples by listed key, and the splits that the corpus declares.

    A row without a usable id was listed under a key of its own: it is found by its place, unless the
    id that it has now is that of another sample. Raises `DataError` for two items of one key.
    """
    keys = {entry["key"] for entry in listed}
    places = {entry["source"]: entry["key"] for entry in listed}
    by_key: dict[str, Item] = {}
    by_place: dict[str, Item] = {}
    declared: set[str] = set()
    for item in items:
        if item.declared_split:
            declared.add(item.declared_split)
        place = printable(item.source)
        if item.key in keys:
            first = by_key.setdefault(item.key, item)
            if first is not item:
                raise DataError(
                    f"key {item.key!r} occurs twice: {first.source} and {item.source}; rename or "
                    "remove one"
                )
        elif place in places and hash64(item.key) not in used:
            by_place[places[place]] = item
    return {**by_place, **by_key}, declared


def _used_keys(root: Path, plan: PlanFile) -> set[int]:
    """Hashes of the keys in all shards."""
    paths = (columns_path(root / shard.path) for shard in plan.all_shards)
    return {int(number) for path in paths for number in load_columns(path)["key_hash"]}


def _settle(root: Path, plan: PlanFile) -> None:
    """Take samples off the lists that they left, and count again in the records of those shards."""
    rounds = [frozenset(each.keys) for each in plan.retries]
    for shard in plan.shards:
        _settle_shard(root, shard.path, frozenset().union(*rounds))
    for number, each in enumerate(plan.retries, start=1):
        for shard in each.shards:
            _settle_shard(root, shard.path, frozenset().union(*rounds[number:]))


def _settle_shard(root: Path, path: str, left: frozenset[str]) -> None:
    bad = load_listing(root / QUARANTINE, path)
    staying = [entry for entry in bad if entry["key"] not in left]
    if len(staying) < len(bad):
        store_listing(root / QUARANTINE, path, staying)
    record = load_record(root / path)
    assert record is not None, "only shards with a record are settled"
    reasons = [entry["reason"] for entry in staying + load_listing(root / FILTERED, path)]
    dropped = dict(sorted(Counter(reasons).items()))
    if dropped != record.dropped:
        planned = record.num_samples + len(reasons)
        update = {"dropped": dropped, "num_planned": planned}
        store_record(root / path, record.model_copy(update=update))


def _remove(root: Path, shards: tuple[PlannedShard, ...]) -> None:
    """Delete the files of a retry that brought nothing."""
    for shard in shards:
        tar = root / shard.path
        for path in (record_path(tar), tar, index_path(tar), columns_path(tar)):
            path.unlink(missing_ok=True)
        for folder in (QUARANTINE, FILTERED):
            store_listing(root / folder, shard.path, [])
