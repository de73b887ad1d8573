"""Run launch/train.py with steps of at least SLOW_STEP_S seconds, so a signal arrives mid-run."""

import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from muomni.cli import train
from muomni.training.loop import Loop, StepResult

train_step = Loop.train_step


def slow_step(loop: Loop, wants_stop: bool = False) -> StepResult:
    time.sleep(float(os.environ["SLOW_STEP_S"]))
    return train_step(loop, wants_stop)


Loop.train_step = slow_step  # type: ignore[method-assign]
train.main_of_rank()
