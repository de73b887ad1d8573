"""What is hidden of the start of DeepSpeed and torch, and where the messages of other ranks go."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import logging, sys, warnings
from pathlib import Path
from muomni.io import logs

level, rank = int(sys.argv[1]), int(sys.argv[2])
logs.configure(level, rank == 0, Path("logs/rank_1.log"))
handler = logging.StreamHandler(sys.stdout)  # as DeepSpeed does
deepspeed = logging.getLogger("DeepSpeed")
deepspeed.addHandler(handler)
deepspeed.propagate = False
if rank:
    logs.use_root_handlers("DeepSpeed")
deepspeed.warning("Setting accelerator to CPU. If you have GPU or other accelerator, ...")
deepspeed.warning("a stage is deprecated")
logging.getLogger("torch.utils.cpp_extension").warning("No CUDA runtime is found, using CUDA_HOME='%s'", "x")
logging.getLogger("torch.utils.cpp_extension").warning("the compiler is too old")
logging.getLogger("muomni.data").info("opened")
warnings.warn("a shape is odd")
logging.getLogger("muomni.data").error("a shard is gone")
"""
NOISE = ("Setting accelerator", "No CUDA runtime")
PROBLEMS = ("a stage is deprecated", "the compiler is too old", "a shape is odd", "a shard is gone")


def _run(level: int, rank: int, folder: Path) -> str:
    command = [sys.executable, "-c", PROGRAM, str(level), str(rank)]
    environ = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize(("level", "is_verbose"), [(30, False), (20, True)])
def test_only_noise_is_hidden_unless_verbose(level: int, is_verbose: bool, tmp_path: Path) -> None:
    printed = _run(level, 0, tmp_path)
    assert all(text in printed for text in PROBLEMS)
    assert [text in printed for text in (*NOISE, "opened")] == [is_verbose] * 3
    assert not (tmp_path / "logs").exists()


def test_other_ranks_print_errors_and_log_the_rest(tmp_path: Path) -> None:
    assert _run(30, 1, tmp_path) == "a shard is gone\n"
    logged = (tmp_path / "logs" / "rank_1.log").read_text()
    assert all(text in logged for text in PROBLEMS)
    assert not any(text in logged for text in NOISE)


def test_a_log_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "logs").touch()
    first, *others = _run(30, 1, tmp_path).splitlines()
    assert first.startswith(f"cannot write {tmp_path / 'logs' / 'rank_1.log'} (")
    assert others == ["a shard is gone"]
