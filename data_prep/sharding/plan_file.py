"""The plan file (`shard_plan.json`): which shards a dataset has, and the request that they answer.

It is written before the first shard, so that any task, or the verbs `finalize` and `retry-bad`, can
tell which shards must exist and how to list the corpus again.
"""

import json
from pathlib import Path

from pydantic import Field, ValidationError

from data_prep.corpus import ReaderOptions
from data_prep.filters import Filters
from data_prep.media.treatment import Treatment
from data_prep.sharding.shard_plan import ShardingOptions, ShardPlan
from muomni.config.models import Section
from muomni.data.shards.manifest import MANIFEST_NAME, Task
from muomni.data.shards.writer import load_record
from muomni.errors import DataError
from muomni.io.atomic_write import write_atomic

PLAN_NAME = "shard_plan.json"


class PlannedPath(Section):
    """A shard that the plan asks for."""

    path: str
    split: str
    num_planned: int


class RetryRound(Section):
    """Samples that left the lists of bad ones: `keys` as they were listed, and their new shards.

    Those that were bad again are listed with the new shards, so each sample belongs to one shard.
    """

    keys: tuple[str, ...]
    shards: tuple[PlannedPath, ...]


class Request(Section):
    """Where the corpus lay, and the options that order and part it."""

    source: str
    media_root: str = ""
    seed: int
    val_fraction: float
    test_fraction: float
    split_from: str
    shard_size: str


class PlanFile(Section):
    """What `finalize` and `retry-bad` have to know of a plan."""

    name: str
    task: Task
    reader: str
    reader_options: dict[str, str] = Field(default_factory=dict)
    split_rule: str
    license: str = ""
    source: str = ""
    max_bad_fraction: float
    filters: dict[str, str] = Field(default_factory=dict)
    treatment: dict[str, str] = Field(default_factory=dict)
    config_digest: str
    shards: tuple[PlannedPath, ...]
    request: Request | None = None
    retries: tuple[RetryRound, ...] = ()

    @property
    def all_shards(self) -> tuple[PlannedPath, ...]:
        """The planned shards, then those of retries."""
        return self.shards + tuple(shard for each in self.retries for shard in each.shards)

    @property
    def retried_keys(self) -> frozenset[str]:
        """Keys of the planned shards that now belong to the shard of a retry."""
        return frozenset(key for each in self.retries for key in each.keys)


def plan_file(plan: ShardPlan) -> PlanFile:
    """The summary of a plan that is kept beside the shards."""
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
        treatment=options.treatment.as_text(),
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
            shard_size=options.shard_size,
        ),
    )


def original_options(
    root: Path, plan: PlanFile, source: Path | None, media_root: Path | None
) -> tuple[ShardingOptions, ReaderOptions]:
    """The options that a dataset was made with; `source` and `media_root` where the corpus moved.

    Raises `DataError` for a plan file of an earlier version, which does not hold them.
    """
    if plan.request is None:
        raise DataError(
            f"{root / PLAN_NAME} is of an earlier version and does not say where the corpus lies; run "
            "the command that made the dataset again, which also makes mended shards again"
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
        shard_size=request.shard_size,
        max_bad_fraction=plan.max_bad_fraction,
        license=plan.license,
        filters=Filters.from_text(plan.filters),
        treatment=Treatment.from_text(plan.treatment),
    )
    return options, ReaderOptions.from_text(plan.reader_options, media_root)


def load_plan_file(root: Path) -> PlanFile | None:
    """The plan file of a dataset folder, None when there is none."""
    path = root / PLAN_NAME
    try:
        return PlanFile(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, ValidationError) as error:
        raise DataError(f"{path} is damaged; delete {root} and run again") from error


def store_plan_file(root: Path, plan: PlanFile) -> PlanFile:
    """Write the plan file, keeping earlier retries, and give what was written.

    Raises `DataError` when the folder holds another plan's shards.
    """
    existing = load_plan_file(root)
    if existing is None and (root / MANIFEST_NAME).exists():
        raise DataError(f"{root} already holds a dataset; choose another --out or add --overwrite")
    if existing is not None and existing.config_digest != plan.config_digest:
        raise DataError(
            f"{root} holds shards of {existing.name!r} made from another source state or with "
            "other options; choose another --out or add --overwrite (`retry-bad` adds samples that "
            "were mended since)"
        )
    if existing is not None:
        plan = plan.model_copy(update={"retries": existing.retries})
    write_plan_file(root, plan)
    return plan


def write_plan_file(root: Path, plan: PlanFile) -> None:
    """Write the plan file as it is, atomically."""
    # Earlier versions refuse keys that they do not know; what is not used stays readable to them.
    unused = {name for name in ("filters", "treatment", "retries") if not getattr(plan, name)}
    content = plan.model_dump(mode="json", exclude=unused)
    text = json.dumps(content, indent=1, sort_keys=True) + "\n"
    write_atomic(root / PLAN_NAME, text.encode())


def complete_plan(root: Path) -> PlanFile:
    """The plan file of a dataset whose shards are all finished; raises `DataError` otherwise."""
    plan = load_plan_file(root)
    if plan is None:
        raise DataError(f"{root} holds no {PLAN_NAME}; run its `python -m data_prep` command first")
    missing = missing_shards(root, plan)
    if missing:
        raise DataError(
            f"{len(missing)} of {len(plan.all_shards)} shards of {root} are not finished, the first is "
            f"{missing[0]}; run the command that makes the dataset (its array tasks) again"
        )
    return plan


def missing_shards(root: Path, plan: PlanFile) -> list[str]:
    """Paths of planned shards that have no record of this plan yet."""
    shards = plan.all_shards
    return [shard.path for shard in shards if not has_record(root, plan, shard.path)]


def has_record(root: Path, plan: PlanFile, path: str) -> bool:
    """Whether a shard was finished from this plan."""
    record = load_record(root / path)
    return record is not None and record.config_digest == plan.config_digest
