"""Checkpoints that are complete or absent.

A checkpoint is written to a hidden folder, `complete.json` lists the size and hash of each file, all of it is
synced to the disk, and a rename publishes it. Then the small files `latest` and `best` are replaced atomically;
DeepSpeed's own `latest` is never written. A kill or a power failure at any moment leaves earlier checkpoints
intact.

DeepSpeed's files are pickles. They are read with torch's restricted unpickler, so a checkpoint from elsewhere
cannot run code.
"""

import json
import logging
import os
import pickle
import random
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from muomni.checkpoint.file_list import (
    FILE_LIST,
    SCHEMA_VERSION,
    candidates,
    check_hashes,
    describe_files,
    marked,
    none_complete,
    step_folder,
    verify,
)
from muomni.distributed import collectives
from muomni.errors import CheckpointError, StorageError
from muomni.io.atomic_write import sync_folder, write_atomic

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

logger = logging.getLogger(__name__)

_TAG = "engine"


@dataclass(frozen=True, slots=True)
class Topology:
    """The layout that a checkpoint belongs to: only the same one resumes bit for bit."""

    world_size: int
    zero_stage: int
    precision: str
    num_expert_ranks: int = 0  # ranks that share one set of experts; 0: plain layers
    optimizer: str = "adamw"
    parameter_groups: str = ""  # digest of the parameter names in each optimizer group


@dataclass(frozen=True, slots=True)
class TrainState:
    """State of the loop besides weights and optimizer.

    `step` counts finished optimizer steps; with the plan's digest it is the entire data cursor. `best_of`
    identifies the samples on which `best` was measured. `mix` are the fields of the `MixSegment`s so far.
    """

    step: int
    plan_digest: str
    best: float | None
    units_seen: float
    best_of: str = ""
    mix: Sequence[dict[str, Any]] = ()

    @classmethod
    def of(cls, content: dict[str, Any]) -> "TrainState":
        """The state in the file list of a checkpoint, without fields of earlier versions."""
        known = {field.name for field in fields(cls)}
        return cls(**{key: value for key, value in content["state"].items() if key in known})


def save(
    engine: "DeepSpeedEngine",
    root: Path,
    state: TrainState,
    topology: Topology,
    shapes: str,
    average: list[torch.Tensor] | None = None,
) -> Path:
    """Save and publish a checkpoint; every rank must call it. Returns its folder.

    `shapes` is the digest of parameter shapes, `average` this rank's shard of the averaged weights.
    """
    final = step_folder(root, state.step)
    staging = root / f".{final.name}.tmp"
    is_main = collectives.rank() == 0
    try:
        with collectives.writing(f"checkpoint {final}"):
            if is_main:
                shutil.rmtree(staging, ignore_errors=True)
                staging.mkdir(parents=True)
        described: dict[str, dict[str, Any]] = {}
        with collectives.writing(f"checkpoint {final}"):
            written = _save_engine(engine, staging, final)
            written.append(staging / f"rng_rank_{collectives.rank():05d}.pt")
            _save(_rng_state(), written[-1])
            if average is not None and (_is_sharded(topology) or is_main):
                written.append(_average_file(staging, topology))
                _save(average, written[-1])
            described = describe_files(staging, written)
        # A single rank would read a large checkpoint longer than the others may wait.
        files = {
            name: about
            for each in collectives.gather_objects(described)
            for name, about in each.items()
        }
        with collectives.writing(f"checkpoint {final}"):
            if is_main:
                others = [path for path in staging.rglob("*") if path.is_file()]
                others = [path for path in others if str(path.relative_to(staging)) not in files]
                files |= describe_files(staging, others)
                content = {
                    "schema_version": SCHEMA_VERSION,
                    "state": asdict(state),
                    "topology": asdict(topology),
                    "shapes": shapes,
                    "files": dict(sorted(files.items())),
                }
                write_atomic(staging / FILE_LIST, json.dumps(content, indent=1).encode())
                for each in (*filter(Path.is_dir, staging.rglob("*")), staging):
                    sync_folder(each)
                _publish(staging, final)
                write_atomic(root / "latest", f"{final.name}\n".encode())
    except StorageError:
        if is_main:  # the next attempt needs the space
            shutil.rmtree(staging, ignore_errors=True)
        raise
    return final


def _publish(staging: Path, final: Path) -> None:
    """Rename a complete folder; one of the same step, before a resume from an earlier one, stays until then."""
    replaced = final.with_name(f".{final.name}.replaced")
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
    staging.rename(final)
    sync_folder(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _save(content: Any, path: str | Path) -> None:
    """`torch.save`, synced to the disk, with an OSError if that is full."""
    try:
        with open(path, "wb") as file:  # given a path, torch hides what failed
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
    except RuntimeError as error:  # raised when torch closes the archive after a failed write
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def _save_engine(engine: "DeepSpeedEngine", folder: Path, final: Path) -> list[Path]:
    """Save the engine's state, and return the files that this rank wrote; raises OSError.

    An error of writing tensors is raised at the end. Otherwise a rank would leave the collectives of
    `save_checkpoint` while its peers wait in them. If another file of DeepSpeed fails, only this rank raises
    StorageError, since its peers do wait.
    """
    written: list[Path] = []
    failures: list[OSError] = []

    def save(state_dict: Any, path: str) -> None:
        try:
            _save(state_dict, path)
        except OSError as error:
            failures.append(error)
        written.append(Path(path))

    writer: Any = engine.checkpoint_engine
    writer.save = save
    try:
        engine.save_checkpoint(str(folder), tag=_TAG, save_latest=False)
    except OSError as error:
        failed = StorageError(collectives.write_error(f"checkpoint {final}", str(error.strerror)))
        failed.is_rank_local = True
        raise failed from None
    finally:
        del writer.save
    if failures:
        raise failures[0]
    return written


def mark_best(root: Path, step: int) -> None:
    """Mark the checkpoint of `step` as the best."""
    write_atomic(root / "best", f"{step_folder(root, step).name}\n".encode())


def load(engine: "DeepSpeedEngine", folder: Path, topology: Topology, shapes: str) -> TrainState:
    """Load a checkpoint into the DeepSpeed engine; every rank must call it.

    Raises CheckpointError for a damaged checkpoint, or a different topology, parameter grouping, or
    digest of parameter `shapes`.
    """
    content = verify(folder, with_hashes=False)
    check_hashes(folder, content["files"])
    return _load_verified(engine, folder, content, topology, shapes)


def load_newest(
    engine: "DeepSpeedEngine", root: Path, topology: Topology, shapes: str
) -> tuple[Path, TrainState] | None:
    """Load the newest checkpoint of a run that is undamaged; None if it has none. Every rank must call it.

    A damaged one is named in a warning. Raises CheckpointError if all are damaged, rather than starting over,
    and otherwise as `load` does.
    """
    folders = collectives.broadcast_object(candidates(root))
    for folder in folders:
        try:
            content = verify(folder, with_hashes=False)
            check_hashes(folder, content["files"])
        except CheckpointError as error:
            logger.warning("%s; trying an older one", error)
            continue
        return folder, _load_verified(engine, folder, content, topology, shapes)
    if folders:
        raise none_complete(root)
    return None


def _load_verified(
    engine: "DeepSpeedEngine",
    folder: Path,
    content: dict[str, Any],
    topology: Topology,
    shapes: str,
) -> TrainState:
    groups = topology.parameter_groups  # earlier versions did not save theirs
    saved = Topology(**{"parameter_groups": groups, **content["topology"]})
    if replace(saved, parameter_groups=groups) != topology:
        raise CheckpointError(
            f"checkpoint {folder} was written with {_describe(saved)}, this run has "
            f"{_describe(topology)}; use the same settings, or start over with --resume never"
        )
    if content.get("shapes", shapes) != shapes:
        raise CheckpointError(
            f"checkpoint {folder} holds a model of other sizes; use the preset and the model.* values "
            f"of its run, or start over with --resume never"
        )
    if saved.parameter_groups != groups:
        raise CheckpointError(
            f"checkpoint {folder} trains or groups other parameters than this run; use the optim.lr_scales "
            f"and options.freeze of its run, or start over with --resume never"
        )
    reader: Any = engine.checkpoint_engine
    reader.load = _read
    try:
        engine.load_checkpoint(str(folder), tag=_TAG)
    finally:
        del reader.load
    _set_rng_state(_read(folder / f"rng_rank_{collectives.rank():05d}.pt"))
    return TrainState.of(content)


def _read(path: str | Path, map_location: Any = None) -> Any:
    """Read a file of a checkpoint; its pickle may create only tensors, numbers, and DeepSpeed's settings.

    Raises CheckpointError for any other type.
    """
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    numpy_array = (np.ndarray, np.dtype, type(np.dtype(np.uint32)), np.empty(0).__reduce__()[0])
    known = [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address, *numpy_array]
    try:
        with torch.serialization.safe_globals(known):
            return torch.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        raise CheckpointError(
            f"{path} was not loaded: it holds objects that could run code"
            f"{f' ({found[1]})' if found else ''}; resume another checkpoint"
        ) from None


def load_average(
    folder: Path, topology: Topology, device: torch.device
) -> list[torch.Tensor] | None:
    """This rank's shard of the averaged weights in a verified checkpoint; None if there are none."""
    path = _average_file(folder, topology)
    return _read(path, map_location=device) if path.is_file() else None


def _is_sharded(topology: Topology) -> bool:
    """Whether ranks hold different weights."""
    return bool(topology.zero_stage or topology.num_expert_ranks)


def _average_file(folder: Path, topology: Topology) -> Path:
    rank = collectives.rank() if _is_sharded(topology) else 0
    return folder / f"average_rank_{rank:05d}.pt"


def prune(root: Path, step: int, keep_last: int) -> None:
    """Delete all checkpoints except the newest `keep_last` up to `step` and the best of those up to `step`.

    Checkpoints after `step` are damaged, or older than a resume from before them; a later start would
    resume from them. Only rank 0 deletes.
    """
    if collectives.rank() != 0:
        return
    best = marked(root, "best")
    folders = candidates(root)
    current = [folder for folder in folders if folder.name <= step_folder(root, step).name]
    kept = {*current[:keep_last], *(folder for folder in current if folder == best)}
    for folder in folders:
        if folder not in kept:
            shutil.rmtree(folder)


def _describe(topology: Topology) -> str:
    experts = topology.num_expert_ranks
    shared = f", experts over {experts} ranks" if experts else ""
    return (
        f"{topology.world_size} ranks, ZeRO {topology.zero_stage}, {topology.precision}{shared}, "
        f"optimizer {topology.optimizer}"
    )


def _rng_state() -> dict[str, Any]:
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_rng_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
