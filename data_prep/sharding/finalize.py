"""Turn finished shards into a dataset: write the dataset card and, last, the manifest."""

from pathlib import Path

import numpy as np

from data_prep.filters import split_dropped
from data_prep.options import SPLIT_OVERLAP
from data_prep.sharding.listings import QUARANTINE
from data_prep.sharding.plan_file import complete_plan
from data_prep.sharding.sharder import too_many_bad
from muomni.data.shards.manifest import (
    MANIFEST_NAME,
    SPLIT_NAMES,
    Manifest,
    ShardRecord,
    Split,
    fingerprint,
)
from muomni.data.shards.writer import columns_path, load_columns, load_record
from muomni.errors import DataError
from muomni.io.atomic_write import write_atomic


def finalize(root: Path) -> Manifest:
    """Combine all records into card and manifest.

    Raises `DataError` if shards are missing, too many samples are bad, or the train split is empty.
    """
    plan = complete_plan(root)
    records = [load_record(root / shard.path) for shard in plan.all_shards]
    finished = [record for record in records if record is not None]
    dropped = _sum_dropped(finished)
    bad, filtered = split_dropped(dropped)
    num_bad, num_items = sum(bad.values()), sum(record.num_planned for record in finished)
    if num_bad > plan.max_bad_fraction * num_items:
        raise too_many_bad(root, num_bad, num_items, plan.max_bad_fraction)
    splits = {
        name: Split(shards=tuple(r for r in finished if r.split == name and r.num_samples))
        for name in SPLIT_NAMES
    }
    splits = {name: split for name, split in splits.items() if split.shards}
    if "train" not in splits:
        remedy = f"fix what {QUARANTINE}/ lists ({_counts(bad)}), " if bad else ""
        remedy += f"loosen the filters ({_counts(filtered)}), " if plan.filters else ""
        remedy += "choose another --overlap, " if SPLIT_OVERLAP in filtered else ""
        raise DataError(
            f"the train split of {root} is empty; {remedy}lower --val-fraction and --test-fraction, "
            "or add data"
        )
    manifest = Manifest(
        root=root,
        name=plan.name,
        task=plan.task,
        reader=plan.reader,
        reader_options=plan.reader_options,
        split_rule=plan.split_rule,
        license=plan.license,
        sources=(plan.source,),
        config_digest=plan.config_digest,
        fingerprint=fingerprint(splits),
        splits=splits,
        dropped=dropped,
        filters=plan.filters,
        preprocessing=plan.preprocessing,
        changed=plan.changed,
        overlap=_overlap(root, splits) if plan.overlap == "allow" else {},
    )
    _remove_leftovers(root)
    store_manifest(manifest)
    return manifest


def store_manifest(manifest: Manifest) -> None:
    """Write the dataset card, then the manifest, which marks the dataset as complete."""
    write_atomic(manifest.root / "README.md", dataset_card(manifest).encode())
    write_atomic(manifest.root / MANIFEST_NAME, manifest.to_json().encode())


def dataset_card(manifest: Manifest) -> str:
    """A Markdown page about the content and origin of the dataset."""
    rows = [
        "| split | samples | shards | hours of audio | images | characters | bytes |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, split in manifest.splits.items():
        totals = split.totals
        rows.append(
            f"| {name} | {totals.num_samples:,} | {len(split.shards)} "
            f"| {totals.duration_ms / 3.6e6:.3f} | {totals.num_images:,} "
            f"| {totals.num_chars:,} | {totals.num_bytes:,} |"
        )
    bad, filtered = split_dropped(manifest.dropped)
    options = ", ".join(f"{key}={value}" for key, value in manifest.reader_options.items())
    facts = [
        f"- Task: {manifest.task}",
        f"- Reader: {manifest.reader}" + (f" ({options})" if options else ""),
        f"- Source: {', '.join(manifest.sources) or 'not recorded'}",
        f"- License: {manifest.license or 'not recorded'}",
        f"- Splits: {manifest.split_rule}",
        f"- Bad: {_counts(bad)}",
        *_filter_facts(manifest.filters, filtered),
        *([f"- Changed: {_counts(manifest.changed)}"] if manifest.changed else []),
        *_overlap_facts(manifest.overlap),
        *_preprocessing_facts(manifest.preprocessing),
        f"- Fingerprint: `{manifest.fingerprint}`",
    ]
    title = f"# {manifest.name}"
    note = "WebDataset tar shards, written by `python -m data_prep`; `manifest.json` lists them."
    return "\n".join([title, "", note, "", *facts, "", *rows]) + "\n"


def _filter_facts(filters: dict[str, str], filtered: dict[str, int]) -> list[str]:
    """Lines about the filters, if there are any."""
    if not filters and not filtered:
        return []
    bounds = ", ".join(f"{name}={value}" for name, value in filters.items()) or "none"
    return [f"- Filters: {bounds}", f"- Filtered: {_counts(filtered)}"]


def _overlap_facts(overlap: dict[str, int]) -> list[str]:
    """Lines about held-out samples whose groups are also in train, if this was allowed."""
    return [
        f"- Overlap: the groups of {count:,} samples of {name} are also in train"
        for name, count in overlap.items()
    ]


def _preprocessing_facts(preprocessing: dict[str, str]) -> list[str]:
    """Lines about the preprocessing, if there is any."""
    chosen = ", ".join(f"{name}={value}" for name, value in preprocessing.items())
    return [f"- Preprocessing: {chosen}"] if chosen else []


def _counts(dropped: dict[str, int]) -> str:
    return ", ".join(f"{reason}: {count}" for reason, count in dropped.items()) or "none"


def _overlap(root: Path, splits: dict[str, Split]) -> dict[str, int]:
    """The number of samples of each other split whose groups are also in train, unless it is 0."""
    groups = {
        name: np.concatenate(
            [load_columns(columns_path(root / shard.path))["group_hash"] for shard in split.shards]
        )
        for name, split in splits.items()
    }
    trained = groups.pop("train")
    counts = {name: int(np.isin(own, trained).sum()) for name, own in groups.items()}
    return {name: count for name, count in counts.items() if count}


def _remove_leftovers(root: Path) -> None:
    """Delete temporary shard files of killed runs; no run is active once all records exist."""
    for split in SPLIT_NAMES:
        for path in (root / split).glob(".*.tmp-*"):
            path.unlink(missing_ok=True)


def _sum_dropped(records: list[ShardRecord]) -> dict[str, int]:
    dropped: dict[str, int] = {}
    for record in records:
        for reason, count in record.dropped.items():
            dropped[reason] = dropped.get(reason, 0) + count
    return dict(sorted(dropped.items()))
