"""What is evaluated: a stage with its exported weights, and the samples that it has not seen.

Everything that can be refused is refused here: a missing export or split, a tokenizer that does not
match, samples of groups that were trained on.
"""

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from muomni.checkpoint.export import Export, find_exports, read_export
from muomni.config.loading import read_yaml, validate
from muomni.config.run import DataSection, RunConfig
from muomni.data.shards.datasets import open_datasets
from muomni.data.shards.manifest import Manifest, Task
from muomni.data.shards.source import Source
from muomni.data.text.tokenizer import Tokenizer
from muomni.distributed import collectives
from muomni.errors import DataError, UpstreamError
from muomni.run_folder import RunFolder
from muomni.training.stage import Stage, StageContext
from muomni.training.stages import load_stage
from muomni.training.validation import LocatedBatch, SplitBatches

logger = logging.getLogger(__name__)

TRAIN = "train"
# Trivial baselines are fitted on at most so many training samples.
MAX_BASELINE_SAMPLES = 50_000


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the command line asks for; `data` and `upstream` default to what the run used."""

    stage: str
    run: Path
    data: str | None = None
    upstream: Path | None = None
    split: str = "test"
    max_samples: int | None = None


@dataclass(slots=True)
class Subject:
    """A stage in evaluation mode with the weights of its export, and its data.

    `data` names the evaluated datasets. `train` is what trivial baselines are fitted on: the training
    split of the run, or of the given data where that is gone, or None. `answers` are what this rank's
    share of an evaluation let the model say, one record each; most stages say nothing.
    """

    wanted: Wanted
    stage: Stage
    task: nn.Module
    export: Export
    device: torch.device
    data: DataSection
    source: Source
    train: Source | None
    upstream_run: Path
    num_bad: int = 0
    answers: list[dict[str, Any]] = field(default_factory=list)

    @property
    def model(self) -> Any:
        """The exported model itself."""
        return self.stage.model(self.task)

    @property
    def num_samples(self) -> int:
        """Samples that are evaluated, over all ranks."""
        return min(len(self.source), self.wanted.max_samples or len(self.source))

    def batches(self) -> Iterator[LocatedBatch]:
        """This rank's share of the evaluated samples; `num_bad` is known after a pass."""
        batches = SplitBatches(
            self.stage, self.source, self.device, max_samples=self.wanted.max_samples
        )
        yield from batches
        self.num_bad = batches.num_bad

    def train_batches(self, max_samples: int = MAX_BASELINE_SAMPLES) -> Iterable[LocatedBatch]:
        """This rank's share of the first training samples, not augmented; none without any."""
        if self.train is None:
            return ()
        return SplitBatches(self.stage, self.train, self.device, max_samples=max_samples)

    def train_samples(self) -> Iterator[dict[str, Any]]:
        """The undecoded training samples of this rank's share; none without a training split."""
        if self.train is not None:
            for index in rank_share(min(len(self.train), MAX_BASELINE_SAMPLES)):
                yield self.train.read(index)


def rank_share(num_samples: int) -> range:
    """The indices below `num_samples` that this rank looks at; the ranks' shares are disjoint."""
    return range(collectives.rank(), num_samples, collectives.world_size())


def open_subject(wanted: Wanted, device: torch.device) -> Subject:
    """Build the stage of a run, load its export strictly, and open the split.

    Raises MuomniError for everything that does not fit. Every rank calls it on its own.
    """
    stage_type = load_stage(wanted.stage)
    folder = RunFolder(wanted.run, wanted.stage)
    export = read_export(folder.export, wanted.stage)
    content = read_yaml(folder.config_file)
    # The file also records where the run came from.
    settings = {key: value for key, value in content.items() if key in RunConfig.model_fields}
    config = validate(RunConfig, settings, str(folder.config_file))
    data = config.data.model_copy(update={"root": wanted.data or config.data.root})
    source, train = _sources(wanted.split, stage_type.tasks, config.data, data)
    upstream_run = _upstream_run(wanted, stage_type.upstream, content.get("upstream"))
    upstream = _upstream_exports(export, upstream_run, stage_type.upstream)
    tokenizer = Tokenizer.load(export.tokenizer_file)
    stage = stage_type(config, StageContext(tokenizer, upstream, device))
    torch.manual_seed(config.seed)
    task = stage.build()
    stage.load_export(task, export)
    task.to(device).eval()
    return Subject(wanted, stage, task, export, device, data, source, train, upstream_run)


def _sources(
    split: str, tasks: tuple[Task, ...], trained: DataSection, data: DataSection
) -> tuple[Source, Source | None]:
    """The split to evaluate and the training split; raises DataError when they overlap."""
    source = _open_split(open_datasets(data, tasks), split, data.root)
    train = _train_source(tasks, (trained, data))
    if split != TRAIN and train is not None:
        check_unseen(source, train)
    return source, train


def _open_split(datasets: list[Manifest], split: str, root: str) -> Source:
    available = sorted({name for dataset in datasets for name in dataset.splits})
    if split not in available:
        raise DataError(
            f"no {datasets[0].task} dataset in {root} has a split '{split}'; name one of "
            f"{', '.join(available)} with --split"
        )
    return Source(datasets, split)


def _train_source(tasks: tuple[Task, ...], places: tuple[DataSection, ...]) -> Source | None:
    """The training split below the first of `places` that has all tasks."""
    for data in places:
        try:
            datasets = open_datasets(data, tasks)
        except DataError as error:
            logger.warning("no training data to fit baselines on at %s (%s)", data.root, error)
            continue
        if any(TRAIN in dataset.splits for dataset in datasets):
            return Source(datasets, TRAIN)
    return None


def check_unseen(source: Source, train: Source) -> None:
    """Raise DataError when samples of `source` share a group with training samples of their dataset.

    A group is what must not be split (an image, a speaker, a document). Equal contents in
    different groups are only warned of: corpora repeat themselves.
    """
    trained = {reader.manifest.name: reader for reader in train.readers}
    for reader in source.readers:
        other = trained.get(reader.manifest.name)
        if other is None:
            continue
        is_seen = np.isin(reader.columns["group_hash"], other.columns["group_hash"])
        if is_seen.any():
            raise DataError(
                f"{int(is_seen.sum())} of {len(is_seen)} samples in split '{reader.split}' of "
                f"{reader.manifest.location} belong to groups that were trained on "
                f"({other.manifest.location}/{TRAIN}); evaluate on the data that the run was trained with, "
                f"or say --split {TRAIN} to see metrics of trained samples"
            )
    num_repeated = int(np.isin(source.columns["content_hash"], train.columns["content_hash"]).sum())
    if num_repeated:
        logger.warning(
            "%d of %d samples in split '%s' repeat the content of a training sample",
            num_repeated, len(source), source.split,
        )  # fmt: skip


def _upstream_run(wanted: Wanted, stages: tuple[str, ...], recorded: str | None) -> Path:
    """The run whose exports the stage was trained from: as given, the same run, or as recorded."""
    if wanted.upstream is not None:
        return wanted.upstream
    has_all = all(RunFolder(wanted.run, stage).export.is_dir() for stage in stages)
    return wanted.run if has_all or recorded is None else Path(recorded)


def _upstream_exports(export: Export, run: Path, stages: tuple[str, ...]) -> dict[str, Export]:
    """Open what the stage was trained from; raises UpstreamError for another tokenizer."""
    upstream = find_exports(run, stages)
    for other in upstream.values():
        if other.tokenizer_digest != export.tokenizer_digest:
            raise UpstreamError(
                f"export {export.path} and export {other.path} have different tokenizers; train stage "
                f"{export.stage} again, or name the run that it was trained from with --upstream"
            )
    return upstream
