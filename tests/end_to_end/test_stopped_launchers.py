"""Killed and signaled launchers: two ranks save their state, and no process remains."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from muomni.checkpoint import file_list
from muomni.distributed.discovery import free_port

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
START_TIMEOUT_S, STOP_TIMEOUT_S = 240, 60

pytestmark = pytest.mark.slow


def launch(name: str, *arguments: str) -> "subprocess.Popen[bytes]":
    """Start two ranks in a session of their own, as a terminal does."""
    port = str(free_port())
    launchers = {
        "deepspeed": [BIN / "deepspeed", "--num_gpus", "2", "--master_port", port, "launch/train.py"],
        "torchrun": [BIN / "torchrun", "--nproc_per_node", "2", "--", "launch/train.py"],
        "muomni": [sys.executable, "-m", "muomni.cli", "train", "--ranks", "2"],
    }  # fmt: skip
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    return subprocess.Popen(
        [*map(str, launchers[name]), *arguments],
        cwd=ROOT, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "number", "target"),
    [
        ("deepspeed", signal.SIGTERM, "front end"),
        ("deepspeed", signal.SIGKILL, "front end"),
        ("deepspeed", signal.SIGKILL, "its child"),
        ("deepspeed", signal.SIGTERM, "its child"),
        ("deepspeed", signal.SIGHUP, "all"),
        ("deepspeed", signal.SIGINT, "all"),
        ("torchrun", signal.SIGKILL, "front end"),
        ("muomni", signal.SIGTERM, "front end"),
        ("muomni", signal.SIGKILL, "front end"),
    ],
)
def test_ranks_save_and_end(
    name: str, number: signal.Signals, target: str, text_data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    process = launch(
        name, "--stage", "thinker", "--data", str(text_data), "--run", str(run), "--max-steps", "5000",
        "training.log_every=1", "training.save_every=5000", "data.num_workers=1", "training.recorders=[]",
    )  # fmt: skip
    metrics = run / "thinker" / "metrics.jsonl"
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while not (metrics.exists() and metrics.read_text().count("\n") > 2):
        assert process.poll() is None and time.monotonic() < deadline_s
        time.sleep(0.2)
    top = psutil.Process(process.pid)
    tree = [top, *top.children(recursive=True)]
    if target == "all":
        os.killpg(process.pid, number)
    else:
        (top if target == "front end" else top.children()[0]).send_signal(number)
    process.wait(STOP_TIMEOUT_S)
    _, alive = psutil.wait_procs(tree, timeout=STOP_TIMEOUT_S)
    for left in alive:
        left.kill()
    assert not alive
    assert file_list.newest_complete(run / "thinker" / "checkpoints") is not None
    if name == "muomni" and number == signal.SIGTERM:
        assert process.returncode == 85
