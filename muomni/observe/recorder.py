"""The interface of a recorder: a destination for the metrics and files of a run.

Rank 0 drives the recorders, all others have none. To add one, implement `Recorder` and extend
`build_recorders`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

Kind = Literal["train", "val"]
Status = Literal["FINISHED", "FAILED", "KILLED"]


@dataclass(frozen=True, slots=True)
class RunInfo:
    """Facts about a run that recorders need when they open; `step` counts finished steps on a resume."""

    stage: str
    unit: str  # unit of throughput: tokens, audio_s, images
    run: Path
    folder: Path  # RUN/STAGE
    config: dict[str, Any]
    step: int
    num_steps: int
    resume: str = "auto"  # or never, or a checkpoint folder: the start is not a continuation
    # Finished steps and the section of the step clock, at the time of the call; from any thread.
    position: Callable[[], tuple[int, str]] | None = None
    # Folders of stages of the run that no process trains, at the time of the call; from any thread.
    free_folders: Callable[[], Sequence[Path]] = tuple


class Recorder(Protocol):
    """A destination for metrics and files, opened and closed once per start of a run."""

    def open(self, info: RunInfo) -> None:
        """Start recording; metrics after `info.step` from an earlier start are outdated."""

    def log(self, step: int, kind: Kind, metrics: dict[str, float]) -> None:
        """Record the metrics of a finished step."""

    def artifact(self, path: Path, folder: str) -> None:
        """Record a file under the name of a folder; recorders of numbers ignore it."""

    def close(self, status: Status) -> None:
        """Flush everything and stop recording."""


def links(recorders: Sequence[Recorder]) -> list[str]:
    """Where to look at the run, from recorders that have an attribute `link`; it may be None at first."""
    known = (getattr(recorder, "link", None) for recorder in recorders)
    return [link for link in known if link]


def check_recorders(names: Sequence[str]) -> None:
    """Raise ConfigError if a recorder needs a package that is not installed."""
    if "tensorboard" in names:
        from muomni.observe.tensorboard_log import check_installed

        check_installed()


def build_recorders(names: Sequence[str], quiet: bool = False) -> list[Recorder]:
    """The recorders of rank 0: metrics.jsonl, those in `names`, and unless `quiet` the progress line."""
    from muomni.observe.metrics_log import MetricsLog
    from muomni.observe.mlflow_log import MlflowLog
    from muomni.observe.progress import ProgressLine
    from muomni.observe.tensorboard_log import TensorBoardLog

    optional: dict[str, type[Recorder]] = {"mlflow": MlflowLog, "tensorboard": TensorBoardLog}
    recorders: list[Recorder] = [MetricsLog(), *(optional[name]() for name in names)]
    return recorders if quiet else [*recorders, ProgressLine(recorders)]
