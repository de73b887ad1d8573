"""Run launch/train.py with steps of at least SLOW_STEP_S seconds, so a signal arrives mid-run."""

import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from muomni.cli import train
from muomni.training.loop import Loop

original = Loop._step


def slow_step(*arguments: object) -> None:
    time.sleep(float(os.environ["SLOW_STEP_S"]))
    original(*arguments)  # type: ignore[arg-type]


Loop._step = slow_step  # type: ignore[method-assign,assignment]
train.main_of_rank()
