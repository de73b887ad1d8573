"""Stage-agnostic training loop."""

import itertools
import math
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch

from muomni.checkpoint.store import Topology, TrainState
from muomni.config.loading import RESOLVED
from muomni.data.loading.bad_samples import BadSampleBudget
from muomni.data.loading.loader import CountedBatches, DeviceCopies
from muomni.data.shards.source import Source
from muomni.data.views.base import Batch
from muomni.distributed import collectives
from muomni.errors import DataError, NonFiniteError, PreemptedError, StorageError
from muomni.observe.announce import Startup, row
from muomni.observe.recorder import Kind, Recorder, RunInfo, Status
from muomni.run_folder import RunFolder
from muomni.run_lock import free_folders
from muomni.training.checkpointing import Checkpoints, export_stage
from muomni.training.engine.engine import Engine
from muomni.training.feed import Feed
from muomni.training.guard import Guard, ScaleWatch, StopFlag
from muomni.training.optim.schedule import lr_factor
from muomni.training.outputs import Sums
from muomni.training.postmortem import PostMortem
from muomni.training.stage import Stage
from muomni.training.step_reduction import RunningSums, StepReduction
from muomni.training.throughput import Throughput
from muomni.training.validation import SplitBatches, subset_batches, validate


@dataclass(slots=True)
class LoopParts:
    """The parts of a loop; each is built and tested on its own."""

    stage: Stage
    engine: Engine
    feed: Feed
    val: Source | None
    folder: RunFolder
    device: torch.device
    num_steps: int
    topology: Topology
    resolved: dict[str, Any]  # facts to record, see RunFolder.write_config
    resume: str = "auto"
    quiet: bool = False  # print nothing
    startup: Startup = field(default_factory=Startup)


class StepResult(NamedTuple):
    """Outcome of an optimizer step, equal on all ranks."""

    step: int  # finished steps
    stop_agreed: bool  # some rank wanted to stop at the start of the step
    num_bad_steps: int  # consecutive steps with non-finite gradients before this one


def _with_rank_local_errors(loader: CountedBatches) -> Generator[Batch, None, None]:
    """The loader's batches; mark its errors, since each rank reads different samples."""
    try:
        yield from loader
    except DataError as error:
        local = DataError(f"rank {collectives.rank()}: {error}")
        local.is_rank_local = True
        raise local from error


class Loop:
    """Trains one stage from its state to `num_steps`, then writes the export.

    `recorders` get metrics on rank 0; all other ranks have none.
    """

    def __init__(self, parts: LoopParts, state: TrainState, recorders: list[Recorder]) -> None:
        self.parts = parts
        self.state = state
        self.recorders: list[Recorder] = recorders
        self.stage, self.engine, self.config = parts.stage, parts.engine, parts.stage.config
        self.is_main = collectives.rank() == 0
        self.unit = self.stage.view().unit
        self.last_metrics: dict[str, float] = {}
        # Called at each validation with the engine, the step, and the seconds that validation took.
        self.sampler: Callable[[Engine, int, float], None] | None = None
        self.loader = parts.feed.loader(state.step)
        self.throughput = Throughput(
            self.stage, self.engine, parts.folder.root, parts.device, state.step
        )
        self.checkpoints = Checkpoints(
            self.engine, parts.folder.checkpoints, parts.topology, self.config.training.keep_last,
            state.step,
        )  # fmt: skip
        self._guard = Guard(self.engine.precision, self.config.fp16)
        self._scale_watch = ScaleWatch(self.config.fp16)
        self._loss_weights = self.stage.loss_weights()
        self._step_reduction = StepReduction(self.stage, parts.device)
        self._bad_samples = BadSampleBudget(
            self.config.data.max_bad_fraction, parts.feed.num_samples
        )
        self._copies = DeviceCopies(parts.device)
        self._batches = _with_rank_local_errors(self.loader)
        self._logs = RunningSums()
        self._val_batches: SplitBatches | None = None

    def run(self) -> dict[str, Any]:
        """Train to the end; returns the result that is printed as the last line.

        Raises PreemptedError after a signal (state saved), NonFiniteError for gradients or a loss that stay
        non-finite (state saved, step diagnosed) or weights (not saved), DataError, and StorageError.
        """
        self.open()
        status: Status = "FAILED"
        do_all_ranks_stop = False
        try:
            with StopFlag().installed() as stop:
                self.train(stop)
            result = self._finish()
            status = "FINISHED"
            return result
        except PreemptedError:
            status, do_all_ranks_stop = "KILLED", True
            raise
        except (NonFiniteError, DataError, StorageError) as error:
            do_all_ranks_stop = not error.is_rank_local
            raise
        finally:
            self.close(status)
            if do_all_ranks_stop:
                # Launchers kill all ranks when the first one exits with an error; rank 0 must be the last.
                collectives.barrier()

    def open(self) -> None:
        """Open the recorders, and measure rates from now on."""
        for recorder in self.recorders:
            recorder.open(self.run_info())
            recorder.artifact(self.parts.folder.config_file, "config")
        has_peak = self.throughput.utilization.peak is not None
        if self.is_main and not self.parts.quiet and (has_peak or self.parts.device.type == "cuda"):
            print(row("mfu", self.throughput.utilization.describe()), flush=True)
        self.throughput.start(self.state.step)

    def close(self, status: Status) -> None:
        self._batches.close()  # ends the loader's workers
        self.throughput.profiler.discard()
        for recorder in self.recorders:
            recorder.close(status)

    def train(self, stop: StopFlag) -> None:
        """Train to the last step, with logs, validation, and checkpoints when they are due."""
        self.engine.train()
        settings, profiler = self.config.training, self.throughput.profiler
        while self.state.step < self.parts.num_steps:
            if profiler.is_due(self.state.step):
                with self.throughput.paused("other"):
                    profiler.turn(self.state.step)
            step, stop_agreed, num_bad_steps = self.train_step(bool(stop))
            self.parts.startup.finish()
            reason = self._guard.check_gradients(step - 1, num_bad_steps)
            if reason is not None:
                self._stop_non_finite(step - 1, reason)
            is_last = step == self.parts.num_steps
            if step % settings.log_every == 0 or is_last:
                with self.throughput.clock.section("logging"):
                    self.log()
            if step % settings.validate_every == 0 and not is_last:
                with self.throughput.paused("validation"):
                    self.validate()
            if step % settings.save_every == 0 and not is_last:
                with self.throughput.paused("save"):
                    self.save()
            if stop_agreed and not is_last:
                folder = self.save()
                raise PreemptedError(
                    f"stopped by {stop.signal_name or 'a signal to another rank'} after step {step}; "
                    f"the state is in {folder}: rerun the same command to continue"
                )
        profiler.finish(self.state.step)

    def train_step(self, wants_stop: bool = False) -> StepResult:
        """Run one optimizer step on the next micro-batches; every rank must call it.

        `wants_stop` asks all ranks to stop after the step.
        """
        self.parts.feed.count_ahead(self.state.step, self.parts.num_steps)
        mark = self.throughput.clock.mark
        micro_batches: list[Batch] = []
        mark("data_wait")
        num_micro_batches = self.parts.feed.num_micro_batches(self.state.step)
        for batch in itertools.islice(self._batches, num_micro_batches):
            mark("forward")
            micro_batches.append(self._prepare(batch))
            mark("data_wait")
        mark("forward")
        num_samples, bad = self.loader.take_read()
        self._step_reduction.start(
            micro_batches, wants_stop, self.engine.num_bad_steps, num_samples, len(bad)
        )
        micro_batches = self.stage.begin_step(self.engine.forward, micro_batches)
        factor = lr_factor(self.state.step, self.parts.num_steps, self.config.optim)
        sums: Sums = {}
        for number, batch in enumerate(micro_batches, start=1):
            mark("forward")
            output = self.engine.forward(batch)
            mark("communication")
            denominators = self._step_reduction.denominators()
            mark("backward")
            is_last = number == num_micro_batches
            self.engine.backward(output, denominators, self._loss_weights, is_last)
            mark("optimizer")
            self.engine.end_micro_step(factor)
            self.throughput.count_units(batch)
            self._logs.add(output.logs)
            for name, value in output.state.items():
                sums[name] = sums[name] + value if name in sums else value
        self.state = replace(self.state, step=self.state.step + 1)
        reduction = self._step_reduction
        if self._bad_samples.count_step(*reduction.num_samples(), bad, collectives.gather_objects):
            self.engine.masters.update_average(self.state.step)
            self.stage.after_step(self.engine.task, sums, self.state.step)
        else:  # no rank had a usable sample: the engine skipped the step, but its gradients were not bad
            self.engine.num_bad_steps = 0
        mark("other")
        return StepResult(self.state.step, reduction.stop_agreed(), reduction.num_bad_steps())

    def log(self) -> None:
        """Record the metrics since the last call, if any; every rank must call it. Stops a non-finite run."""
        if not self._bad_samples.take_num_usable():
            return
        step, optim = self.state.step, self.config.optim
        measured = self.throughput.take(step, self.loader, self.parts.feed.dataset_names)
        self.state = replace(self.state, units_seen=self.state.units_seen + measured.units)
        metrics = self.stage.metrics(self._logs.take()) | measured.metrics
        metrics["lr"] = optim.lr * lr_factor(step - 1, self.parts.num_steps, optim)
        metrics["grad_norm"] = self.engine.grad_norm
        metrics[f"{self.unit}_seen"] = self.state.units_seen
        metrics |= self._bad_samples.metrics()
        num_skipped = self.engine.count_skipped()
        metrics["num_skipped"] = float(num_skipped)
        if self.engine.precision == "fp16":
            metrics |= self._scale_watch.check(step, self.engine.loss_scale, num_skipped)
        self._record("train", metrics)
        reason = self._guard.check_loss(step, metrics["loss"])
        if reason is not None:
            self._stop_non_finite(self._guard.suspect(step), reason)

    def validate(self) -> None:
        """Record metrics of the validation split, if any, and save the best checkpoint."""
        if self.parts.val is None:
            return
        if self._val_batches is None:  # lengths may be slow to measure
            self._val_batches = subset_batches(self.stage, self.parts.val, self.parts.device)
        batches = self._val_batches
        with self.engine.evaluation():
            start_s = time.monotonic()
            metrics = validate(self.stage, self.engine.forward, batches, batches.group_size)
            if self.sampler is not None:
                self.sampler(self.engine, self.state.step, time.monotonic() - start_s)
        self.last_metrics = {f"val/{name}": value for name, value in metrics.items()}
        self._record("val", self.last_metrics)
        value = metrics.get(self.stage.best_metric, math.nan)
        # Values on other samples, before a resume with other settings, are not comparable.
        best = self.state.best if self.state.best_of == batches.digest else None
        if self.stage.is_better(value, best):
            self.state = replace(self.state, best=value, best_of=batches.digest)
            self.save()
            self.checkpoints.mark_best(self.state.step)

    def save(self, *, prune: bool = True, reason: str = "") -> Path:
        """Save a checkpoint of this step, see `Checkpoints.save`; returns its folder."""
        units_seen = self.state.units_seen + self.throughput.units_since_log()
        return self.checkpoints.save(replace(self.state, units_seen=units_seen), prune, reason)

    def run_info(self) -> RunInfo:
        """Facts about the run as it is now, to open recorders with."""
        folder = self.parts.folder
        content = {**self.config.model_dump(mode="json"), RESOLVED: self.parts.resolved}
        return RunInfo(
            self.stage.name, self.unit, folder.run, folder.root, content, self.state.step,
            self.parts.num_steps, self.parts.resume,
            lambda: (self.state.step, self.throughput.clock.current),
            lambda: free_folders(folder.run),
        )  # fmt: skip

    def _finish(self) -> dict[str, Any]:
        """Validate, save, and export; returns the result."""
        section = self.throughput.clock.section
        with section("validation"):
            self.validate()
        with section("save"):
            self.save()
        with section("export"), collectives.writing(f"export {self.parts.folder.export}"):
            export_stage(
                self.stage, self.engine, self.parts.folder, self.state.step,
                self.parts.feed.fingerprint, self.last_metrics, self.parts.resolved,
            )  # fmt: skip
        text, throughput = self.throughput.utilization.summary()
        if self.is_main and text and not self.parts.quiet:
            print(f"{self.stage.name} {text}", flush=True)
        return {
            "stage": self.stage.name, "step": self.state.step, **self.last_metrics, **throughput,
            "export": str(self.parts.folder.export),
        }  # fmt: skip

    def _stop_non_finite(self, step: int, reason: str) -> NoReturn:
        """Save finite weights, diagnose `step`, and raise NonFiniteError; every rank must call it."""
        # Older checkpoints stay: they are from before the fault, and there may be many restarts.
        saved = self.save(prune=False, reason=reason)
        examiner = PostMortem(self.stage, self.engine, self.parts.feed, self.parts.folder)
        raise NonFiniteError(
            f"{reason}; in step {step} {examiner.examine(step)}; the weights before it are saved in {saved}; "
            f"{self._guard.advice}"
        )

    def _prepare(self, batch: Batch) -> Batch:
        self.throughput.count_flops(batch)
        with torch.no_grad():
            return self.stage.prepare(self._copies(batch))

    def _record(self, kind: Kind, metrics: dict[str, float]) -> None:
        for recorder in self.recorders:
            recorder.log(self.state.step, kind, metrics)
