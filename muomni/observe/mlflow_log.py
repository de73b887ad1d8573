"""Recorder that sends metrics and files to MLflow in a thread; its failures cost training nothing.

The thread reads `metrics.jsonl`, which has every line before this recorder hears of it. So its memory is
bounded, and after a failure it compares the steps of the MLflow run with the file and sends what is missing:
no step is lost, and none appears twice.
"""

import logging
import threading
import time
from pathlib import Path
from typing import Any

from muomni.observe.metrics_log import METRICS_FILE, MetricsTail
from muomni.observe.recorder import Kind, RunInfo, Status
from muomni.observe.tracking.facts import process_tags
from muomni.observe.tracking.run import (
    RUN_FILE,
    Points,
    TrackedRun,
    is_other_loss,
    read_run_file,
)
from muomni.observe.tracking.store import Store, reason_of

logger = logging.getLogger(__name__)

_SEND_S, _SAMPLE_S = 5.0, 10.0  # between requests, and between samples of the machine
_FIRST_WAIT_S, _MAX_WAIT_S = 1.0, 60.0  # between attempts
# How long the end of a finished run waits for MLflow, and that of a stopped one, or if MLflow is down.
_FINISH_S, _STOP_S = 30.0, 2.0
_LAST_WAIT_S = 0.5  # between the last attempts


class MlflowLog:
    """Sends the metrics file, artifacts, and the export to MLflow.

    Args:
        send_s: seconds between requests.
        first_wait_s: seconds before the second attempt; each further wait is twice as long.
    """

    def __init__(self, send_s: float = _SEND_S, first_wait_s: float = _FIRST_WAIT_S) -> None:
        self._settings = (send_s, first_wait_s)
        self._has_started = self._is_lost = self._has_warned = False
        self._replaced: str | None = None
        self._sender: _Sender | None = None

    @property
    def run_id(self) -> str | None:
        """The id of the MLflow run once it is known."""
        tracked = self._sender and self._sender.tracked
        return tracked.id if tracked else None

    @property
    def link(self) -> str | None:
        """Where to see the run, once it is known."""
        tracked = self._sender and self._sender.tracked
        return tracked.store.link(tracked.run) if tracked else None

    def open(self, info: RunInfo) -> None:
        if not self._has_started and info.resume != "auto":
            self._replaced = read_run_file(info.folder / RUN_FILE).get("run_id")
        start = None if self._has_started else process_tags()
        self._sender = _Sender(info, start, self._replaced, self._is_lost, *self._settings)
        self._sender.start()

    def log(self, step: int, kind: Kind, metrics: dict[str, float]) -> None:
        """Nothing to do: the thread reads the metrics file."""

    def artifact(self, path: Path, folder: str) -> None:
        assert self._sender is not None
        self._sender.artifacts.append((path, folder))

    def close(self, status: Status) -> None:
        """Send the rest and end the MLflow run with `status`, unless that takes too long."""
        sender = self._sender
        assert sender is not None
        sender.stop(status)
        end = time.monotonic() + (_FINISH_S if status == "FINISHED" else _STOP_S)
        while sender.is_alive() and time.monotonic() < end:
            sender.join(0.05)
            if sender.is_lost:
                end = min(end, time.monotonic() + _STOP_S)
        self._has_started, self._is_lost = sender.has_started, sender.is_lost
        if not sender.is_complete:
            sender.abandon()
        if not sender.is_complete and not self._has_warned:  # samples open it again
            self._has_warned = True
            logger.warning(
                "MLflow does not have all of %s; once it can be reached, run: muomni sync-mlflow %s",
                sender.info.folder, sender.info.run,
            )  # fmt: skip


class _Sender(threading.Thread):
    """The thread of one start; `start` are the tags to record, None for a start that is recorded."""

    def __init__(
        self,
        info: RunInfo,
        start: dict[str, str] | None,
        replaced: str | None,
        is_lost: bool,
        send_s: float,
        first_wait_s: float,
    ) -> None:
        super().__init__(name="mlflow", daemon=True)
        self.info = info
        self.tracked: TrackedRun | None = None
        self.artifacts: list[tuple[Path, str]] = []
        self.is_lost, self.is_complete = is_lost, False
        self.has_started = start is None
        self._start_tags, self._replaced = start, replaced
        self._send_s, self._first_wait_s = send_s, first_wait_s
        self._status: Status | None = None
        self._stops, self._is_abandoned = threading.Event(), False
        self._stored: list[tuple[Path, str]] = []
        self._artifacts_wait_s, self._artifacts_due_s = 0.0, 0.0
        self._tail, self._points, self._has_warned = MetricsTail(Path()), Points(), False
        self._monitor: Any = None
        self._sampled_s = time.monotonic()

    def stop(self, status: Status) -> None:
        """Send the rest, end the MLflow run, and end the thread."""
        self._status = status
        self._stops.set()

    def abandon(self) -> None:
        """Make no further request."""
        self._is_abandoned = True

    def run(self) -> None:
        wait_s = 0.0
        while not self._is_abandoned:
            is_last = self._stops.is_set()  # before the turn, which then sends everything
            try:
                self._turn(is_last)
                wait_s, delay_s = 0.0, self._send_s
                if is_last:
                    return
            except Exception as error:  # MLflow and its stores raise anything; training continues
                self._lose(error)
                wait_s = delay_s = self._next_wait_s(wait_s)
            if (
                self._stops.wait(delay_s) and is_last
            ):  # until `close` gives up: a lost run is created by the second attempt
                time.sleep(min(delay_s, _LAST_WAIT_S))

    def _turn(self, is_last: bool) -> None:
        """Connect if necessary, and send what is new."""
        tracked = self.tracked or self._connect()
        num_sent = self._send_lines(tracked)
        if self.is_lost:
            self.is_lost = False
            logger.warning("MLflow is back; filled in %d lines", num_sent)
        if is_last or time.monotonic() >= self._artifacts_due_s:
            self._send_artifacts(tracked, is_last and self._status == "FINISHED")
        if not is_last:
            self._sample_machine(tracked)
        elif not self._is_abandoned:
            assert self._status is not None
            tracked.end(self._status)
            self.is_complete = self._artifacts_wait_s == 0.0

    def _connect(self) -> TrackedRun:
        start = None if self.has_started else self._start_tags
        tracked = TrackedRun(Store(self.info.run), self.info, start, self._replaced)
        self.has_started = True
        if tracked.is_new:
            self.artifacts[:0], self._stored = self._stored, []
        self._points = tracked.points()
        self._tail = MetricsTail(self.info.folder / METRICS_FILE)
        self.tracked = tracked
        return tracked

    def _lose(self, error: Exception) -> None:
        self.tracked = None
        if not self.is_lost and not self._is_abandoned:
            self.is_lost = True
            logger.warning(
                "MLflow failed (%s); training continues, and MLflow is tried again in the background",
                reason_of(error),
            )

    def _next_wait_s(self, wait_s: float) -> float:
        return min(_MAX_WAIT_S, max(self._first_wait_s, 2 * wait_s))

    # -- metrics -----------------------------------------------------------------------------------
    def _send_lines(self, tracked: TrackedRun) -> int:
        """Send the lines of the metrics file that the run does not have; returns their number."""
        num_sent = 0
        while (lines := self._tail.read()) and not self._is_abandoned:
            new = [line for line in lines if self._is_missing(line)]
            tracked.log_lines(new)
            self._tail.accept()
            num_sent += len(new)
        return num_sent

    def _is_missing(self, line: dict[str, Any]) -> bool:
        """Whether the run lacks a line: a start that was killed has sent steps that now run again."""
        before = self._points.pop((line["kind"], line["step"]), None)
        if before is None:
            return True
        if is_other_loss(line, before) and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "MLflow keeps the loss of step %d of an earlier start, which differs; to replace its run, use "
                "muomni sync-mlflow %s",
                line["step"], self.info.run,
            )  # fmt: skip
        return False

    def _sample_machine(self, tracked: TrackedRun) -> None:
        if time.monotonic() < self._sampled_s + _SAMPLE_S:
            return
        if self._monitor is None:
            from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

            self._monitor = SystemMetricsMonitor(tracked.id, tracking_uri=tracked.store.uri)
        self._sampled_s = time.monotonic()
        self._monitor.collect_metrics()
        tracked.log_system(self._monitor.aggregate_metrics())
        for each in self._monitor.monitors:
            each.clear_metrics()

    # -- files -------------------------------------------------------------------------------------
    def _send_artifacts(self, tracked: TrackedRun, is_finished: bool) -> None:
        """Store the waiting files, and the export of a finished run; metrics go on if that fails."""
        has_failed = self._artifacts_wait_s > 0
        try:
            while self.artifacts:
                path, folder = self.artifacts[0]
                if path.is_file():  # else a later start has removed it
                    tracked.log_artifact(path, folder)
                self._stored.append(self.artifacts.pop(0))
            export = self.info.folder / "export"
            if is_finished and export.is_dir():
                tracked.log_model(export)
        except Exception as error:  # artifact stores raise anything, too
            self._artifacts_wait_s = self._next_wait_s(self._artifacts_wait_s)
            self._artifacts_due_s = time.monotonic() + self._artifacts_wait_s
            if not has_failed and not self._is_abandoned:
                logger.warning(
                    "MLflow stores no files (%s); they are in %s, and it is tried again in the background",
                    reason_of(error), self.info.folder,
                )  # fmt: skip
        else:
            self._artifacts_wait_s = 0.0
            if has_failed:
                logger.warning("MLflow stores files again")
