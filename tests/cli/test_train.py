"""Errors of a rank's environment are one sentence."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def train(program: list[str], run: Path, **environ: str) -> "subprocess.CompletedProcess[str]":
    clean = {
        name: value
        for name, value in os.environ.items()
        if name not in LAUNCHER and not name.startswith(("SLURM_", "OMPI_"))
    }
    command = [sys.executable, *program, "--stage", "thinker", "--run", str(run)]
    return subprocess.run(
        command, cwd=ROOT, env={**clean, **environ}, capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize(
    ("program", "name"),
    [(["launch/train.py"], "train"), (["-m", "muomni.cli", "train"], "muomni train")],
)
def test_incomplete_variables_are_one_sentence(
    program: list[str], name: str, tmp_path: Path
) -> None:
    done = train(program, tmp_path / "run", RANK="0")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"{name}: RANK is set, but WORLD_SIZE is not; start ranks with")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_port_in_use_is_one_sentence_of_rank_0(tmp_path: Path) -> None:
    with socket.create_server(("0.0.0.0", 0)) as listener:
        port = str(listener.getsockname()[1])
        ranks = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        done = train(["launch/train.py"], tmp_path, RANK="0", LOCAL_RANK="0", **ranks)
    assert (done.returncode, done.stdout) == (7, "")
    assert done.stderr.startswith(f"train: port {port} is in use, perhaps by another run")
    assert done.stderr.count("\n") == 1
