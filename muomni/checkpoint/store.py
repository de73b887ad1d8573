"""Checkpoints that are complete or absent.

A checkpoint is written to a hidden folder, `complete.json` lists the size and hash of each file, and a rename
publishes it. Then the small files `latest` and `best` are replaced atomically; DeepSpeed's own `latest` is
never written. A kill at any moment leaves earlier checkpoints intact.

DeepSpeed's files are pickles, so they are loaded only from the run's own folder.
"""

import itertools
import json
import logging
import random
import shutil
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from muomni.distributed import collectives
from muomni.errors import CheckpointError, StorageError
from muomni.io.atomic_write import write_atomic
from muomni.io.hashing import sha256_file

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1
_LIST, _TAG = "complete.json", "engine"


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
    identifies the samples on which `best` was measured.
    """

    step: int
    plan_digest: str
    best: float | None
    units_seen: float
    best_of: str = ""

    @classmethod
    def of(cls, content: dict[str, Any]) -> "TrainState":
        """The state in the file list of a checkpoint, without fields of earlier versions."""
        known = {field.name for field in fields(cls)}
        return cls(**{key: value for key, value in content["state"].items() if key in known})


def step_folder(root: Path, step: int) -> Path:
    return root / f"step_{step:08d}"


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
            described = _describe_files(staging, written)
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
                files |= _describe_files(staging, others)
                content = {
                    "schema_version": SCHEMA_VERSION,
                    "state": asdict(state),
                    "topology": asdict(topology),
                    "shapes": shapes,
                    "files": dict(sorted(files.items())),
                }
                (staging / _LIST).write_text(json.dumps(content, indent=1), encoding="utf-8")
                if final.exists():  # same step, after a resume from an earlier one
                    shutil.rmtree(final)
                staging.rename(final)
                write_atomic(root / "latest", f"{final.name}\n".encode())
    except StorageError:
        if is_main:  # the next attempt needs the space
            shutil.rmtree(staging, ignore_errors=True)
        raise
    return final


def _save(content: Any, path: str | Path) -> None:
    """`torch.save`, with an OSError if the disk is full."""
    try:
        with open(path, "wb") as file:  # given a path, torch hides what failed
            torch.save(content, file)
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


def marked(root: Path, name: str) -> Path | None:
    """The checkpoint that the mark `latest` or `best` names, if mark and checkpoint exist."""
    mark = root / name
    if not mark.is_file():
        return None
    folder = root / mark.read_text(encoding="utf-8").strip()
    return folder if folder.is_dir() else None


def newest_complete(root: Path) -> Path | None:
    """The newest checkpoint whose files all exist with the right sizes; marks are not trusted."""
    for folder in sorted(root.glob("step_*"), reverse=True):
        try:
            verify(folder, with_hashes=False)
        except CheckpointError as error:
            logger.warning("%s; trying an older one", error)
            continue
        return folder
    return None


def verify(folder: Path, with_hashes: bool = True) -> dict[str, Any]:
    """Check a checkpoint against its file list; raises CheckpointError that names the fault."""
    try:
        content = json.loads((folder / _LIST).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(f"checkpoint {folder} is incomplete ({error})") from None
    if content.get("schema_version") != SCHEMA_VERSION:
        raise CheckpointError(
            f"checkpoint {folder} has schema version {content.get('schema_version')}, "
            f"this version of muomni reads {SCHEMA_VERSION}"
        )
    for name, expected in content["files"].items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != expected["bytes"]:
            raise CheckpointError(f"checkpoint {folder} is damaged: {name} is missing or truncated")
        if with_hashes and sha256_file(path) != expected["sha256"]:
            raise CheckpointError(f"checkpoint {folder} is damaged: the hash of {name} differs")
    return content


def load(engine: "DeepSpeedEngine", folder: Path, topology: Topology, shapes: str) -> TrainState:
    """Load a checkpoint into the DeepSpeed engine; every rank must call it.

    Raises CheckpointError for a damaged checkpoint, or a different topology, parameter grouping, or
    digest of parameter `shapes`.
    """
    content = verify(folder, with_hashes=False)
    _check_hashes(folder, content["files"])
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
    engine.load_checkpoint(str(folder), tag=_TAG)
    _set_rng_state(torch.load(folder / f"rng_rank_{collectives.rank():05d}.pt", weights_only=False))
    return TrainState.of(content)


def load_average(
    folder: Path, topology: Topology, device: torch.device
) -> list[torch.Tensor] | None:
    """This rank's shard of the averaged weights in a verified checkpoint; None if there are none."""
    path = _average_file(folder, topology)
    return torch.load(path, map_location=device) if path.is_file() else None


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
    folders = sorted(root.glob("step_*"))
    current = [folder for folder in folders if folder.name <= step_folder(root, step).name]
    kept = {*current[-keep_last:], *(folder for folder in current if folder == best)}
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


def _describe_files(folder: Path, paths: list[Path]) -> dict[str, dict[str, Any]]:
    """Size and hash of each file, by its name relative to `folder`."""
    return {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        for path in paths
    }


def _check_hashes(folder: Path, files: dict[str, dict[str, Any]]) -> None:
    """Raise CheckpointError on all ranks if a hash differs; each rank reads an equal share of the files."""
    by_size = sorted(files, key=lambda name: (-files[name]["bytes"], name))
    own = by_size[collectives.rank() :: collectives.world_size()]
    damaged = [name for name in own if sha256_file(folder / name) != files[name]["sha256"]]
    by_rank = collectives.gather_objects(damaged)
    for name in itertools.chain.from_iterable(by_rank):
        raise CheckpointError(f"checkpoint {folder} is damaged: the hash of {name} differs")


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
