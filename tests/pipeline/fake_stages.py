"""Fake stages, whose launcher is a small Python program, to test the pipeline without training."""

import sys
from pathlib import Path

import pytest

from muomni.cli.pipeline import main
from muomni.config.loading import resolve
from muomni.config.run import RunConfig
from muomni.pipeline import runner

# Simulates deepspeed: an outer launcher, an inner one, and a rank that saves on SIGTERM, or dies of it before
# its handler is installed.
HANDLER = "signal.signal(15, lambda *_: sys.exit(85)); "
RANK = "import signal, sys, time; {handler}print('up', flush=True); time.sleep(60)"
LAUNCHER = "import subprocess, sys; sys.exit(subprocess.call([sys.executable, '-c', {below!r}]))"


def config_of(stage: str, data: Path, **optim: float) -> RunConfig:
    return resolve(stage, "nano", None, {"data": {"root": str(data)}, "optim": optim})


class Fake(runner.Pipeline):
    """A pipeline of two stages whose launcher is a small Python program."""

    programs: dict[str, str]

    def _arguments(self, stage: str, state: str) -> list[str]:
        return [stage]


def use_fake_stages(monkeypatch: pytest.MonkeyPatch, programs: dict[str, str]) -> None:
    def argv(num_ranks: int, arguments: list[str]) -> list[str]:
        return [sys.executable, "-c", programs[arguments[0]]]

    monkeypatch.setattr(runner, "Pipeline", Fake)
    monkeypatch.setattr(runner, "train_argv", argv)


def run_main(*arguments: str) -> int:
    try:
        main(list(arguments), "pipeline.py")
    except SystemExit as stop:
        return int(str(stop.code))
    return 0


def launcher_of(rank: str) -> str:
    return LAUNCHER.format(below=LAUNCHER.format(below=rank))
