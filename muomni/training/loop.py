"""The training loop: it reads as the story of a step and knows nothing about any stage."""

import itertools
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import torch

from muomni.checkpoint import store
from muomni.checkpoint.export import read_export, write_export
from muomni.checkpoint.store import Topology, TrainState
from muomni.data.loading.loader import DeviceCopies
from muomni.data.shards.source import Source
from muomni.data.views.base import Batch
from muomni.distributed import collectives
from muomni.errors import DataError, NonFiniteError, PreemptedError
from muomni.observe.metrics_log import MetricsLog
from muomni.observe.mlflow_log import MlflowLog, flatten
from muomni.observe.progress import Progress
from muomni.run_folder import RunFolder, provenance
from muomni.training.engine.engine import Engine
from muomni.training.feed import Feed
from muomni.training.guard import Guard, ScaleWatch
from muomni.training.optim.schedule import lr_factor
from muomni.training.outputs import StageOutput, Sums
from muomni.training.postmortem import PostMortem
from muomni.training.stage import Stage
from muomni.training.step_reduction import RunningSums, StepReduction
from muomni.training.stop import StopFlag
from muomni.training.throughput import Throughput
from muomni.training.validation import SplitBatches, validate


@dataclass(slots=True)
class LoopParts:
    """What the loop is given; each part is built and tested on its own."""

    stage: Stage
    engine: Engine
    feed: Feed
    val: Source | None
    folder: RunFolder
    device: torch.device
    num_steps: int
    topology: Topology


class Loop:
    """Trains one stage from its state to `num_steps`, then writes the export."""

    def __init__(self, parts: LoopParts, state: TrainState) -> None:
        self.parts = parts
        self.state = state
        self.stage, self.engine = parts.stage, parts.engine
        self.config = parts.stage.config
        self.is_main = collectives.rank() == 0
        self.view = self.stage.view()
        self.loss_weights = self.stage.loss_weights()
        self.window = StepReduction(self.stage, parts.device)
        self.copies = DeviceCopies(parts.device)
        self.sums = RunningSums()
        self.units = torch.zeros((), device=parts.device)
        self.throughput = Throughput(self.stage, self.engine, parts.folder.root, parts.device)
        self.clock, self.profiler = self.throughput.clock, self.throughput.profiler
        self.guard = Guard(parts.engine.precision, self.config.fp16)
        self.scale_watch = ScaleWatch(self.config.fp16)
        self.is_stop_agreed = False
        self.saved_step = state.step
        self.last_metrics: dict[str, float] = {}
        self.loader = parts.feed.loader(state.step)

    # -- the story ---------------------------------------------------------------------------------
    def run(self) -> dict[str, Any]:
        """Train to the end; returns the result that is printed as the last line.

        Raises PreemptedError after a signal (the state is saved), NonFiniteError when gradients or the
        loss stay non-finite (the state is saved, and why is looked into) or a weight is not (nothing is).
        """
        self._open_logs()
        status = "FAILED"
        try:
            with StopFlag().installed() as stop:
                self._train(stop)
            result = self._finish()
            status = "FINISHED"
            return result
        except PreemptedError:
            status = "KILLED"
            raise
        finally:
            self._close_logs(status)
            if status == "KILLED" or self.is_stop_agreed:
                # Launchers kill all ranks when the first one leaves with a code; rank 0 is the last.
                collectives.barrier()

    def _train(self, stop: StopFlag) -> None:
        self.engine.train()
        batches = self._batches()
        while self.state.step < self.parts.num_steps:
            self.parts.feed.count_ahead(self.state.step, self.parts.num_steps)
            if self.profiler.is_due(self.state.step):
                self._outside_of_rates(lambda: self.profiler.turn(self.state.step))
            self._step(batches, bool(stop))
            step = self.state.step
            self._check_gradients(step - 1)
            training = self.config.training
            if step % training.log_every == 0 or step == self.parts.num_steps:
                with self.clock.section("logging"):
                    self._log(step)
            if step % training.validate_every == 0 and step < self.parts.num_steps:
                with self.clock.section("validation"):
                    self._outside_of_rates(self._validate)
            if step % training.save_every == 0 and step < self.parts.num_steps:
                with self.clock.section("save"):
                    self._outside_of_rates(self._save)
            if self.window.stop_agreed() and step < self.parts.num_steps:
                folder = self._save()
                raise PreemptedError(
                    f"stopped by {stop.signal_name or 'a signal to another rank'} after step {step}; "
                    f"the state is in {folder}: start the same command again to go on"
                )
        self.profiler.finish(self.state.step)

    def _step(self, batches: Iterator[Batch], wants_stop: bool) -> None:
        mark = self.clock.mark
        window: list[Batch] = []
        mark("data_wait")
        for batch in itertools.islice(batches, self.engine.num_accumulation):
            mark("forward")
            window.append(self._prepared(batch))
            mark("data_wait")
        mark("forward")
        self.window.start(window, wants_stop, self.engine.num_bad_steps)
        window = self.stage.begin_step(self.engine.forward, window)
        factor = lr_factor(self.state.step, self.parts.num_steps, self.config.optim)
        state: Sums = {}
        for batch in window:
            mark("forward")
            output = self.engine.forward(batch)
            mark("communication")
            weights = self.window.denominators()
            mark("backward")
            self.engine.backward(output, weights, self.loss_weights)
            mark("optimizer")
            self.engine.end_micro_step(factor)
            self._account(batch, output, state)
        self.state = replace(self.state, step=self.state.step + 1)
        self.engine.masters.update_average(self.state.step)
        self.stage.after_step(self.engine.task, state, self.state.step)
        mark("other")

    def _batches(self) -> Iterator[Batch]:
        try:
            yield from self.loader
        except DataError as error:  # each rank reads samples of its own
            own = DataError(f"rank {collectives.rank()}: {error}")
            own.is_of_one_rank = True
            raise own from error

    def _prepared(self, batch: Batch) -> Batch:
        self.throughput.count(batch)
        with torch.no_grad():
            return self.stage.prepare(self.copies(batch))

    def _account(self, batch: Batch, output: StageOutput, state: Sums) -> None:
        self.units += batch["units"]
        self.sums.add(output.logs)
        for name, value in output.state.items():
            state[name] = state[name] + value if name in state else value

    # -- what happens beside training --------------------------------------------------------------
    def _log(self, step: int) -> None:
        units, num_bad_samples, rates = self.throughput.take(
            step, self.units, self.loader, self.progress
        )
        self.units = torch.zeros_like(self.units)
        self.state = replace(self.state, units_seen=self.state.units_seen + units)
        metrics = self.stage.metrics(self.sums.take()) | rates
        metrics["lr"] = self.config.optim.lr * lr_factor(
            step - 1, self.parts.num_steps, self.config.optim
        )
        metrics["grad_norm"] = self.engine.grad_norm
        metrics[f"{self.view.unit}_seen"] = self.state.units_seen
        metrics["num_bad_samples"] = num_bad_samples
        num_skipped = self.engine.count_skipped()
        metrics["num_skipped"] = float(num_skipped)
        if self.engine.precision == "fp16":
            metrics |= self.scale_watch.see(step, self.engine.loss_scale, num_skipped)
        self._record(step, "train", metrics)
        if self.is_main:
            print(self.progress.line(step, metrics), flush=True)
        reason = self.guard.see_loss(step, metrics["loss"])
        if reason is not None:
            self._stop_non_finite(self.guard.suspect(step), reason)

    def _check_gradients(self, step: int) -> None:
        """Stop all ranks when gradients up to `step`, the one before the last, stayed non-finite."""
        reason = self.guard.see_step(step, self.window.num_bad_steps())
        if reason is not None:
            self._stop_non_finite(step, reason)

    def _stop_non_finite(self, step: int, reason: str) -> NoReturn:
        """Raise NonFiniteError, with all weights saved and `step` looked into, or with the weight that is not
        finite named and nothing saved; every rank must call it."""
        folder = self.parts.folder
        non_finite = self.engine.first_non_finite_weight()
        if non_finite is None:  # steps with such gradients left the weights as they were
            # Older checkpoints stay: they are from before the trouble, and starts may be many.
            saved = self._save(prunes=False)
            post_mortem = PostMortem(self.stage, self.engine, self.parts.feed, folder.nonfinite)
            found = f"in step {step} {post_mortem.examine(step)}; the weights before it are saved in {saved}"
        else:
            newest = collectives.broadcast_object(store.newest_complete(folder.checkpoints))
            last = f"the last checkpoint is {newest}" if newest else "there is no checkpoint yet"
            found = (
                f"{non_finite} is not finite (an update was too large, or a device erred), so the weights are "
                f"not saved, and {last}"
            )
        self.is_stop_agreed = True
        advice = self.guard.advice if non_finite is None else "lower optim.lr, or try other devices"
        raise NonFiniteError(f"{reason}; {found}; {advice}")

    def _validate(self) -> None:
        if self.parts.val is None:
            return
        max_batches = self.config.training.validate_batches
        batches = SplitBatches(self.stage, self.parts.val, self.parts.device, max_batches)
        with self.engine.evaluation():
            metrics = validate(self.stage, self.engine.forward, batches)
        self.last_metrics = {f"val/{name}": value for name, value in metrics.items()}
        self._record(self.state.step, "val", self.last_metrics)
        if self.is_main:
            text = "  ".join(f"{name} {value:.4f}" for name, value in self.last_metrics.items())
            print(f"{self.stage.name} {self.state.step}/{self.parts.num_steps}  {text}", flush=True)
        self._note_best(metrics)

    def _note_best(self, metrics: dict[str, float]) -> None:
        value = metrics.get(self.stage.best_metric, math.nan)
        best = self.state.best
        lower = self.stage.best_is_lower
        if math.isfinite(value) and (best is None or (value < best if lower else value > best)):
            self.state = replace(self.state, best=value)
            self._save()
            if self.is_main:
                store.mark_best(self.parts.folder.checkpoints, self.state.step)
                self._prune()

    def _save(self, prunes: bool = True) -> Path:
        """Save the state of this step, unless this course saved it or began with it.

        A folder of that name alone may be damaged, or left by a course before a resume. Raises NonFiniteError
        when weights are not finite: the next start would go on from them, and a good checkpoint be pruned.
        """
        folder = store.step_folder(self.parts.folder.checkpoints, self.state.step)
        is_current = self.saved_step == self.state.step
        if not (is_current and collectives.broadcast_object(folder.is_dir())):
            if self.engine.first_non_finite_weight() is not None:
                self._stop_non_finite(self.state.step, f"step {self.state.step} was to be saved")
            run_id = self.mlflow.wait_for_run_id() if self.mlflow is not None else None
            self.state = replace(self.state, mlflow_run_id=collectives.broadcast_object(run_id))
            store.save(
                self.engine.deepspeed,
                self.parts.folder.checkpoints,
                self.state,
                self.parts.topology,
                self.engine.masters.average.tensors
                if self.engine.masters.average is not None
                else None,
            )
            self.saved_step = self.state.step
            if prunes:
                self._prune()
        return folder

    def _prune(self) -> None:
        keep_last = self.config.training.keep_last
        store.prune(self.parts.folder.checkpoints, self.state.step, keep_last)

    def _finish(self) -> dict[str, Any]:
        """Validate, save, write sample outputs and the export; returns the result."""
        self._validate()
        self._save()
        with self.engine.masters.averaged():
            state = self.engine.full_state(_model_prefix(self.stage, self.engine.task))
        metrics = dict(self.last_metrics)
        upstream = {name: export.digest for name, export in self.stage.context.upstream.items()}
        if self.is_main:
            write_export(
                self.parts.folder.export,
                self.stage.name,
                {**state, **self.stage.frozen_state()},
                self.stage.model_config(),
                self.stage.tokenizer,
                metrics,
                {
                    "preset": self.config.preset,
                    "step": self.state.step,
                    "ema_decay": self.config.training.ema_decay,  # of the weights; null: as trained
                    "config": self.config.model_dump(mode="json"),
                    "data": {
                        "tasks": self.stage.tasks,
                        "fingerprint": self.parts.feed.fingerprint,
                    },
                    "upstream": upstream,
                    **provenance(),
                },
            )
        self._write_samples()
        collectives.barrier()
        text, throughput = self.throughput.utilization.summary()
        if self.is_main and text:
            print(f"{self.stage.name} {text}", flush=True)
        return {
            "stage": self.stage.name,
            "step": self.state.step,
            **metrics,
            **throughput,
            "export": str(self.parts.folder.export),
        }

    def _write_samples(self) -> None:
        """Write sample outputs of the export, by rank 0 alone.

        A plain module makes them: one under an engine may call collectives that other ranks miss.
        """
        if self.parts.val is None or self.mlflow is None:
            return
        task = self.stage.build().to(self.parts.device)
        self.stage.load_export(task, read_export(self.parts.folder.export, self.stage.name))
        folder = self.parts.folder.samples
        folder.mkdir(exist_ok=True)
        with torch.no_grad():
            for artifact in self.stage.sample_outputs(task.eval(), self.parts.val, folder):
                self.mlflow.artifact(artifact.path, f"samples/{artifact.kind}")

    # -- plumbing ----------------------------------------------------------------------------------
    def _open_logs(self) -> None:
        self.progress = Progress(
            self.stage.name, self.view.unit, self.state.step, self.parts.num_steps
        )
        self.metrics_log: MetricsLog | None = None
        self.mlflow: MlflowLog | None = None
        if self.is_main:
            content = self.config.model_dump(mode="json")
            self.metrics_log = MetricsLog(self.parts.folder.metrics_file, self.state.step)
            self.mlflow = MlflowLog(
                self.parts.folder.run, self.stage.name, self.state.mlflow_run_id, flatten(content)
            )
            self.mlflow.artifact(self.parts.folder.config_file, "config")
            print(f"{self.stage.name} {self.throughput.utilization.describe()}", flush=True)

    def _close_logs(self, status: str) -> None:
        self.profiler.discard()
        if self.metrics_log is not None:
            self.metrics_log.close()
        if self.mlflow is not None:
            self.mlflow.close(status)

    def _record(self, step: int, kind: str, metrics: dict[str, float]) -> None:
        if self.metrics_log is not None:
            self.metrics_log.write(step, kind, metrics)
        if self.mlflow is not None:
            self.mlflow.metrics(step, metrics)

    def _outside_of_rates(self, call: Any) -> None:
        start = time.perf_counter()
        call()
        self.progress.pause(time.perf_counter() - start)


def _model_prefix(stage: Stage, task: torch.nn.Module) -> str:
    """Where the exported model lies in the task module's parameter names."""
    model = stage.model(task)
    for name, module in task.named_modules():
        if module is model:
            return f"{name}." if name else ""
    raise AssertionError(f"stage {stage.name}: the model is no part of its task module")


def print_result(result: dict[str, Any]) -> None:
    """The result as the last line of standard output, for scripts."""
    print(json.dumps(result), flush=True)
