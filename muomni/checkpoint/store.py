"""Checkpoints that are complete or absent.

A checkpoint is written into a hidden folder, each file's size and hash are listed in `complete.json`,
and one rename gives it its name. `latest` and `best` are small files of ours, replaced atomically after
that rename; DeepSpeed's own `latest` is never written. A kill at any moment leaves the earlier ones.

DeepSpeed's files are pickles: they are loaded only from the run's own folder.
"""

import hashlib
import json
import logging
import random
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from muomni.distributed import collectives
from muomni.errors import CheckpointError
from muomni.io.atomic_write import write_atomic
from muomni.io.hashing import sha256_file

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1
_LIST, _TAG = "complete.json", "engine"


@dataclass(frozen=True, slots=True)
class Topology:
    """What a checkpoint is bound to: it resumes bit for bit only on the same."""

    world_size: int
    zero_stage: int
    precision: str
    num_expert_ranks: int = 0  # that share one set of experts; 0 = plain layers everywhere
    optimizer: str = "adamw"
    parameter_groups: str = ""  # digest of which parameters each group of the optimizer trains


@dataclass(frozen=True, slots=True)
class TrainState:
    """What the loop needs besides weights and optimizer. `step` counts finished optimizer steps;
    with the plan's digest it is the whole data cursor."""

    step: int
    plan_digest: str
    best: float | None
    mlflow_run_id: str | None
    units_seen: float


def step_folder(root: Path, step: int) -> Path:
    return root / f"step_{step:08d}"


def save(
    engine: Any,
    root: Path,
    state: TrainState,
    topology: Topology,
    average: list[torch.Tensor] | None = None,
) -> Path:
    """Save a checkpoint of all ranks and commit it; every rank must call it. Returns its folder.

    `engine` is the DeepSpeed engine, `average` this rank's share of the averaged weights.
    """
    final = step_folder(root, state.step)
    aside = root / f".{final.name}.tmp"
    if collectives.rank() == 0:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    collectives.barrier()
    engine.save_checkpoint(str(aside), tag=_TAG, save_latest=False)
    torch.save(_rng_state(), aside / f"rng_rank_{collectives.rank():05d}.pt")
    if average is not None and (_has_shares(topology) or collectives.rank() == 0):
        torch.save(average, _average_file(aside, topology))
    collectives.barrier()
    if collectives.rank() == 0:
        content = {
            "schema_version": SCHEMA_VERSION,
            "state": asdict(state),
            "topology": asdict(topology),
            "shapes": _shapes_digest(engine.module),
            "files": _list_files(aside),
        }
        (aside / _LIST).write_text(json.dumps(content, indent=1), encoding="utf-8")
        if final.exists():  # the same step again, after a resume from an earlier one
            shutil.rmtree(final)
        aside.rename(final)
        write_atomic(root / "latest", f"{final.name}\n".encode())
    collectives.barrier()
    return final


def mark_best(root: Path, step: int) -> None:
    """Name the checkpoint of `step` the best one."""
    write_atomic(root / "best", f"{step_folder(root, step).name}\n".encode())


def marked(root: Path, name: str) -> Path | None:
    """The checkpoint that `latest` or `best` names, if both exist."""
    mark = root / name
    if not mark.is_file():
        return None
    folder = root / mark.read_text(encoding="utf-8").strip()
    return folder if folder.is_dir() else None


def newest_complete(root: Path) -> Path | None:
    """The newest checkpoint whose files are all there with the right sizes, found by looking."""
    for folder in sorted(root.glob("step_*"), reverse=True):
        try:
            verify(folder, with_hashes=False)
        except CheckpointError as error:
            logger.warning("%s; looking for an older one", error)
            continue
        return folder
    return None


def verify(folder: Path, with_hashes: bool = True) -> dict[str, Any]:
    """Check a checkpoint against its file list; raises CheckpointError naming what is wrong."""
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
            raise CheckpointError(f"checkpoint {folder} is damaged: {name} is missing or cut short")
        if with_hashes and sha256_file(path) != expected["sha256"]:
            raise CheckpointError(f"checkpoint {folder} is damaged: {name} has another content")
    return content


def load(engine: Any, folder: Path, topology: Topology) -> TrainState:
    """Load a checkpoint into the DeepSpeed engine; every rank must call it.

    Raises CheckpointError when it is damaged, or was written on another topology, with other groups of
    trained parameters, or for a model of other sizes.
    """
    content = verify(folder)
    groups = topology.parameter_groups  # earlier versions do not tell theirs
    saved = Topology(**{"parameter_groups": groups, **content["topology"]})
    if replace(saved, parameter_groups=groups) != topology:
        raise CheckpointError(
            f"checkpoint {folder} was written with {_describe(saved)}, this run has "
            f"{_describe(topology)}; start it the same way, or start over with --resume never"
        )
    shapes = _shapes_digest(engine.module)
    if content.get("shapes", shapes) != shapes:
        raise CheckpointError(
            f"checkpoint {folder} holds a model of other sizes; give the preset and the model.* values "
            f"of its run, or start over with --resume never"
        )
    if saved.parameter_groups != groups:
        raise CheckpointError(
            f"checkpoint {folder} trains other parameters than this run, or divides them into other groups; "
            f"give the optim.lr_scales and options.freeze of its run, or start over with --resume never"
        )
    engine.load_checkpoint(str(folder), tag=_TAG)
    _set_rng_state(torch.load(folder / f"rng_rank_{collectives.rank():05d}.pt", weights_only=False))
    return TrainState(**content["state"])


def load_average(
    folder: Path, topology: Topology, device: torch.device
) -> list[torch.Tensor] | None:
    """This rank's share of the averaged weights of a verified checkpoint; None if it holds none."""
    path = _average_file(folder, topology)
    return torch.load(path, map_location=device) if path.is_file() else None


def _has_shares(topology: Topology) -> bool:
    """Whether ranks hold different weights."""
    return bool(topology.zero_stage or topology.num_expert_ranks)


def _average_file(folder: Path, topology: Topology) -> Path:
    rank = collectives.rank() if _has_shares(topology) else 0
    return folder / f"average_rank_{rank:05d}.pt"


def prune(root: Path, step: int, keep_last: int) -> None:
    """Delete checkpoints (rank 0): the newest `keep_last` up to `step` and the best one of them stay.

    Later ones are damaged or of a course that was left by a resume from an earlier one; they would
    count as the newest ones, and a later start would take them for this run's.
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


def _shapes_digest(module: torch.nn.Module) -> str:
    """Names and whole shapes of all parameters, in one hash, also where ZeRO-3 has divided them."""
    digest = hashlib.sha256()
    for name, parameter in module.named_parameters():
        digest.update(f"{name} {list(getattr(parameter, 'ds_shape', parameter.shape))}\n".encode())
    return digest.hexdigest()


def _list_files(folder: Path) -> dict[str, dict[str, Any]]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        for path in files
    }


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
