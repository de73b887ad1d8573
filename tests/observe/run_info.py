"""Facts about a run, for recorders under test."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from muomni.observe.recorder import RunInfo


def run_info(
    run: Path,
    stage: str = "codec",
    step: int = 0,
    config: dict[str, Any] | None = None,
    resume: str = "auto",
    free_folders: Callable[[], Sequence[Path]] = tuple,
) -> RunInfo:
    """A run of 20 steps in `run`, whose stage folder is created."""
    folder = run / stage
    folder.mkdir(parents=True, exist_ok=True)
    return RunInfo(stage, "tokens", run, folder, config or {}, step, 20, resume, None, free_folders)
