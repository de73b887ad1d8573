"""When sample outputs of a stage are written: at validations and after training, on rank 0.

They are kept in RUN/STAGE/samples and sent to the run's recorders. `stage_samples.py` has what is written.
"""

import logging
import time
from collections.abc import Sequence
from typing import Any

import torch

from muomni.checkpoint.export import read_export
from muomni.config.registry import load, stage_spec
from muomni.data.shards.source import Source
from muomni.distributed import collectives
from muomni.inference.load import load_assistant
from muomni.inference.stage_samples import SampleWriter
from muomni.observe.recorder import Recorder, RunInfo, Status
from muomni.observe.sample_files import Artifact, SampleFiles
from muomni.run_folder import RunFolder
from muomni.training.checkpointing import model_prefix
from muomni.training.engine.engine import Engine
from muomni.training.loop import Loop
from muomni.training.stage import Stage

logger = logging.getLogger(__name__)

# The largest part of the time of validations that samples take with `training.sample_outputs=auto`.
_MAX_FRACTION = 0.1


@torch.no_grad()
def write_samples(
    stage: Stage, source: Source, folder: RunFolder, model: Any = None, name: str = ""
) -> list[Artifact]:
    """Write sample outputs for samples of `source`; none for stages without any.

    They are those of the stage's export or of a `model` in evaluation mode; the latter are in the subfolder
    `name`.
    """
    writer = stage_spec(stage.name).samples
    if writer is None:
        return []
    files = SampleFiles(folder.root, folder.samples / name)
    write: SampleWriter = load(writer)
    write(stage, _exported(stage, folder) if model is None else model, source, files)
    return files.written


def _exported(stage: Stage, folder: RunFolder) -> Any:
    """The model of the export in evaluation mode, loaded outside of any engine."""
    if stage.exports_upstream:  # spares loading the upstream exports, too
        return load_assistant(folder.export, stage.context.device).model
    task = stage.build().to(stage.context.device)
    stage.load_export(task, read_export(folder.export, stage.name))
    return stage.model(task.eval())


def sample_at_validations(loop: Loop) -> None:
    """Let a loop write sample outputs at validations, as `training.sample_outputs` says; for every rank."""
    setting = loop.config.training.sample_outputs
    is_split = loop.engine.zero_stage == 3 or bool(loop.engine.num_expert_ranks)
    if setting is False or (setting == "auto" and is_split) or loop.parts.val is None:
        return
    if stage_spec(loop.stage.name).samples is not None:
        loop.sampler = ValidationSamples(loop, loop.parts.val, is_split, setting == "auto")


class ValidationSamples:
    """Writes sample outputs of a model in training and adds them to the open recorders of its loop.

    Args:
        is_split: no rank has all weights, so rank 0 gathers them into another model.
        has_budget: skip validations, so that samples take a tenth of the time of validations at most.
    """

    def __init__(self, loop: Loop, source: Source, is_split: bool, has_budget: bool) -> None:
        self._loop, self._source = loop, source
        self._is_split, self._has_budget = is_split, has_budget
        self._has_failed = False
        self._used_s = self._validated_s = 0.0

    def __call__(self, engine: Engine, step: int, validation_s: float) -> None:
        """Write the samples of finished step `step`, whose validation took `validation_s`.

        Every rank must call it. A failure is one warning, and ends the samples.
        """
        self._validated_s += validation_s
        if not self._loop.is_main and not self._is_split:
            return
        is_due = not self._has_failed and not self._is_over_budget()
        if self._is_split:
            is_due = collectives.broadcast_object(is_due)
        if not is_due:
            return
        start_s = time.monotonic()
        state = None
        if self._is_split:
            state = engine.full_state(model_prefix(self._loop.stage, engine.task))
        if self._loop.is_main:
            self._write(state, step)
        self._used_s += time.monotonic() - start_s

    def _is_over_budget(self) -> bool:
        return self._has_budget and self._used_s > _MAX_FRACTION * self._validated_s

    def _write(self, state: dict[str, torch.Tensor] | None, step: int) -> None:
        loop, name = self._loop, f"step_{step:08d}"
        device = loop.parts.device
        try:
            # The random numbers of training do not depend on samples.
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                model = self._model(state)
                artifacts = write_samples(loop.stage, self._source, loop.parts.folder, model, name)
        except Exception as error:  # of a damaged sample, or memory: peers train on
            self._has_failed = True
            reason = str(error).partition("\n")[0]
            logger.warning("no sample outputs at validations any more: %s", reason)
            return
        _record(loop.recorders, artifacts)

    def _model(self, state: dict[str, torch.Tensor] | None) -> Any:
        """The model in training, or another one with the gathered weights `state`."""
        loop = self._loop
        if state is None:
            return loop.stage.model(loop.engine.task)
        model = loop.stage.model(loop.stage.build())
        model.load_state_dict(state)
        return model.to(loop.parts.device).eval()


def record_samples(
    stage: Stage,
    source: Source,
    folder: RunFolder,
    recorders: Sequence[Recorder],
    info: RunInfo,
) -> None:
    """Write sample outputs, and add them to the closed recorders of the finished run `info`.

    A device without memory for them is a warning: the run has ended, and its export is complete.
    """
    try:
        artifacts = write_samples(stage, source, folder)
    except torch.OutOfMemoryError as error:
        reason = str(error).partition("\n")[0]
        logger.warning("no sample outputs of %s: %s", stage.name, reason)
        return
    for recorder in recorders if artifacts else ():
        status: Status = "FAILED"
        recorder.open(info)
        try:
            _record([recorder], artifacts)
            status = "FINISHED"
        finally:
            recorder.close(status)


def _record(recorders: Sequence[Recorder], artifacts: Sequence[Artifact]) -> None:
    for recorder in recorders:
        for artifact in artifacts:
            recorder.artifact(artifact.path, artifact.folder)
