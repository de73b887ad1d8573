"""The checkpoints in a folder, and the list of files that makes each one complete.

`complete.json` has the size and hash of each file. A checkpoint may come from elsewhere or be damaged in any
way, so nothing here is trusted before it is checked.
"""

import itertools
import json
import logging
import re
from pathlib import Path
from typing import Any

from muomni.distributed import collectives
from muomni.errors import CheckpointError
from muomni.io.hashing import sha256_file

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1
FILE_LIST = "complete.json"
_STEP = re.compile(r"step_(\d{8,})")


def step_folder(root: Path, step: int) -> Path:
    """The folder of the checkpoint after `step` steps."""
    return root / f"step_{step:08d}"


def candidates(root: Path) -> list[Path]:
    """The checkpoint folders of a run, complete or not, the newest first."""
    return sorted(filter(_is_checkpoint, root.glob("step_*")), key=_step, reverse=True)


def newest_complete(root: Path) -> Path | None:
    """The newest checkpoint whose files all exist with the right sizes; marks are not trusted."""
    for folder in candidates(root):
        try:
            verify(folder, with_hashes=False)
        except CheckpointError as error:
            logger.warning("%s; trying an older one", error)
            continue
        return folder
    return None


def none_complete(root: Path) -> CheckpointError:
    """The error of a run whose checkpoints are all damaged: it must not silently start over."""
    return CheckpointError(
        f"no checkpoint in {root} is complete; restore one, or start over with --resume never"
    )


def marked(root: Path, name: str) -> Path | None:
    """The checkpoint that the mark `latest` or `best` names, if mark and checkpoint exist."""
    mark = root / name
    if not mark.is_file():
        return None
    folder = root / mark.read_text(encoding="utf-8", errors="replace").strip()
    if folder.parent != root or not _is_checkpoint(folder):
        logger.warning("%s names no checkpoint; it is ignored", mark)
        return None
    return folder


def verify(folder: Path, with_hashes: bool = True) -> dict[str, Any]:
    """Check a checkpoint against its file list, and return the list.

    Raises CheckpointError that names the fault.
    """
    content = _read_list(folder)
    for name, expected in content["files"].items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != expected["bytes"]:
            raise CheckpointError(f"checkpoint {folder} is damaged: {name} is missing or truncated")
        if with_hashes and sha256_file(path) != expected["sha256"]:
            raise _hash_differs(folder, name)
    return content


def check_hashes(folder: Path, files: dict[str, dict[str, Any]]) -> None:
    """Raise CheckpointError on all ranks if a hash differs; each rank reads an equal share of the files."""
    by_size = sorted(files, key=lambda name: (-files[name]["bytes"], name))
    own = by_size[collectives.rank() :: collectives.world_size()]
    damaged = [name for name in own if sha256_file(folder / name) != files[name]["sha256"]]
    for name in itertools.chain.from_iterable(collectives.gather_objects(damaged)):
        raise _hash_differs(folder, name)


def describe_files(folder: Path, paths: list[Path]) -> dict[str, dict[str, Any]]:
    """Size and hash of each file, by its name relative to `folder`."""
    return {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        for path in paths
    }


def _hash_differs(folder: Path, name: str) -> CheckpointError:
    return CheckpointError(f"checkpoint {folder} is damaged: the hash of {name} differs")


def _is_checkpoint(folder: Path) -> bool:
    return _STEP.fullmatch(folder.name) is not None and folder.is_dir()


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


def _read_list(folder: Path) -> dict[str, Any]:
    """The file list of a checkpoint; raises CheckpointError if it is missing or not one of this version."""
    try:
        content = json.loads((folder / FILE_LIST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"checkpoint {folder} is incomplete ({error})") from None
    version = content.get("schema_version") if isinstance(content, dict) else None
    if version != SCHEMA_VERSION:
        raise CheckpointError(
            f"checkpoint {folder} has schema version {version}, this version of muomni reads {SCHEMA_VERSION}"
        )
    fault = _fault(content, folder)
    if fault:
        raise CheckpointError(f"checkpoint {folder} is damaged: its {FILE_LIST} {fault}")
    return content


def _fault(content: dict[str, Any], folder: Path) -> str:
    """What is wrong with a file list, in words; empty if nothing is."""
    state, files = content.get("state"), content.get("files")
    if not isinstance(state, dict) or not isinstance(state.get("step"), int):
        return "has no state"
    if not isinstance(content.get("topology"), dict):
        return "has no topology"
    if not isinstance(files, dict) or not files:
        return "lists no files"
    for name, about in files.items():
        if Path(name).is_absolute() or ".." in Path(name).parts:
            return f"names {name}, which is outside of the checkpoint"
        if not isinstance(about, dict) or not {"bytes", "sha256"} <= about.keys():
            return f"has no size and hash of {name}"
    if _is_checkpoint(folder) and state["step"] != _step(folder):
        return f"is of step {state['step']}"
    return ""
