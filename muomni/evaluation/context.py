"""Load an exported stage and its held-out samples.

All checks happen here: a missing export or split, a mismatched tokenizer, samples whose groups were
trained on.
"""

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from muomni.checkpoint.export import Export, find_exports, read_export
from muomni.config.loading import RESOLVED
from muomni.config.registry import load, stage_spec
from muomni.config.run import DataSection
from muomni.data.shards.datasets import open_datasets
from muomni.data.shards.manifest import Manifest, Task
from muomni.data.shards.source import Source
from muomni.data.text.tokenizer import Tokenizer
from muomni.distributed import collectives
from muomni.errors import DataError, UpstreamError
from muomni.evaluation.request import EvaluationRequest
from muomni.io.count_progress import counted
from muomni.io.paths import portable
from muomni.run_folder import RunFolder
from muomni.training.stage import Stage, StageContext
from muomni.training.validation import LocatedBatch, SplitBatches, first_samples

logger = logging.getLogger(__name__)
T = TypeVar("T")

TRAIN = "train"
# Baselines are fitted on at most this many training samples.
MAX_BASELINE_SAMPLES = 50_000


@dataclass(slots=True)
class EvaluationContext:
    """A stage in eval mode with its exported weights, and the data to evaluate it on.

    Baselines are fitted on `train`: the training split of the run's data or, if that is gone, of the
    evaluated data, or None. `measured_on` has the digests of the exports that determine the metrics, by
    folder (relative to the run, if inside of it). `num_seen` samples of the split are in groups that were
    trained on, as `--overlap allow` accepts. An evaluation sets `num_bad`, this rank's undecodable samples,
    and `answers`, this rank's generated answers (stage sft only).
    """

    request: EvaluationRequest
    stage: Stage
    task: nn.Module
    export: Export
    device: torch.device
    data: DataSection
    source: Source
    train: Source | None
    upstream_run: Path
    measured_on: dict[str, str]
    num_seen: int = 0
    num_bad: int = 0
    answers: list[dict[str, Any]] = field(default_factory=list)

    @property
    def model(self) -> Any:
        """The exported model."""
        return self.stage.model(self.task)

    def measure_with(self, export: Export) -> None:
        """Record that metrics depend on an export."""
        self.measured_on[portable(export.path, self.request.run)] = export.digest

    @property
    def num_samples(self) -> int:
        """Number of evaluated samples, over all ranks."""
        return min(len(self.source), self.request.max_samples or len(self.source))

    def batches(self) -> Iterator[LocatedBatch]:
        """This rank's shard of the evaluated samples; sets `num_bad` at the end."""
        ids = first_samples(self.source, self.request.max_samples)
        batches = SplitBatches(self.stage, self.source, self.device, ids)
        yield from self.counted(batches, batches.num_batches, f"{self.source.split} batches")
        self.num_bad = batches.num_bad

    def train_batches(self, max_samples: int = MAX_BASELINE_SAMPLES) -> Iterable[LocatedBatch]:
        """This rank's shard of the first training samples, without augmentation."""
        if self.train is None:
            return ()
        ids = first_samples(self.train, max_samples)
        batches = SplitBatches(self.stage, self.train, self.device, ids)
        return self.counted(batches, batches.num_batches, "train batches for baselines")

    def train_samples(self) -> Iterator[dict[str, Any]]:
        """This rank's shard of the training samples, undecoded."""
        if self.train is not None:
            indices = shard_indices(min(len(self.train), MAX_BASELINE_SAMPLES))
            for index in self.counted(indices, len(indices), "train samples for baselines"):
                yield self.train.read(index)

    def counted(self, items: Iterable[T], total: int, what: str) -> Iterator[T]:
        """The items, with progress on rank 0 unless output is quiet."""
        is_shown = collectives.rank() == 0 and not self.request.quiet
        return counted(items, total, f"{self.stage.name} {what}", "done", is_shown)


def shard_indices(num_samples: int) -> range:
    """The indices of this rank's shard of `num_samples`; the shards are disjoint."""
    return range(collectives.rank(), num_samples, collectives.world_size())


def open_context(request: EvaluationRequest, device: torch.device) -> EvaluationContext:
    """Build a stage, load its export strictly, and open the split; no collective is used.

    Raises:
        MuomniError: the export, config, data, or an upstream export is missing or does not match.
    """
    spec = stage_spec(request.stage)
    folder = RunFolder(request.run, request.stage)
    export = read_export(folder.export, request.stage)
    config = export.run_config
    data = config.data.model_copy(update={"root": request.data or config.data.root})
    source, train, num_seen = _sources(request.split, spec.tasks, config.data, data)
    recorded = export.content.get(RESOLVED, {}).get("upstream")
    upstream_run = _upstream_run(request, spec.upstream, recorded)
    stage_type: type[Stage] = load(spec.stage)
    upstream = _upstream_exports(export, upstream_run, spec.upstream, stage_type.exports_upstream)
    tokenizer = Tokenizer.load(export.tokenizer_file)
    stage = stage_type(config, StageContext(tokenizer, upstream, device))
    torch.manual_seed(config.seed)
    task = stage.build()
    stage.load_export(task, export)
    task.to(device).eval()
    context = EvaluationContext(
        request, stage, task, export, device, data, source, train, upstream_run, {}, num_seen
    )
    for each in (export, *(() if stage.exports_upstream else upstream.values())):
        context.measure_with(each)
    return context


def _sources(
    split: str, tasks: tuple[Task, ...], trained: DataSection, data: DataSection
) -> tuple[Source, Source | None, int]:
    """Open the split to evaluate and the training split, and count the samples in groups of both.

    Raises DataError if they overlap and sharding did not accept it.
    """
    source = _open_split(open_datasets(data, tasks), split, data.root)
    train = _train_source(tasks, (trained, data))
    num_seen = check_unseen(source, train) if split != TRAIN and train is not None else 0
    return source, train, num_seen


def _open_split(datasets: list[Manifest], split: str, root: str) -> Source:
    available = sorted({name for dataset in datasets for name in dataset.splits})
    if split not in available:
        raise DataError(
            f"no {datasets[0].task} dataset in {root} has a split '{split}'; set --split to one of "
            f"{', '.join(available)}"
        )
    return Source(datasets, split)


def _train_source(tasks: tuple[Task, ...], candidates: tuple[DataSection, ...]) -> Source | None:
    """The training split of the first candidate that has datasets of all tasks."""
    for data in candidates:
        try:
            datasets = open_datasets(data, tasks)
        except DataError as error:
            logger.warning("no training data for baselines at %s (%s)", data.root, error)
            continue
        if any(TRAIN in dataset.splits for dataset in datasets):
            return Source(datasets, TRAIN)
    return None


def check_unseen(source: Source, train: Source) -> int:
    """The number of samples of `source` that share a group with training samples of their dataset.

    A group must not be split (an image, a speaker, a document): raises DataError unless this dataset was
    sharded with `--overlap allow`. Duplicate contents in different groups only log a warning, since they occur
    in any corpus.
    """
    num_seen = 0
    trained = {reader.manifest.name: reader for reader in train.readers}
    for reader in source.readers:
        other = trained.get(reader.manifest.name)
        if other is None:
            continue
        is_seen = np.isin(reader.columns["group_hash"], other.columns["group_hash"])
        if not is_seen.any():
            continue
        is_accepted = (
            reader.manifest.fingerprint == other.manifest.fingerprint
            and is_seen.sum() <= reader.manifest.overlap.get(reader.split, 0)
        )
        if not is_accepted:
            raise DataError(
                f"{int(is_seen.sum())} of {len(is_seen)} samples in split '{reader.split}' of "
                f"{reader.manifest.location} belong to groups that were trained on "
                f"({other.manifest.location}/{TRAIN}); evaluate on the data that the run was trained on, "
                f"or pass --split {TRAIN} to evaluate training samples"
            )
        num_seen += int(is_seen.sum())
        logger.warning(
            "%d of %d samples in split '%s' of %s belong to groups that were trained on, as --overlap allow "
            "accepted: the metrics are no measure of unseen groups",
            int(is_seen.sum()), len(is_seen), reader.split, reader.manifest.location,
        )  # fmt: skip
    num_repeated = int(np.isin(source.columns["content_hash"], train.columns["content_hash"]).sum())
    if num_repeated:
        logger.warning(
            "%d of %d samples in split '%s' duplicate the content of a training sample",
            num_repeated, len(source), source.split,
        )  # fmt: skip
    return num_seen


def _upstream_run(
    request: EvaluationRequest, stages: tuple[str, ...], recorded: str | None
) -> Path:
    """The run with the upstream exports: the requested one, the same run, or the recorded one."""
    if request.upstream is not None:
        return request.upstream
    has_all = all(RunFolder(request.run, stage).export.is_dir() for stage in stages)
    # Recorded relative to the run folder, or absolute.
    return request.run if has_all or recorded is None else request.run / recorded


def _upstream_exports(
    export: Export, run: Path, stages: tuple[str, ...], is_complete: bool = False
) -> dict[str, Export]:
    """Open the upstream exports; raises UpstreamError if a tokenizer differs.

    Unless the export `is_complete`, they must be those that it was trained with.
    """
    upstream = find_exports(run, stages)
    trained_with = {} if is_complete else export.content.get("upstream", {})
    for name, other in upstream.items():
        if trained_with.get(name, other.digest) != other.digest:
            raise UpstreamError(
                f"export {other.path} is not the one that export {export.path} was trained with; retrain "
                f"stage {export.stage}, or set --upstream to a run with that export"
            )
        if other.tokenizer_digest != export.tokenizer_digest:
            raise UpstreamError(
                f"export {export.path} and export {other.path} have different tokenizers; retrain stage "
                f"{export.stage}, or set --upstream to the run that it was trained from"
            )
    return upstream
