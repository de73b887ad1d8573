"""Saves the results of a run: checkpoints during training, the export at its end."""

from pathlib import Path
from typing import Any

from torch import nn

from muomni.checkpoint import file_list, store
from muomni.checkpoint.export import write_export
from muomni.checkpoint.store import Topology, TrainState
from muomni.config.loading import RESOLVED
from muomni.config.registry import stage_spec
from muomni.distributed import collectives
from muomni.errors import NonFiniteError
from muomni.run_folder import RunFolder
from muomni.training.engine.engine import Engine
from muomni.training.stage import Stage


class Checkpoints:
    """Saves, marks, and prunes the checkpoints of a run that starts at `step`."""

    def __init__(
        self, engine: Engine, root: Path, topology: Topology, keep_last: int, step: int
    ) -> None:
        self._engine = engine
        self._root = root
        self._topology = topology
        self._keep_last = keep_last
        self._saved_step = step

    def save(
        self,
        state: TrainState,
        prune: bool = True,
        reason: str = "",
    ) -> Path:
        """Save `state` unless this run has saved it or started from it; every rank must call it.

        A folder of the same name alone may be damaged, or left by an earlier start. Raises NonFiniteError
        if weights are non-finite, since the next start would resume from them and prune good checkpoints;
        the message starts with `reason`.
        """
        folder = file_list.step_folder(self._root, state.step)
        is_saved = self._saved_step == state.step
        if is_saved and collectives.broadcast_object(folder.is_dir()):
            return folder
        weight = self._engine.first_non_finite_weight()
        if weight is not None:
            reason = reason or f"cannot save step {state.step}"
            raise NonFiniteError(
                f"{reason}; {weight} is non-finite (an update was too large, "
                f"or a device erred), so the weights are not saved, and {self._last_checkpoint()}; lower "
                f"optim.lr, or try other devices"
            )
        average = self._engine.masters.average
        store.save(
            self._engine.deepspeed,
            self._root,
            state,
            self._topology,
            self._engine.shapes_digest(),
            None if average is None else average.tensors,
        )
        self._saved_step = state.step
        if prune:
            self._prune(state.step)
        return folder

    def mark_best(self, step: int) -> None:
        """Mark the saved checkpoint of `step` as the best."""
        if collectives.rank() == 0:
            store.mark_best(self._root, step)
            self._prune(step)

    def _prune(self, step: int) -> None:
        store.prune(self._root, step, self._keep_last)

    def _last_checkpoint(self) -> str:
        newest = collectives.broadcast_object(file_list.newest_complete(self._root))
        return f"the last checkpoint is {newest}" if newest else "there is no checkpoint yet"


def export_stage(
    stage: Stage,
    engine: Engine,
    folder: RunFolder,
    step: int,
    fingerprint: str,
    metrics: dict[str, float],
    resolved: dict[str, Any],
) -> None:
    """Write the export of a trained stage; every rank must call it.

    `fingerprint` identifies the training data, `resolved` are facts about the run to record.
    """
    with engine.masters.averaged():
        state = engine.full_state(model_prefix(stage, engine.task))
    if collectives.rank() != 0:
        return
    config = stage.config
    about = {
        "preset": config.preset,
        "step": step,
        "ema_decay": config.training.ema_decay,  # null: raw weights
        "config": config.model_dump(mode="json"),
        "data": {"tasks": stage_spec(stage.name).tasks, "fingerprint": fingerprint},
        "upstream": {name: export.digest for name, export in stage.context.upstream.items()},
        RESOLVED: resolved,
    }
    write_export(
        folder.export,
        stage.name,
        {**state, **stage.frozen_state()},
        stage.model_config(),
        stage.tokenizer,
        metrics,
        about,
    )


def model_prefix(stage: Stage, task: nn.Module) -> str:
    """Prefix of the exported model in the parameter names of the task module."""
    model = stage.model(task)
    for name, module in task.named_modules():
        if module is model:
            return f"{name}." if name else ""
    raise AssertionError(f"stage {stage.name}: the model is not part of its task module")
