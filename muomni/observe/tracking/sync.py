"""Bring the MLflow run of a stage up to date with its folder, outside of training."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from muomni.config.loading import read_yaml
from muomni.observe.metrics_log import METRICS_FILE, MetricsTail
from muomni.observe.recorder import RunInfo, Status
from muomni.observe.sample_files import artifact_of
from muomni.observe.tracking.run import (
    RUN_FILE,
    Points,
    TrackedRun,
    is_other_loss,
    read_run_file,
)
from muomni.observe.tracking.store import Store, reason_of

logger = logging.getLogger(__name__)

_EVALUATION = "evaluation.json"


class Synced(NamedTuple):
    """The outcome of `sync`: what was done, the number of lines that were missing, and the page."""

    action: str
    num_lines: int
    link: str


def sync(run: Path, stage: str) -> Synced:
    """Send what the MLflow run of a stage lacks; replace a run that contradicts `metrics.jsonl`.

    The replaced run is in MLflow's trash. Raises what MLflow raises.
    """
    info = _info(run, stage)
    store, path = Store(run), info.folder / METRICS_FILE
    tracked, action = TrackedRun(store, info), "updated"
    points = tracked.points()
    if tracked.is_new:
        action = "created"
    elif _contradicts(points, path):
        old, action = tracked, "replaced"
        tracked, points = TrackedRun(store, info, replaced=old.id), Points()
        old.delete()
    num_lines, tail = 0, MetricsTail(path)
    while lines := tail.read():
        missing = [line for line in lines if (line["kind"], line["step"]) not in points]
        tracked.log_lines(missing)
        tail.accept()
        num_lines += len(missing)
    for file, folder in _files(info.folder):
        tracked.log_artifact(file, folder)
    if _export_step(info.folder) is not None:
        tracked.log_model(info.folder / "export")
        _log_evaluation(tracked, info.folder)
    tracked.end(_status(info.folder))
    return Synced(action, num_lines, store.link(tracked.run))


def record_evaluation(run: Path, stage: str) -> None:
    """Add the report `RUN/STAGE/evaluation.json` to the MLflow run of the stage, if it has one.

    A failure is one warning: the report is on disk, and `muomni sync-mlflow` adds it.
    """
    folder = run / stage
    run_id = read_run_file(folder / RUN_FILE).get("run_id")
    if run_id is None:
        return
    try:
        store = Store(run)
        if store.active_run(run_id) is None:
            raise LookupError(f"its run {run_id} is lost")
        _log_evaluation(TrackedRun(store, _info(run, stage)), folder)
    except Exception as error:  # MLflow and its stores raise anything; the evaluation is complete
        logger.warning(
            "MLflow does not have these metrics (%s); add them with: muomni sync-mlflow %s",
            reason_of(error),
            run,
        )


def end_killed(run: Path, stage: str) -> None:
    """End the MLflow run of a stage whose processes were killed; a failure is one warning."""
    run_id = read_run_file(run / stage / RUN_FILE).get("run_id")
    if run_id is None:
        return
    try:
        store = Store(run)
        found = store.active_run(run_id)
        if found is not None and found.info.status == "RUNNING":
            TrackedRun(store, _info(run, stage)).end("KILLED")
    except Exception as error:  # MLflow and its stores raise anything
        logger.warning(
            "MLflow shows %s as running (%s); correct that with: muomni sync-mlflow %s",
            stage,
            reason_of(error),
            run,
        )


def _log_evaluation(tracked: TrackedRun, folder: Path) -> None:
    path, step = folder / _EVALUATION, _export_step(folder)
    if path.is_file() and step is not None:
        tracked.log_evaluation(json.loads(path.read_text(encoding="utf-8")), step)


def _info(run: Path, stage: str) -> RunInfo:
    folder = run / stage
    config = read_yaml(folder / "config.yaml")
    return RunInfo(stage, "", run, folder, config, step=0, num_steps=0)


def _contradicts(points: Points, path: Path) -> bool:
    """Whether the run has steps that the file has not, or with another loss."""
    remaining, tail = dict(points), MetricsTail(path)
    while lines := tail.read():
        for line in lines:
            before = remaining.pop((line["kind"], line["step"]), None)
            if before is not None and is_other_loss(line, before):
                return True
        tail.accept()
    return bool(remaining)


def _files(folder: Path) -> Iterator[tuple[Path, str]]:
    """The files of a stage that its recorders got, with their folders."""
    yield folder / "config.yaml", "config"
    for path in sorted((folder / "samples").rglob("*")):
        artifact = artifact_of(path, folder)
        if artifact is not None:
            yield path, artifact.folder


def _status(folder: Path) -> Status:
    """FINISHED if the export is of the last logged step, else KILLED: no process trains the stage."""
    last, tail = 0, MetricsTail(folder / METRICS_FILE)
    while lines := tail.read():
        last = lines[-1]["step"]
        tail.accept()
    return "FINISHED" if (_export_step(folder) or -1) >= last else "KILLED"


def _export_step(folder: Path) -> int | None:
    """The step of the export of a stage; None without one."""
    path = folder / "export" / "export.json"
    if not path.is_file():
        return None
    return json.loads(path.read_text(encoding="utf-8"))["step"]
