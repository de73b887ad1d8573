"""A closed or full standard output does not end the program; the log says so once."""

import subprocess
import sys
from pathlib import Path

import pytest

from muomni.io.console import SteadyStream

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import logging, sys, time
from pathlib import Path
from muomni.io.console import protect_output
protect_output(Path("train.log"))
logging.basicConfig(format="%(message)s")
for step in range(100):
    print("step", step, flush=True)
    logging.warning("warning %d", step)
    time.sleep(0.002)
Path("finished").touch()
"""


def run(folder: Path, redirection: str) -> int:
    command = f'set -o pipefail; "{sys.executable}" -c "$PROGRAM" {redirection}'
    environ = {"PROGRAM": PROGRAM, "PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    return subprocess.run(["bash", "-c", command], cwd=folder, env=environ, timeout=60).returncode


@pytest.mark.parametrize(
    ("redirection", "reason"),
    [
        ("2>/dev/null | head -2 >/dev/null", "Broken pipe"),
        ("2>/dev/null >/dev/full", "No space left on device"),
        (">/dev/null 2>/dev/full", "No space left on device"),
        ("2>&1 | head -2 >/dev/null", "Broken pipe"),
    ],
)
def test_the_program_continues_and_its_log_has_one_line(
    redirection: str, reason: str, tmp_path: Path
) -> None:
    assert run(tmp_path, redirection) == 0
    assert (tmp_path / "finished").exists()
    (line,) = (tmp_path / "train.log").read_text().splitlines()
    assert line.endswith(f"output or error ({reason}); the run continues without it")


@pytest.mark.parametrize("redirection", [">/dev/null 2>&1", ">&- 2>&-"])
def test_working_and_absent_output_leave_no_log(redirection: str, tmp_path: Path) -> None:
    assert run(tmp_path, redirection) == 0
    assert (tmp_path / "finished").exists() and not (tmp_path / "train.log").exists()


def test_output_continues_when_the_disk_has_space_again(tmp_path: Path) -> None:
    path, reports = tmp_path / "log", []
    with path.open("w") as file:
        stream = SteadyStream(file, reports.append)
        failing = file.flush
        file.flush = lambda: (_ for _ in ()).throw(OSError(28, "No space left on device"))  # type: ignore[method-assign]
        for _ in range(2):
            stream.write("early\n")
            stream.flush()
        file.flush = failing  # type: ignore[method-assign]
        stream.write("late\n")
        stream.flush()
        assert path.read_text() == "early\nearly\nlate\n"
    assert len(reports) == 1


def test_a_failure_before_the_folder_of_the_log_exists_is_noted_later(tmp_path: Path) -> None:
    program = PROGRAM.replace('"train.log"', '"run/train.log"')
    program = program.replace("import protect_output", "import note_failures, protect_output")
    program += "Path('run').mkdir()\nnote_failures()\nnote_failures()\n"
    command = [sys.executable, "-c", program]
    with open("/dev/full", "w") as full:
        environ = {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=tmp_path, env=environ, stdout=full, stderr=full)
    assert done.returncode == 0
    (line,) = (tmp_path / "run" / "train.log").read_text().splitlines()
    assert line.endswith("(No space left on device); the run continues without it")
