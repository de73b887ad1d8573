"""The MLflow run of a stage: a child of the run of its pipeline, in the pipeline's experiment.

`RUN/mlflow.json` and `RUN/STAGE/mlflow.json` hold the ids of both. A run that its store no longer has is
created again. All methods raise what MLflow raises, and may be repeated after a failure.
"""

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from muomni.io.atomic_write import write_atomic
from muomni.io.file_lock import exclusive_lock_if_supported
from muomni.io.hashing import sha256_file
from muomni.observe.metric_names import LOSS, mlflow_name, recorder_metrics
from muomni.observe.metrics_log import TIME, metrics_of
from muomni.observe.recorder import Kind, RunInfo, Status
from muomni.observe.tracking import facts
from muomni.observe.tracking.store import Store

RUN_FILE = "mlflow.json"
_PARENT, _STARTS, _MODEL = "mlflow.parentRunId", "starts", "model"
_LOGGED, _NOTE = "mlflow.loggedArtifacts", "mlflow.note.content"
_MAX_PARAM_LENGTH = 500
# MLflow's limits per request; large mixtures of experts have more metrics.
_MAX_PARAMS, _MAX_METRICS = 100, 1000
_WEIGHTS_SUFFIX = ".safetensors"
T = TypeVar("T")
# Values of the loss by kind and step.
Points = dict[tuple[Kind, int], float]


class TrackedRun:
    """The MLflow run of the stage of `info`, found by `RUN/STAGE/mlflow.json` or created.

    `start` has the tags of a start of training to record. A run with the id `replaced` is not continued.
    """

    def __init__(
        self,
        store: Store,
        info: RunInfo,
        start: dict[str, str] | None = None,
        replaced: str | None = None,
    ) -> None:
        self.store, self._info = store, info
        content = read_run_file(info.folder / RUN_FILE)
        with store.locked(), exclusive_lock_if_supported(info.run / f".{RUN_FILE}.lock"):
            self._parent = self._find_parent(start or content.get("start", {}))
        found: Any = store.active_run(content.get("run_id"))
        experiment_id = self._parent.info.experiment_id
        if found is not None and (
            found.info.run_id == replaced or found.info.experiment_id != experiment_id
        ):
            if found.info.status == "RUNNING":  # its process was killed
                store.client.set_terminated(found.info.run_id, "KILLED")
            found = None
        self.is_new = found is None
        start = content.get("start", {}) if start is None and self.is_new else start
        self.run: Any = self._create(start or {}) if self.is_new else found
        if self.run.data.tags.get(_PARENT) != self.parent_id:
            store.client.set_tag(self.id, _PARENT, self.parent_id)
        if start is not None:
            self._record_start(start)

    @property
    def id(self) -> str:
        return self.run.info.run_id

    @property
    def parent_id(self) -> str:
        return self._parent.info.run_id

    # -- creation ----------------------------------------------------------------------------------
    def _find_parent(self, start: dict[str, str]) -> Any:
        """The run of the pipeline, created if it is lost or another experiment is wanted."""
        path, run = self._info.run / RUN_FILE, self._info.run.resolve()
        name = self._info.config.get("training", {}).get("experiment") or run.name or "muomni"
        content = read_run_file(path)
        found = self.store.active_run(content.get("run_id"))
        if found is None or content.get("experiment") != name:
            experiment_id = self.store.experiment(name)
            shown = {name: value for name, value in start.items() if name.startswith("mlflow.")}
            tags = {"run_folder": str(run), **shown}
            found = self.store.client.create_run(experiment_id, run_name=run.name, tags=tags)
            _write_run_file(path, {"run_id": found.info.run_id, "experiment": name})
        return found

    def _create(self, start: dict[str, str]) -> Any:
        run = self.store.client.create_run(
            self._parent.info.experiment_id,
            run_name=self._info.stage,
            tags={_PARENT: self.parent_id, **self._fork_tags()},
        )
        self.store.client.set_tag(run.info.run_id, _NOTE, self.store.loss_note(run))
        path = self._info.folder / RUN_FILE
        _write_run_file(path, {"run_id": run.info.run_id, "start": start})
        return run

    def _record_start(self, tags: dict[str, str]) -> None:
        """Record tags, and parameters: MLflow cannot change them, so later starts add what changed."""
        from mlflow.entities import Param, RunTag

        client, start = self.store.client, int(self.run.data.tags.get(_STARTS, 0)) + 1
        before = _current_parameters(self.run.data.params, start)
        prefix = "" if start == 1 else f"start_{start}/"
        changed = {
            prefix + key: value[:_MAX_PARAM_LENGTH]
            for key, value in facts.parameters(self._info.config).items()
            if before.get(key) != value[:_MAX_PARAM_LENGTH]
        }
        for some in _batches([Param(*item) for item in changed.items()], _MAX_PARAMS):
            client.log_batch(self.id, params=some)
        self._record_datasets()
        # The number of starts is part of the last request, which completes the start.
        tags = {**facts.run_tags(self._info), **tags, _STARTS: str(start)}
        client.log_batch(self.id, tags=[RunTag(*item) for item in tags.items()])
        client.update_run(self.id, status="RUNNING")
        client.update_run(self.parent_id, status="RUNNING")
        self._stage_statuses()
        self.run = client.get_run(self.id)

    def _fork_tags(self) -> dict[str, str]:
        """The checkpoint that `--resume PATH` continued from, and the MLflow run that wrote it."""
        resume = self._info.resume
        if resume in ("auto", "never"):
            return {}
        tags = {"forked_from": resume}
        parent = read_run_file(Path(resume).absolute().parents[1] / RUN_FILE).get("run_id")
        if parent is not None:
            tags["forked_from_run"] = parent
        return tags

    def _record_datasets(self) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        inputs = [
            DatasetInput(
                Dataset(
                    each["name"], each["digest"], "local", json.dumps({"uri": each["source"]}),
                    profile=json.dumps({"num_samples": int(each["num_samples"])}),
                ),
                [InputTag("mlflow.data.context", each["split"])],
            )
            for each in facts.datasets(self._info.config)
        ]  # fmt: skip
        if inputs:
            self.store.client.log_inputs(self.id, inputs)

    # -- content -----------------------------------------------------------------------------------
    def points(self) -> Points:
        """The steps that the run has, with their loss."""
        if self.is_new:
            return {}
        return {
            (kind, point.step): point.value
            for kind, name in LOSS.items()
            for point in self.store.client.get_metric_history(self.id, name)
        }

    def log_lines(self, lines: Sequence[dict[str, Any]]) -> None:
        """Record lines of `metrics.jsonl`, with the loss of each line last."""
        from mlflow.entities import Metric
        from mlflow.utils.time import get_current_time_millis

        now = get_current_time_millis()
        metrics = [
            Metric(name, value, round(1000 * line[TIME]) if TIME in line else now, line["step"])
            for line in lines
            for name, value in recorder_metrics(line["kind"], metrics_of(line)).items()
        ]
        for some in _batches(metrics, _MAX_METRICS):
            self.store.client.log_batch(self.id, metrics=some)

    def log_system(self, metrics: dict[str, float]) -> None:
        """Record a sample of the machine at the seconds since the run was created."""
        from mlflow.entities import Metric
        from mlflow.utils.time import get_current_time_millis

        now = get_current_time_millis()
        second = (now - self.run.info.start_time) // 1000
        points = [Metric(f"system/{name}", value, now, second) for name, value in metrics.items()]
        self.store.client.log_batch(self.id, metrics=points)

    def log_artifact(self, path: Path, folder: str) -> None:
        """Store a file; MLflow shows JSON samples as tables."""
        self.store.log_artifact(self.run, path, folder)
        if path.suffix == ".json" and folder.startswith("samples/"):
            tables = json.loads(self.run.data.tags.get(_LOGGED, "[]"))
            new = {"path": f"{folder}/{path.name}", "type": "table"}
            if new not in tables:
                tag = json.dumps([*tables, new])
                self.store.client.set_tag(self.id, _LOGGED, tag)
                self.run.data.tags[_LOGGED] = tag

    def log_evaluation(self, report: dict[str, Any], step: int) -> None:
        """Record a report of `muomni evaluate` as `SPLIT/METRIC`, with baselines, unless it is known."""
        from mlflow.entities import Metric
        from mlflow.utils.time import get_current_time_millis

        split, now = report["split"], get_current_time_millis()
        values = {f"{split}/{mlflow_name(name)}": v for name, v in report["metrics"].items()}
        for name, baseline in report["baselines"].items():
            values[f"{split}/{mlflow_name(name)}_baseline"] = baseline["value"]
        known = self.run.data.metrics
        new = {
            name: value
            for name, value in values.items()
            if value is not None and known.get(name) != value
        }
        points = [Metric(name, value, now, step) for name, value in new.items()]
        for some in _batches(points, _MAX_METRICS):
            self.store.client.log_batch(self.id, metrics=some)

    def log_model(self, export: Path) -> None:
        """Record an export as a logged model, and with `training.register_model` in the registry.

        The weights are copied only if they are registered; else the model names their folder.
        """
        from mlflow.entities import LoggedModelOutput

        client, manifest = self.store.client, export / "export.json"
        digest, content = sha256_file(manifest), json.loads(manifest.read_text(encoding="utf-8"))
        if self.run.data.tags.get(_MODEL) == digest:
            return
        registered = self._info.config.get("training", {}).get("register_model")
        found = client.search_logged_models(
            [self.run.info.experiment_id], f"source_run_id = '{self.id}'"
        )
        model = next((each for each in found if each.tags.get("digest") == digest), None)
        if model is None:  # else an earlier attempt failed later
            model = client.create_logged_model(
                self.run.info.experiment_id,
                name=self._info.stage,
                source_run_id=self.id,
                tags={"export": str(export.resolve()), "digest": digest},
                model_type=self._info.stage,
            )
            client.log_outputs(self.id, [LoggedModelOutput(model.model_id, content["step"])])
        for path in sorted(export.iterdir()):
            if registered is not None or path.suffix != _WEIGHTS_SUFFIX:
                self.store.log_model_file(model, path)
        client.finalize_logged_model(model.model_id, "READY")
        if registered is not None:
            self._register(registered, model)
        client.set_tag(self.id, _MODEL, digest)
        self.run.data.tags[_MODEL] = digest

    def _register(self, name: str, model: Any) -> None:
        from mlflow.exceptions import MlflowException

        client = self.store.client
        try:
            client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        client.create_model_version(name, model.artifact_location, self.id, model_id=model.model_id)

    def end(self, status: Status) -> None:
        """End the run, and its parent unless another stage is running."""
        client = self.store.client
        client.set_terminated(self.id, status)
        found = self._stage_statuses()
        if "RUNNING" not in found:
            worst = next((each for each in ("FAILED", "KILLED") if each in found), "FINISHED")
            client.set_terminated(self.parent_id, worst)

    def _stage_statuses(self) -> set[str]:
        """The statuses of all stages of the pipeline; ends those whose process was killed."""
        children = f"tags.`{_PARENT}` = '{self.parent_id}'"
        stages = self.store.client.search_runs([self.run.info.experiment_id], children)
        status = {run.info.run_id: run.info.status for run in stages}
        free = {
            read_run_file(folder / RUN_FILE).get("run_id") for folder in self._info.free_folders()
        }
        for run_id in free - {self.id}:
            if status.get(run_id) == "RUNNING":
                self.store.client.set_terminated(run_id, "KILLED")
                status[run_id] = "KILLED"
        return set(status.values())

    def delete(self) -> None:
        """Move the run to MLflow's trash."""
        self.store.client.delete_run(self.id)


def is_other_loss(line: dict[str, Any], loss: float) -> bool:
    """Whether a line of `metrics.jsonl` has another loss; one without a value has none."""
    own = line.get("loss", line.get("val/loss"))
    return own is not None and not math.isclose(own, loss, rel_tol=1e-4)


def read_run_file(path: Path) -> dict[str, Any]:
    """The content of an `mlflow.json`; empty without a readable one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _write_run_file(path: Path, content: dict[str, Any]) -> None:
    write_atomic(path, (json.dumps(content) + "\n").encode())


def _current_parameters(recorded: dict[str, str], start: int) -> dict[str, str]:
    """The parameters before start number `start`: those of the first one, with later changes."""
    current = {key: value for key, value in recorded.items() if not key.startswith("start_")}
    for number in range(2, start):
        prefix = f"start_{number}/"
        current |= {
            key.removeprefix(prefix): value
            for key, value in recorded.items()
            if key.startswith(prefix)
        }
    return current


def _batches(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    return (items[start : start + size] for start in range(0, len(items), size))
