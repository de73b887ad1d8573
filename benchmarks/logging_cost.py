"""CPU time that logging costs a run of 10 steps per second.

Reports the time of the training thread per step, which delays it, and that of MLflow's thread per second,
which competes with it for a core. CPU times depend little on what else the machine does.

    python benchmarks/logging_cost.py
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from muomni.observe.metrics_log import MetricsLog
from muomni.observe.mlflow_log import MlflowLog
from muomni.observe.recorder import RunInfo

STEP_S = 0.1
NUM_METRICS = 30  # as of a dense thinker


def measure(num_steps: int, log_every: int, run: Path) -> dict[str, float]:
    """Run `num_steps` steps after MLflow has started; returns percentages of their time."""
    (run / "thinker").mkdir(parents=True)
    info = RunInfo("thinker", "tokens", run, run / "thinker", {}, 0, num_steps)
    recorders: list[Any] = [MetricsLog(), MlflowLog()]
    for recorder in recorders:
        recorder.open(info)
    while recorders[1].run_id is None:
        time.sleep(0.1)
    values = {f"time/section{number}_s": number / 7 for number in range(NUM_METRICS - 1)}
    process, main = time.process_time(), time.thread_time()
    for step in range(1, num_steps + 1):
        for recorder in recorders if step % log_every == 0 else ():
            recorder.log(step, "train", {"loss": 1.0 / step, **values})
        time.sleep(STEP_S)
    main_s = time.thread_time() - main
    all_s = time.process_time() - process
    for recorder in recorders:
        recorder.close("FINISHED")
    return {
        "training_thread_percent": 100 * main_s / (num_steps * STEP_S),
        "mlflow_thread_percent": 100 * (all_s - main_s) / (num_steps * STEP_S),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--log-every", type=int, default=10, help="as training.log_every")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(arguments.steps, arguments.log_every, Path(folder) / "run")
    print(json.dumps({"log_every": arguments.log_every, **result}, indent=1))


if __name__ == "__main__":
    main()
