"""Which ranks print an error, the exit code, and the end of a rank inside a process group."""

import errno
import subprocess
import sys
from pathlib import Path

import pytest

from muomni.errors import DataError, exit_on_error

ROOT = Path(__file__).resolve().parents[1]
# The destruction of a process group of several ranks may wait for peers; here, it would wait for a minute.
RANK = """
import atexit, sys, time
from types import SimpleNamespace
from muomni.errors import DataError, exit_rank_on_error
import muomni.errors
muomni.errors._PEER_GRACE_S = 0.5
sys.modules["torch.distributed"] = SimpleNamespace(is_initialized=lambda: {is_initialized})
atexit.register(time.sleep, {wait_s})
with exit_rank_on_error("train", {rank}):
    {statement}
"""


@pytest.mark.parametrize("is_main", [False, True])
@pytest.mark.parametrize("is_rank_local", [False, True])
def test_main_rank_or_failing_rank_prints_the_error(
    is_main: bool, is_rank_local: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    error = DataError("the shard is broken")
    error.is_rank_local = is_rank_local
    with pytest.raises(SystemExit) as stop, exit_on_error("train", is_main):
        raise error
    assert stop.value.code == 3
    output = capsys.readouterr().err
    assert output == ("train: the shard is broken\n" if is_main or is_rank_local else "")


def test_a_full_disk_is_one_sentence_from_any_rank(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop, exit_on_error("train", is_main=False):
        raise OSError(errno.ENOSPC, "No space left on device", "/runs/a/metrics.jsonl")
    assert stop.value.code == 7
    assert capsys.readouterr().err == (
        "train: No space left on device (/runs/a/metrics.jsonl); fix that, then rerun the same command\n"
    )


@pytest.mark.parametrize("num_lines", [1, 100_000])
def test_a_closed_output_ends_the_program_silently(num_lines: int) -> None:
    program = (
        "import sys; from muomni.errors import exit_on_error\n"
        "with exit_on_error('muomni summary'):\n"
        "    sys.stdin.readline()\n"
        f"    print('line\\n' * {num_lines})"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT,
    )  # fmt: skip
    assert process.stdout is not None
    process.stdout.close()
    _, errors = process.communicate(b"go on\n")
    assert (process.returncode, errors) == (141, b"")


def test_other_os_errors_are_bugs() -> None:
    with pytest.raises(FileNotFoundError), exit_on_error("train"):
        raise FileNotFoundError(errno.ENOENT, "No such file", "x")


def rank(statement: str, rank: int = 0, is_initialized: bool = True) -> tuple[int, str]:
    """Exit code and standard error of a rank."""
    program = RANK.format(
        statement=statement, rank=rank, is_initialized=is_initialized, wait_s=60 * is_initialized
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, timeout=30)
    return done.returncode, done.stderr


def test_a_rank_in_a_process_group_prints_its_error_and_ends_without_waiting() -> None:
    assert rank("raise DataError('no shard')") == (3, "train: no shard\n")
    assert rank("raise DataError('no shard')", rank=1) == (3, "")
    code, output = rank("1 / 0", rank=1)
    assert code == 1 and output.endswith("ZeroDivisionError: division by zero\n")
    assert rank("sys.exit(85)") == (85, "")


def test_a_rank_without_a_process_group_ends_normally() -> None:
    assert rank("raise DataError('no shard')", is_initialized=False) == (3, "train: no shard\n")


def test_the_loss_of_a_peer_is_one_sentence() -> None:
    message = "[/pytorch/gloo/transport/tcp/pair.cc:534] Connection closed by peer [::1]:4711"
    code, output = rank(f"raise RuntimeError({message!r})", rank=1)
    assert code == 1 and output.count("\n") == 1
    assert output.startswith("train: rank 1 lost its connection to another rank; see the error of")
