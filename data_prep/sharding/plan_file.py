"""The plan file (`shard_plan.json`): the shards of a dataset and the request they fulfill.

It is written before the first shard, so that every task and the verbs `finalize` and `retry-bad` know
which shards must exist and how to list the corpus again.
"""

import json
from pathlib import Path

from pydantic import Field, ValidationError

from data_prep.options import Filters, Preprocessing, ReaderOptions
from data_prep.sharding.shard_plan import ShardingOptions, ShardPlan
from muomni.config.models import Record
from muomni.data.shards.manifest import MANIFEST_NAME, Task
from muomni.data.shards.writer import load_record
from muomni.errors import DataError
from muomni.io.atomic_write import write_atomic

PLAN_NAME = "shard_plan.json"


class PlannedPath(Record):
    """A planned shard."""

    path: str
    split: str
    num_planned: int


class RetryRound(Record):
    """A retry of bad samples: their keys as listed, and their new shards.

    Samples that fail again are listed with the new shards, so each sample belongs to one shard.
    """

    keys: tuple[str, ...]
    shards: tuple[PlannedPath, ...]


class Request(Record):
    """Location of the corpus, and the options that order and split it."""

    source: str
    media_root: str = ""
    seed: int
    val_fraction: float
    test_fraction: float
    split_from: str
    overlap: str = "refuse"
    shard_size: str


class PlanFile(Record):
    """The parts of a plan that `finalize` and `retry-bad` need; see `ShardPlan` for its last fields."""

    name: str
    task: Task
    reader: str
    reader_options: dict[str, str] = Field(default_factory=dict)
    split_rule: str
    license: str = ""
    source: str = ""
    max_bad_fraction: float
    filters: dict[str, str] = Field(default_factory=dict)
    preprocessing: dict[str, str] = Field(default_factory=dict)
    config_digest: str
    shards: tuple[PlannedPath, ...]
    request: Request | None = None
    retries: tuple[RetryRound, ...] = ()
    changed: dict[str, int] = Field(default_factory=dict)
    notes: tuple[str, ...] = ()
    overlap: str = ""

    @property
    def all_shards(self) -> tuple[PlannedPath, ...]:
        """The planned shards, followed by those of retries."""
        return self.shards + tuple(shard for each in self.retries for shard in each.shards)

    @property
    def retried_keys(self) -> frozenset[str]:
        """Keys that have moved from the planned shards to those of a retry."""
        return frozenset(key for each in self.retries for key in each.keys)


def plan_file(plan: ShardPlan) -> PlanFile:
    """The summary of a plan that is stored beside the shards."""
    options = plan.options
    return PlanFile(
        name=options.name,
        task=options.task,
        reader=options.reader,
        reader_options=options.reader_options,
        split_rule=options.split_rule,
        license=options.license,
        source=options.source.name,
        max_bad_fraction=options.max_bad_fraction,
        filters=options.filters.as_text(),
        preprocessing=options.preprocessing.as_text(),
        config_digest=plan.digest,
        shards=tuple(
            PlannedPath(path=shard.path, split=shard.split, num_planned=len(shard.items))
            for shard in plan.shards
        ),
        request=Request(
            source=str(options.source.absolute()),
            media_root=str(options.media_root.absolute()) if options.media_root else "",
            seed=options.seed,
            val_fraction=options.val_fraction,
            test_fraction=options.test_fraction,
            split_from=options.split_from,
            overlap=options.overlap,
            shard_size=options.shard_size,
        ),
        changed=plan.changed,
        notes=plan.notes,
        overlap=plan.overlap,
    )


def original_options(
    root: Path, plan: PlanFile, source: Path | None, media_root: Path | None
) -> tuple[ShardingOptions, ReaderOptions]:
    """Recover the options of a dataset; `source` and `media_root` override the location of the corpus.

    Raises `DataError` for a plan file of an earlier version, which does not contain them.
    """
    if plan.request is None:
        raise DataError(
            f"{root / PLAN_NAME} was written by an earlier version and does not record the corpus; rerun "
            "the command that created the dataset, which also rewrites shards with repaired files"
        )
    request = plan.request
    media_root = media_root or (Path(request.media_root) if request.media_root else None)
    options = ShardingOptions(
        name=plan.name,
        task=plan.task,
        reader=plan.reader,
        reader_options=plan.reader_options,
        source=source or Path(request.source),
        media_root=media_root,
        seed=request.seed,
        val_fraction=request.val_fraction,
        test_fraction=request.test_fraction,
        split_from=request.split_from,
        overlap=request.overlap,
        shard_size=request.shard_size,
        max_bad_fraction=plan.max_bad_fraction,
        license=plan.license,
        filters=Filters.from_text(plan.filters),
        preprocessing=Preprocessing.from_text(plan.preprocessing),
    )
    return options, ReaderOptions.from_text(plan.reader_options, media_root)


def load_plan_file(root: Path) -> PlanFile | None:
    """Load the plan file of a dataset folder, or None if there is none."""
    path = root / PLAN_NAME
    try:
        return PlanFile(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, ValidationError) as error:
        raise DataError(f"{path} is damaged; delete {root} and run again") from error


def store_plan_file(root: Path, plan: PlanFile) -> PlanFile:
    """Write the plan file, keep earlier retries, and return what was written.

    Raises `DataError` if the folder contains shards of another plan.
    """
    existing = load_plan_file(root)
    if existing is None and (root / MANIFEST_NAME).exists():
        raise DataError(
            f"{root} already contains a dataset; choose another --out or use --overwrite"
        )
    if existing is not None and existing.config_digest != plan.config_digest:
        raise DataError(
            f"{root} contains shards of {existing.name!r}, made from other files or with other options; "
            "choose another --out or use --overwrite (`retry-bad` adds samples that were fixed since)"
        )
    if existing is not None:
        plan = plan.model_copy(update={"retries": existing.retries})
    write_plan_file(root, plan)
    return plan


def write_plan_file(root: Path, plan: PlanFile) -> None:
    """Write the plan file atomically."""
    # Earlier versions reject unknown keys, so unused ones are omitted.
    optional = ("filters", "preprocessing", "retries", "changed", "notes", "overlap")
    content = plan.model_dump(mode="json", exclude={n for n in optional if not getattr(plan, n)})
    if plan.request and plan.request.overlap == "refuse":
        del content["request"]["overlap"]
    text = json.dumps(content, indent=1, sort_keys=True) + "\n"
    write_atomic(root / PLAN_NAME, text.encode())


def complete_plan(root: Path) -> PlanFile:
    """Load the plan file of a dataset; raises `DataError` unless all its shards are finished."""
    plan = load_plan_file(root)
    if plan is None:
        raise DataError(f"{root} has no {PLAN_NAME}; run its `python -m data_prep` command first")
    missing = missing_shards(root, plan)
    if missing:
        raise DataError(
            f"{len(missing)} of {len(plan.all_shards)} shards of {root} are not finished, the first is "
            f"{missing[0]}; rerun the command (or the array tasks) that creates the dataset"
        )
    return plan


def missing_shards(root: Path, plan: PlanFile) -> list[str]:
    """Paths of planned shards without a record of this plan."""
    shards = plan.all_shards
    return [shard.path for shard in shards if not has_record(root, plan, shard.path)]


def has_record(root: Path, plan: PlanFile, path: str) -> bool:
    """Whether a shard of this plan is finished."""
    record = load_record(root / path)
    return record is not None and record.config_digest == plan.config_digest
