"""From finished shards to a dataset: plan file, manifest and dataset card.

The plan file (`shard_plan.json`) is written before the first shard, so that any task, or the verb
`finalize`, can tell which shards must exist. The manifest is written last.
"""

import json
from pathlib import Path

from pydantic import Field, ValidationError

from data_prep.filters import bad_and_filtered
from data_prep.shard_plan import ShardPlan
from data_prep.sharder import too_many_bad
from muomni.config.models import Section
from muomni.data.atomic_write import write_atomic
from muomni.data.manifest import (
    MANIFEST_NAME,
    SPLIT_NAMES,
    Manifest,
    ShardRecord,
    Split,
    Task,
    fingerprint,
)
from muomni.data.shard_writer import load_record
from muomni.errors import DataError

PLAN_NAME = "shard_plan.json"


class PlannedPath(Section):
    """A shard that the plan asks for."""

    path: str
    split: str
    num_planned: int


class PlanFile(Section):
    """What `finalize` has to know of a plan."""

    name: str
    task: Task
    reader: str
    reader_options: dict[str, str] = Field(default_factory=dict)
    split_rule: str
    licence: str = ""
    source: str = ""
    max_bad_fraction: float
    filters: dict[str, str] = Field(default_factory=dict)
    config_digest: str
    shards: tuple[PlannedPath, ...]


def plan_file(plan: ShardPlan) -> PlanFile:
    """The summary of a plan that is kept beside the shards."""
    options = plan.options
    return PlanFile(
        name=options.name,
        task=options.task,
        reader=options.reader,
        reader_options=options.reader_options,
        split_rule=options.split_rule,
        licence=options.licence,
        source=options.source.name,
        max_bad_fraction=options.max_bad_fraction,
        filters=options.filters.as_text(),
        config_digest=plan.digest,
        shards=tuple(
            PlannedPath(path=shard.path, split=shard.split, num_planned=len(shard.items))
            for shard in plan.shards
        ),
    )


def load_plan_file(root: Path) -> PlanFile | None:
    """The plan file of a dataset folder, None when there is none."""
    path = root / PLAN_NAME
    try:
        return PlanFile(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, ValidationError) as error:
        raise DataError(f"{path} is damaged; delete {root} and run again") from error


def store_plan_file(root: Path, plan: PlanFile) -> None:
    """Write the plan file; raises `DataError` when the folder holds another plan's shards."""
    existing = load_plan_file(root)
    if existing is None and (root / MANIFEST_NAME).exists():
        raise DataError(f"{root} already holds a dataset; choose another --out or add --overwrite")
    if existing is not None and existing.config_digest != plan.config_digest:
        raise DataError(
            f"{root} holds shards of {existing.name!r} made from another source state or with "
            "other options; choose another --out or add --overwrite"
        )
    content = plan.model_dump(mode="json", exclude=None if plan.filters else {"filters"})
    text = json.dumps(content, indent=1, sort_keys=True) + "\n"
    write_atomic(root / PLAN_NAME, text.encode())


def missing_shards(root: Path, plan: PlanFile) -> list[str]:
    """Paths of planned shards that have no record of this plan yet."""
    return [shard.path for shard in plan.shards if _record(root, plan, shard.path) is None]


def finalize(root: Path) -> Manifest:
    """Join all records into card and manifest.

    Raises `DataError` when shards are missing, when too many samples are bad, or when no training
    sample is left.
    """
    plan = load_plan_file(root)
    if plan is None:
        raise DataError(f"{root} holds no {PLAN_NAME}; run its `python -m data_prep` command first")
    missing = missing_shards(root, plan)
    if missing:
        raise DataError(
            f"{len(missing)} of {len(plan.shards)} shards of {root} are not finished, the first is "
            f"{missing[0]}; run its array tasks again"
        )
    records = [_record(root, plan, shard.path) for shard in plan.shards]
    finished = [record for record in records if record is not None]
    dropped = _sum_dropped(finished)
    bad, filtered = bad_and_filtered(dropped)
    num_bad, num_items = sum(bad.values()), sum(record.num_planned for record in finished)
    if num_bad > plan.max_bad_fraction * num_items:
        raise too_many_bad(root, num_bad, num_items, plan.max_bad_fraction)
    splits = {
        name: Split(shards=tuple(r for r in finished if r.split == name and r.num_samples))
        for name in SPLIT_NAMES
    }
    splits = {name: split for name, split in splits.items() if split.shards}
    if "train" not in splits:
        remedy = f"loosen the filters ({_counts(filtered)}), " if filtered else ""
        raise DataError(
            f"no sample of {root} is left in split train; {remedy}lower --val-fraction and "
            "--test-fraction or give more data"
        )
    manifest = Manifest(
        root=root,
        name=plan.name,
        task=plan.task,
        reader=plan.reader,
        reader_options=plan.reader_options,
        split_rule=plan.split_rule,
        licence=plan.licence,
        sources=(plan.source,),
        config_digest=plan.config_digest,
        fingerprint=fingerprint(splits),
        splits=splits,
        dropped=dropped,
        filters=plan.filters,
    )
    _remove_leftovers(root)
    store_manifest(manifest)
    return manifest


def store_manifest(manifest: Manifest) -> None:
    """Write the dataset card, then the manifest, which makes the dataset complete."""
    write_atomic(manifest.root / "README.md", dataset_card(manifest).encode())
    write_atomic(manifest.root / MANIFEST_NAME, manifest.to_json().encode())


def dataset_card(manifest: Manifest) -> str:
    """A page on what the dataset holds and where it comes from."""
    rows = [
        "| split | samples | shards | hours of audio | pictures | characters | bytes |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, split in manifest.splits.items():
        totals = split.totals
        rows.append(
            f"| {name} | {totals.num_samples:,} | {len(split.shards)} "
            f"| {totals.duration_ms / 3.6e6:.3f} | {totals.num_images:,} "
            f"| {totals.num_chars:,} | {totals.num_bytes:,} |"
        )
    bad, filtered = bad_and_filtered(manifest.dropped)
    options = ", ".join(f"{key}={value}" for key, value in manifest.reader_options.items())
    facts = [
        f"- Task: {manifest.task}",
        f"- Reader: {manifest.reader}" + (f" ({options})" if options else ""),
        f"- Source: {', '.join(manifest.sources) or 'not recorded'}",
        f"- Licence: {manifest.licence or 'not recorded'}",
        f"- Splits: {manifest.split_rule}",
        f"- Left out: {_counts(bad)}",
        *_filter_facts(manifest.filters, filtered),
        f"- Fingerprint: `{manifest.fingerprint}`",
    ]
    title = f"# {manifest.name}"
    note = "Plain WebDataset tar shards, made by `python -m data_prep`; `manifest.json` lists them."
    return "\n".join([title, "", note, "", *facts, "", *rows]) + "\n"


def _filter_facts(filters: dict[str, str], filtered: dict[str, int]) -> list[str]:
    """Bounds and counts for the card; nothing for a dataset without filters."""
    if not filters:
        return []
    bounds = ", ".join(f"{name}={value}" for name, value in filters.items())
    return [f"- Filters: {bounds}", f"- Filtered: {_counts(filtered)}"]


def _counts(dropped: dict[str, int]) -> str:
    return ", ".join(f"{reason}: {count}" for reason, count in dropped.items()) or "nothing"


def _record(root: Path, plan: PlanFile, path: str) -> ShardRecord | None:
    record = load_record(root / path)
    if record is None or record.config_digest != plan.config_digest:
        return None
    return record


def _remove_leftovers(root: Path) -> None:
    """Delete temporary shard files of killed runs; with all records there, none is in use."""
    for split in SPLIT_NAMES:
        for path in (root / split).glob(".*.tmp-*"):
            path.unlink(missing_ok=True)


def _sum_dropped(records: list[ShardRecord]) -> dict[str, int]:
    dropped: dict[str, int] = {}
    for record in records:
        for reason, count in record.dropped.items():
            dropped[reason] = dropped.get(reason, 0) + count
    return dict(sorted(dropped.items()))
