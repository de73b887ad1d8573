"""`muomni sync-mlflow`: bring the MLflow runs of a run folder up to date with its files."""

import argparse

from muomni.command_line import add_logging_options, configure_logging, path

SUMMARY = """\
Send to MLflow what it lacks of a run: metrics, parameters, samples, evaluations, and exports.

A stage whose MLflow run is lost gets a new one. One that contradicts metrics.jsonl is replaced; the old one is
in MLflow's trash. The store is MLFLOW_TRACKING_URI, or mlflow.db beside the run folder."""
EXAMPLES = (
    "muomni sync-mlflow runs/first",
    "MLFLOW_TRACKING_URI=http://HOST:5000 muomni sync-mlflow runs/first --stage thinker",
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the run and the stage."""
    parser.add_argument("run", type=path, help="run folder")
    parser.add_argument("--stage", help="one stage (default: all stages of the run)")
    add_logging_options(parser)


def run(arguments: argparse.Namespace) -> None:
    """Synchronize each stage and print what was done; raises MuomniError."""
    configure_logging(arguments)
    from muomni.config.registry import STAGES, stage_spec
    from muomni.errors import ConfigError, MachineError
    from muomni.observe.tracking.store import reason_of
    from muomni.observe.tracking.sync import sync
    from muomni.run_folder import RunFolder
    from muomni.run_lock import held_by_this_process

    wanted = list(STAGES) if arguments.stage is None else [stage_spec(arguments.stage).name]
    folders = [RunFolder(arguments.run, stage) for stage in wanted]
    folders = [folder for folder in folders if folder.metrics_file.is_file()]
    if not folders:
        what = (
            "no stage with metrics.jsonl" if arguments.stage is None else "no metrics.jsonl of it"
        )
        raise ConfigError(f"{arguments.run} has {what}; pass a run folder that was trained in")
    for folder in folders:
        if not folder.config_file.is_file():
            raise ConfigError(f"{folder.config_file} is missing; restore it")
        with held_by_this_process(folder.root):
            try:
                done = sync(folder.run, folder.stage)
            except Exception as error:  # MLflow and its stores raise anything
                raise MachineError(
                    f"MLflow failed ({reason_of(error)}); run this again when it can be reached"
                ) from None
        lines = "1 line" if done.num_lines == 1 else f"{done.num_lines} lines"
        print(f"{folder.stage}: {done.action}, {lines} sent, {done.link}", flush=True)
