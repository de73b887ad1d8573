"""Environment of ranks, and ranks that stop when a launcher above them is killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from muomni.distributed import launcher
from muomni.distributed.discovery import Ranks
from muomni.distributed.launcher import set_defaults, stop_signals

ROOT = Path(__file__).resolve().parents[2]
TWO_RANKS = Ranks(0, 0, 2, "environment")
PARENT = """\
import os, subprocess, sys
print(os.getpid(), flush=True)
if {exports}:
    os.environ["MUOMNI_LAUNCHER_PID"] = str(os.getpid())
sys.exit(subprocess.call({command!r}))
"""
RANK = """\
import os, signal, time
from muomni.distributed.launcher import watch_launchers
signal.signal(signal.SIGTERM, lambda *_: (print("stopped", flush=True), os._exit(85)))
watch_launchers(os.environ)
print(os.getpid(), flush=True)
time.sleep(30)
"""


def test_ranks_share_the_cores_of_their_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    environ = {"LOCAL_SIZE": "2"}
    set_defaults(Ranks(0, 0, 4, "environment"), environ)
    assert environ["OMP_NUM_THREADS"] == "4"
    environ = {"OMPI_COMM_WORLD_LOCAL_SIZE": "4"}
    set_defaults(Ranks(0, 0, 4, "mpirun"), environ)
    assert environ["OMP_NUM_THREADS"] == "2"
    environ = {"OMP_NUM_THREADS": "1"}
    set_defaults(TWO_RANKS, environ)
    assert environ["OMP_NUM_THREADS"] == "1"


def test_allocator_and_triton_cache_are_set_unless_the_user_has(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(launcher.tempfile, "gettempdir", lambda: str(tmp_path))
    environ: dict[str, str] = {}
    set_defaults(TWO_RANKS, environ)
    assert environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    assert Path(environ["TRITON_CACHE_DIR"]).parent == tmp_path
    assert Path(environ["TRITON_CACHE_DIR"]).stat().st_mode & 0o077 == 0
    chosen = {"PYTORCH_CUDA_ALLOC_CONF": "x", "TRITON_CACHE_DIR": "y", "OMP_NUM_THREADS": "1"}
    environ = dict(chosen)
    set_defaults(TWO_RANKS, environ)
    assert environ == chosen
    environ = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    set_defaults(TWO_RANKS, environ)
    assert len(environ) == 2


def test_another_users_triton_cache_is_not_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(launcher.tempfile, "gettempdir", lambda: str(tmp_path))
    environ: dict[str, str] = {}
    me = launcher.os.getuid() + 1  # so the folder is not mine
    (tmp_path / f"triton-{me}").mkdir()
    monkeypatch.setattr(launcher.os, "getuid", lambda: me)
    set_defaults(TWO_RANKS, environ)
    assert "TRITON_CACHE_DIR" not in environ


def start(folder: Path, names: list[str]) -> tuple["subprocess.Popen[str]", list[int]]:
    """Start a rank below programs with these names and arguments; returns the ids from the top down."""
    command = [sys.executable, "-c", RANK]
    for name in reversed(names):
        words = name.split()
        script = folder / words[0]
        script.write_text(PARENT.format(exports=words[0] == "pipeline", command=command))
        command = [sys.executable, str(script), *words[1:]]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, [int(process.stdout.readline()) for _ in (*names, "rank")]


DEEPSPEED = ["deepspeed", "launch -m deepspeed.launcher.launch"]


@pytest.mark.parametrize(
    ("names", "killed"),
    [
        (DEEPSPEED, 0),
        (DEEPSPEED, 1),
        (["torchrun"], 0),
        (["pipeline", *DEEPSPEED], 0),
        (["pipeline", "other", "names"], 0),
    ],
)
def test_a_rank_stops_within_five_seconds_of_the_kill_of_a_launcher(
    names: list[str], killed: int, tmp_path: Path
) -> None:
    process, pids = start(tmp_path, names)
    start_s = time.monotonic()
    psutil.Process(pids[killed]).kill()
    assert process.stdout is not None and process.stdout.readline() == "stopped\n"
    assert time.monotonic() - start_s < 5
    process.wait(timeout=10)
    psutil.wait_procs([psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)], timeout=5)
    assert not any(map(psutil.pid_exists, pids))


def test_a_rank_outlives_the_shell_that_started_it(tmp_path: Path) -> None:
    process, pids = start(tmp_path, ["shell --data torchrun", "torchrun"])
    psutil.Process(pids[0]).kill()
    process.wait()
    time.sleep(2.5)
    rank = psutil.Process(pids[-1])
    assert rank.is_running()
    rank.kill()


def test_under_nohup_the_end_of_the_terminal_does_not_stop_a_run() -> None:
    assert signal.SIGHUP in stop_signals()
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert signal.SIGHUP not in stop_signals()
    finally:
        signal.signal(signal.SIGHUP, before)
