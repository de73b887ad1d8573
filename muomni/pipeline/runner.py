"""Train the stages of a run folder in dependency order, each with the training command."""

import argparse
import shlex
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from muomni.command_line import logging_arguments
from muomni.config.arguments import arguments_for, parse_train, resolve_train
from muomni.config.run import RunConfig
from muomni.distributed.deepspeed_import import import_deepspeed
from muomni.errors import ConfigError, MuomniError, PreemptedError
from muomni.io.table import format_table
from muomni.observe.announce import BANNER_PRINTED, IN_PIPELINE
from muomni.observe.tracking.sync import end_killed
from muomni.pipeline.graph import Needs, next_stage, stage_needs, trains_alone
from muomni.pipeline.local import (
    POLL_S,
    RunningRanks,
    count_ranks,
    on_stop_signal,
    rank_environment,
    shareable_ranks,
    train_argv,
)
from muomni.pipeline.state import (
    StageResult,
    State,
    finished_result,
    published,
    stage_state,
)
from muomni.run_folder import RunFolder


@dataclass(slots=True)
class RunningStage:
    """A stage in training; `slot` is its share of the ranks."""

    stage: str
    ranks: RunningRanks
    slot: int
    before: bytes | None  # identifies its export at the start
    start: float


class Pipeline:
    """The stages of one run folder.

    `extra` holds arguments of the training command: flags and `key=value` go to every stage, `STAGE.key=value`
    to one.
    """

    def __init__(self, arguments: argparse.Namespace, extra: list[str]) -> None:
        self.arguments, self.extra = arguments, extra
        self.folder: Path = arguments.run
        self._running: list[RunningStage] = []
        self._is_stopped = False

    @cached_property
    def num_ranks(self) -> int:
        return self.arguments.ranks or count_ranks()

    @cached_property
    def num_slots(self) -> int:
        return min(self.arguments.parallel_stages, self.num_ranks)

    @cached_property
    def needs(self) -> Needs:
        return stage_needs()

    def ranks_of(self, stage: str, config: RunConfig) -> int:
        """Number of ranks of a stage, the same on each call, since resuming needs the same number.

        Unless --ranks is set, it divides the micro-batches of a step.
        """
        num_ranks = self.num_ranks
        if self.num_slots > 1 and not trains_alone(stage, self.needs):
            num_ranks //= self.num_slots
        return num_ranks if self.arguments.ranks else shareable_ranks(config, num_ranks)

    def configs(self, stages: list[str]) -> dict[str, RunConfig]:
        """Resolve the configs of the stages; raises one ConfigError for all of them."""
        configs, errors = {}, []
        for stage in stages:
            try:
                configs[stage] = resolve_train(self._parsed(stage))
            except ConfigError as error:
                errors.append(f"{stage}: {error}")
        if len(errors) > 1:
            errors.insert(0, f"{len(errors)} stages have an invalid config")
        if errors:
            raise ConfigError("\n  ".join(errors))
        return configs

    def check(self, configs: dict[str, RunConfig]) -> None:
        """Run the checks that need no exports for all stages; raises ConfigError."""
        import_deepspeed()
        from muomni.training import preflight
        from muomni.training.engine.ds_config import read_engine_json

        for stage, config in configs.items():
            engine_json = read_engine_json(self._parsed(stage).deepspeed_config)
            num_ranks = self.ranks_of(stage, config)
            try:
                preflight.check(preflight.Candidate(config, engine_json, num_ranks))
            except ConfigError as error:
                raise ConfigError(f"{stage}: {error}") from None

    def state(self, stage: str, config: RunConfig) -> tuple[State, str]:
        """Return the state of a stage and the reason; with --resume never or PATH, it is open."""
        if RunFolder(self.folder, stage).resume_now(self._parsed(stage).resume) != "auto":
            return "open", "because of --resume"
        return stage_state(self.folder, stage, config)

    def describe(self, configs: dict[str, RunConfig]) -> None:
        """Print the state of each stage and its command."""
        for stage, config in configs.items():
            state, why = self.state(stage, config)
            print(f"{stage}: {state}{f' ({why})' if why else ''}")
            if state != "finished":
                command = train_argv(self.ranks_of(stage, config), self._arguments(stage, state))
                print(f"  {shlex.join(command)}")

    def run(self, configs: dict[str, RunConfig]) -> dict[str, StageResult]:
        """Train all stages that are not finished; raises MuomniError with the exit code of the first failure.

        After a failure, the other running stages save their state and stop.
        """
        waiting = list(configs)
        results: dict[str, StageResult] = {}
        with on_stop_signal(self._stop):
            try:
                while waiting or self._running:
                    self._fill_slots(waiting, configs, results)
                    results |= self._ended()
                    time.sleep(POLL_S if self._running else 0)
            except MuomniError:
                self._stop_others()
                raise
            finally:  # leave no ranks behind if this process fails
                for running in self._running:
                    running.ranks.kill()
        return {stage: results[stage] for stage in configs}

    def _fill_slots(
        self, waiting: list[str], configs: dict[str, RunConfig], results: dict[str, StageResult]
    ) -> None:
        """Start stages in the free slots; finished stages need none."""
        while waiting and len(self._running) < self.num_slots:
            if self._is_stopped:
                raise PreemptedError(
                    f"stopped before stage {waiting[0]}; rerun the same command to continue"
                )
            stage = waiting[0]
            if self.num_slots > 1:
                running = [running.stage for running in self._running]
                chosen = next_stage(waiting, running, self.needs)
                if chosen is None:
                    return
                stage = chosen
            waiting.remove(stage)
            state, why = self.state(stage, configs[stage])
            if state == "finished":
                folder = RunFolder(self.folder, stage)
                print(f"{stage}: finished before, see {folder.export}", flush=True)
                results[stage] = finished_result(folder)
            else:
                reason = f", {why}" if why else ""
                self._running.append(self._start(stage, configs[stage], state, reason))

    def _start(self, stage: str, config: RunConfig, state: State, reason: str) -> RunningStage:
        folder, num_ranks = RunFolder(self.folder, stage), self.ranks_of(stage, config)
        folder.create()
        log = folder.log
        ranks_word = "rank" if num_ranks == 1 else "ranks"
        if not self.arguments.quiet:
            print(f"\n== {stage}: {num_ranks} {ranks_word}, log {log}{reason}", flush=True)
        before, start = published(folder), time.monotonic()
        taken = {running.slot for running in self._running}
        slot = next(slot for slot in range(self.num_slots) if slot not in taken)
        first_gpu = slot * (self.num_ranks // self.num_slots)
        command = train_argv(num_ranks, self._arguments(stage, state))
        environ = rank_environment(num_ranks, first_gpu, self.num_ranks)
        environ |= {BANNER_PRINTED: "1", IN_PIPELINE: "1"}
        prefix = f"[{stage}] " if self.num_slots > 1 else ""
        ranks = RunningRanks(command, log, environ, prefix)
        return RunningStage(stage, ranks, slot, before, start)

    def _ended(self) -> dict[str, StageResult]:
        """Return the results of ended stages; raises MuomniError if one failed."""
        results = {}
        for running in list(self._running):
            code = running.ranks.poll()
            if code is not None:
                self._running.remove(running)
                results[running.stage] = self._result(running, code)
        return results

    def _result(self, running: RunningStage, code: int) -> StageResult:
        stage, folder = running.stage, RunFolder(self.folder, running.stage)
        if code == PreemptedError.exit_code:
            raise PreemptedError(
                f"stage {stage} was stopped and saved its state; rerun the same command to continue"
            )
        if code != 0:
            end_killed(self.folder, stage)
            error = MuomniError(
                f"stage {stage} failed with exit code {code}; fix the error at the end of "
                f"{folder.log}, then rerun the same command"
            )
            error.exit_code = code if 0 < code < 256 else 1
            raise error
        result = finished_result(folder)
        result.status, result.duration_s = "trained", round(time.monotonic() - running.start, 1)
        if published(folder) == running.before:
            result.status = "kept"
            print(
                f"{stage}: nothing to train, export kept; to retrain it, add -- --resume never",
                flush=True,
            )
        return result

    def _stop(self) -> None:
        self._is_stopped = True
        for running in self._running:
            running.ranks.stop()

    def _stop_others(self) -> None:
        """Make the running stages save and stop, and wait for them."""
        for running in self._running:
            print(f"{running.stage}: its ranks save and stop", flush=True)
            running.ranks.stop()
        while any(running.ranks.poll() is None for running in self._running):
            time.sleep(POLL_S)

    def _parsed(self, stage: str) -> argparse.Namespace:
        return parse_train(self._train_arguments(stage))

    def _arguments(self, stage: str, state: State) -> list[str]:
        arguments = self._train_arguments(stage)
        return arguments + (["--resume", "never"] if state == "outdated" else [])

    def _train_arguments(self, stage: str) -> list[str]:
        common = [
            "--stage",
            stage,
            "--preset",
            self.arguments.preset,
            "--data",
            self.arguments.data,
        ]
        common += ["--run", str(self.folder), *logging_arguments(self.arguments)]
        return [*common, *arguments_for(stage, self.extra)]


def results_table(results: dict[str, StageResult]) -> str:
    """Format durations and validation metrics, one line per stage."""
    rows = []
    for stage, result in results.items():
        minutes, seconds = divmod(round(result.duration_s), 60)
        metrics = [
            f"{name.removeprefix('val/')} {value:.4g}" for name, value in result.metrics.items()
        ]
        steps = f"{result.step:,}"
        rows.append([stage, result.status, f"{minutes}:{seconds:02d}", steps, "  ".join(metrics)])
    return format_table(["stage", "", "time", "steps", "validation"], rows)
