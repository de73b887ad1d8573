"""Train all stages in order, each on the exports of the ones before, by the real command.

    python launch/pipeline.py --preset nano --data DIR --run DIR [-- key=value ...]

A stage that is finished is skipped, an interrupted one goes on, and one whose upstream was trained again
starts over. With --side-by-side N, up to N stages that need nothing of each other train at a time, each on
an equal share of the ranks. The first failure stops the rest. After "--", flags and key=value overrides go to
launch/train.py of every stage, STAGE.key=value to one stage. The last line of standard output is JSON.
"""

import argparse
import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from launch import train as train_command
from muomni.config.loading import did_you_mean, preset_names, read_yaml
from muomni.config.run import STAGE_NAMES, RunConfig
from muomni.errors import ConfigError, MuomniError, PreemptedError, exit_on_error
from muomni.observe.mlflow_log import flatten
from muomni.pipeline.graph import Needs, next_stage, stage_needs, trains_alone
from muomni.pipeline.local import (
    RunningRanks,
    count_ranks,
    num_gpus,
    on_stop_signal,
    rank_environment,
    train_argv,
)
from muomni.run_folder import RunFolder

ROOT = Path(__file__).resolve().parents[1]
FINISHED, OUTDATED, OPEN = "finished", "outdated", "open"
_POLL_S = 0.2


@dataclass(slots=True)
class StageResult:
    """One line of the table at the end."""

    status: str  # trained, kept (launch/train.py had nothing to do), or finished before
    duration_s: float
    step: int
    metrics: dict[str, float]


def parser() -> argparse.ArgumentParser:
    """The command line before "--"."""
    flags = argparse.ArgumentParser(
        prog="pipeline.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    presets = ", ".join(preset_names())
    flags.add_argument("--preset", default="nano", help=f"sizes: {presets} (nano)")
    flags.add_argument("--data", default="data/sample", help="folder of datasets (data/sample)")
    flags.add_argument("--run", type=Path, required=True, help="run folder of all stages")
    flags.add_argument(
        "--ranks", type=int, help="processes a stage (all GPUs; on a CPU 2, on one core 1)"
    )
    flags.add_argument(
        "--side-by-side", type=int, default=1, metavar="N",
        help="train up to N independent stages at a time, each on an N-th of the ranks (1)",
    )  # fmt: skip
    flags.add_argument("--stages", help=f"only these of {','.join(STAGE_NAMES)}, with commas")
    flags.add_argument(
        "--dry-run", action="store_true", help="say what would be done, with the commands"
    )
    flags.add_argument(
        "--slurm", action="store_true",
        help="submit the stages as jobs instead: slurm/pipeline.sh --help has more options",
    )  # fmt: skip
    return flags


def main() -> None:
    argv = sys.argv[1:]
    end = argv.index("--") if "--" in argv else len(argv)
    arguments, unknown = parser().parse_known_args(argv[:end])
    extra = argv[end + 1 :]
    with exit_on_error("pipeline"):
        stages = chosen_stages(arguments.stages)
        if arguments.slurm:
            submit(arguments, stages, unknown, extra)
        if unknown:
            raise ConfigError(
                f"unknown option {unknown[0]}; see --help, and put what is meant for train.py after --"
            )
        pipeline = Pipeline(arguments, extra)
        # All configs are resolved first: a mistake in the last one must not wait for the others.
        plans = {stage: pipeline.config(stage) for stage in stages}
        if arguments.dry_run:
            pipeline.describe(plans)
            return
        start = time.monotonic()
        results = pipeline.run(plans)
        print("\n" + table(results), flush=True)
        content = {
            "run": str(arguments.run),
            "duration_s": round(time.monotonic() - start, 1),
            "stages": {stage: asdict(result) for stage, result in results.items()},
        }
        print(json.dumps(content), flush=True)


def chosen_stages(text: str | None) -> list[str]:
    """The stages to run, in the order in which they build on each other; raises ConfigError."""
    names = STAGE_NAMES if text is None else [name.strip() for name in text.split(",")]
    for name in names:
        if name not in STAGE_NAMES:
            hint = did_you_mean(name, STAGE_NAMES)
            raise ConfigError(f"unknown stage '{name}'{hint}; stages: {', '.join(STAGE_NAMES)}")
    return [stage for stage in STAGE_NAMES if stage in names]


def arguments_for(stage: str, extra: list[str]) -> list[str]:
    """What of the arguments after "--" goes to a stage: STAGE.key=value to that stage only."""
    chosen = []
    for argument in extra:
        prefix, dot, rest = argument.partition(".")
        if not dot or prefix not in STAGE_NAMES:
            chosen.append(argument)
        elif prefix == stage:
            chosen.append(rest)
    return chosen


def submit(
    arguments: argparse.Namespace, stages: list[str], unknown: list[str], extra: list[str]
) -> None:
    """Become slurm/pipeline.sh."""
    script = str(ROOT / "slurm" / "pipeline.sh")
    argv = [script, "--preset", arguments.preset, "--data", arguments.data]
    argv += ["--run", str(arguments.run), "--stages", ",".join(stages), *unknown]
    if arguments.dry_run:
        argv.append("--dry-run")
    if arguments.ranks is not None:
        os.environ["MUOMNI_TASKS_PER_NODE"] = str(arguments.ranks)
    # The jobs run in the environment that this command was called in.
    os.environ.setdefault("MUOMNI_VENV", sys.prefix)
    sys.stdout.flush()
    os.execv(script, [*argv, "--", *extra])


@dataclass(slots=True)
class RunningStage:
    """A stage that trains at the moment, in one of the lanes that share the ranks."""

    stage: str
    ranks: RunningRanks
    slot: int
    reason: str  # why it is trained (again), for the end
    before: bytes | None  # its export when it began
    start: float


class Pipeline:
    """The stages of one run folder."""

    def __init__(self, arguments: argparse.Namespace, extra: list[str]) -> None:
        self.arguments, self.extra = arguments, extra
        self.folder: Path = arguments.run
        for option in ("ranks", "parallel_stages"):
            number = getattr(arguments, option)
            if number is not None and number < 1:
                name = option.replace("_", "-")
                raise ConfigError(f"--{name} {number} trains nothing; give at least 1")
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
        """Ranks of a stage, by its place among all stages alone: what resumes it needs as many again.

        Unless --ranks is given they are no more than can share the micro-batches of a step evenly.
        """
        num_ranks = self.num_ranks
        if self.num_slots > 1 and not trains_alone(stage, self.needs):
            num_ranks //= self.num_slots
        group = config.batch.micro_batches_per_step
        if group is None or self.arguments.ranks is not None:
            return num_ranks
        return max(number for number in range(1, num_ranks + 1) if group % number == 0)

    def train_arguments(self, stage: str) -> list[str]:
        """The arguments of launch/train.py."""
        given = ["--stage", stage, "--preset", self.arguments.preset, "--data", self.arguments.data]
        return [*given, "--run", str(self.folder), *arguments_for(stage, self.extra)]

    def config(self, stage: str) -> RunConfig:
        """The config that the stage will resolve; raises ConfigError."""
        return train_command.resolve_config(self._parsed(stage))

    def look_at(self, stage: str, config: RunConfig) -> tuple[str, str]:
        """The state of a stage and why; with --resume never or PATH nothing is finished."""
        if self._parsed(stage).resume != "auto":
            return OPEN, "because --resume asks for it"
        return look_at(self.folder, stage, config)

    def describe(self, plans: dict[str, RunConfig]) -> None:
        """Print the state of each stage and its command."""
        for stage, config in plans.items():
            state, why = self.look_at(stage, config)
            print(f"{stage}: {state}{f' ({why})' if why else ''}")
            if state != FINISHED:
                command = train_argv(self.ranks_of(stage, config), self._arguments(stage, state))
                print(f"  {' '.join(command)}")

    def run(self, plans: dict[str, RunConfig]) -> dict[str, StageResult]:
        """Train all stages that are not finished; raises MuomniError with the exit code of the first failure.

        The others that run then save their state and stop.
        """
        waiting = list(plans)
        results: dict[str, StageResult] = {}
        with on_stop_signal(self._stop):
            try:
                while waiting or self._running:
                    self._start_what_can(waiting, plans, results)
                    results |= self._ended()
                    time.sleep(_POLL_S if self._running else 0)
            except MuomniError:
                self._stop_others()
                raise
            finally:  # this process fails: leave no ranks behind
                for running in self._running:
                    running.ranks.kill()
        return {stage: results[stage] for stage in plans}

    def _start_what_can(
        self, waiting: list[str], plans: dict[str, RunConfig], results: dict[str, StageResult]
    ) -> None:
        """Fill the free lanes; a finished stage takes none."""
        while waiting and len(self._running) < self.num_slots:
            if self._is_stopped:
                raise PreemptedError(
                    f"stopped before stage {waiting[0]}; the same command goes on from here"
                )
            stage = waiting[0]
            if self.num_slots > 1:
                running = [running.stage for running in self._running]
                chosen = next_stage(waiting, running, self.needs)
                if chosen is None:
                    return
                stage = chosen
            waiting.remove(stage)
            state, why = self.look_at(stage, plans[stage])
            if state == FINISHED:
                folder = RunFolder(self.folder, stage)
                print(f"{stage}: finished before, see {folder.export}", flush=True)
                results[stage] = finished_result(folder)
            else:
                reason = f", {why}" if why else ""
                self._running.append(self._start(stage, plans[stage], state, reason))

    def _start(self, stage: str, config: RunConfig, state: str, reason: str) -> RunningStage:
        folder, num_ranks = RunFolder(self.folder, stage), self.ranks_of(stage, config)
        folder.create()
        log = folder.root / "train.log"
        ranks_word = "rank" if num_ranks == 1 else "ranks"
        print(f"\n== {stage}: {num_ranks} {ranks_word}, log {log}{reason}", flush=True)
        before, start = published(folder), time.monotonic()
        taken = {running.slot for running in self._running}
        slot = next(slot for slot in range(self.num_slots) if slot not in taken)
        shares_gpus = self.num_slots > 1 and num_gpus() > 0
        first_gpu = slot * (self.num_ranks // self.num_slots) if shares_gpus else None
        command = train_argv(num_ranks, self._arguments(stage, state), first_gpu)
        prefix = f"[{stage}] " if self.num_slots > 1 else ""
        ranks = RunningRanks(command, log, rank_environment(self.num_ranks), prefix)
        return RunningStage(stage, ranks, slot, reason, before, start)

    def _ended(self) -> dict[str, StageResult]:
        """The results of the stages that have ended by now; raises MuomniError for a failed one."""
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
                f"stage {stage} was stopped; the same command goes on from the state that it saved"
            )
        if code != 0:
            error = MuomniError(
                f"stage {stage} failed with exit code {code}; its log is {folder.root / 'train.log'}: "
                f"mend what its end says and give the same command again"
            )
            error.exit_code = code if 0 < code < 256 else 1
            raise error
        result = finished_result(folder)
        result.status, result.duration_s = "trained", round(time.monotonic() - running.start, 1)
        if published(folder) == running.before:
            result.status = "kept"
            print(
                f"{stage}: kept as it was{running.reason}; to train it again: -- --resume never",
                flush=True,
            )
        return result

    def _stop(self) -> None:
        self._is_stopped = True
        for running in self._running:
            running.ranks.stop()

    def _stop_others(self) -> None:
        """Let the stages that still run save and stop, and wait for them."""
        for running in self._running:
            print(f"{running.stage}: its ranks save and stop", flush=True)
            running.ranks.stop()
        while any(running.ranks.poll() is None for running in self._running):
            time.sleep(_POLL_S)

    def _parsed(self, stage: str) -> argparse.Namespace:
        return train_command.parser().parse_intermixed_args(self.train_arguments(stage))

    def _arguments(self, stage: str, state: str) -> list[str]:
        return self.train_arguments(stage) + (["--resume", "never"] if state == OUTDATED else [])


def look_at(run: Path, stage: str, config: RunConfig) -> tuple[str, str]:
    """Whether a stage is finished, outdated or open, and why, without starting it.

    Finished: its export is whole, and config, data, tokenizer and upstream exports are those it came
    from. Outdated: an upstream stage was trained again since it began. Everything else is open:
    launch/train.py decides.
    """
    folder = RunFolder(run, stage)
    if folder.config_file.is_file():
        begun_with = read_yaml(folder.config_file).get("upstream_digests", {})
        changed = changed_upstream(run, begun_with)
        if changed:
            return OUTDATED, f"because {', '.join(changed)} was trained again"
    if not (folder.export / "export.json").is_file():
        return OPEN, ""
    # Imports torch, which a first run of the pipeline does not need.
    from muomni.checkpoint.export import read_export

    try:
        export = read_export(folder.export, stage)
        settings = changed_settings(export.content["config"], config)
        if settings:
            return OPEN, f"because of another {', '.join(settings)}"
        if changed_upstream(run, export.content["upstream"]):
            return OPEN, "because it is not finished with the new upstream"
        if not has_same_data(config, export.content["data"], export.tokenizer_digest):
            return OPEN, "because of other data or another tokenizer"
    except MuomniError as error:
        return OPEN, f"because {error}"
    except KeyError as error:
        return OPEN, f"because its export, an old one, does not tell its {error.args[0]}"
    return FINISHED, ""


def changed_settings(before: dict[str, Any], config: RunConfig) -> list[str]:
    """The keys, like optim.lr, of which an export was trained with other values."""
    old, new = flatten(before), flatten(config.model_dump(mode="json"))
    return sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))


def changed_upstream(run: Path, digests: dict[str, str]) -> list[str]:
    """The stages whose exports in `run` are no longer those with these digests."""
    changed = []
    for stage, digest in digests.items():
        manifest = RunFolder(run, stage).export / "export.json"
        if manifest.is_file():
            hashes = json.loads(manifest.read_text(encoding="utf-8"))["sha256"]
            if hashes["model.safetensors"] != digest:
                changed.append(stage)
    return changed


def has_same_data(config: RunConfig, data: dict[str, Any], tokenizer_digest: str) -> bool:
    """Whether the datasets and the tokenizer are still those of an export; raises DataError."""
    from muomni.data.loading.stream import fingerprint, stream_shards
    from muomni.data.shards.datasets import open_datasets, open_tokenizer
    from muomni.data.shards.source import Source

    if (stream := config.data.stream) is not None:
        now = fingerprint(stream_shards(stream.shards, stream.samples_per_shard))
    else:
        now = Source(open_datasets(config.data, data["tasks"]), "train").fingerprint
    return now == data["fingerprint"] and open_tokenizer(config.data).digest == tokenizer_digest


def published(folder: RunFolder) -> bytes | None:
    """What names the present export of a stage, None without one."""
    manifest = folder.export / "export.json"
    return manifest.read_bytes() if manifest.is_file() else None


def finished_result(folder: RunFolder) -> StageResult:
    """The metrics that a finished stage wrote beside its export."""
    step = json.loads((folder.export / "export.json").read_text(encoding="utf-8"))["step"]
    metrics = json.loads((folder.export / "metrics.json").read_text(encoding="utf-8"))
    return StageResult("finished before", 0.0, step, metrics)


def table(results: dict[str, StageResult]) -> str:
    """Durations and held-out metrics, a line a stage."""
    rows = [("stage", "", "time", "steps", "validation")]
    for stage, result in results.items():
        metrics = [
            f"{name.removeprefix('val/')} {value:.4g}" for name, value in result.metrics.items()
        ]
        minutes, seconds = divmod(round(result.duration_s), 60)
        rows.append(
            (
                stage,
                result.status,
                f"{minutes}:{seconds:02d}",
                f"{result.step:,}",
                "  ".join(metrics),
            )
        )
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


if __name__ == "__main__":
    main()
