"""A fake cluster: srun, scontrol, and sbatch are small programs that log their calls."""

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Each call is one line in $CALLS; srun runs $FAKE_SRUN.
SRUN = """\
#!/bin/bash
printf 'srun' >>"$CALLS"; printf ' <%s>' "$@" >>"$CALLS"
echo " port=$MASTER_PORT threads=$OMP_NUM_THREADS" >>"$CALLS"
eval "$FAKE_SRUN"
"""
# Slurm kills the batch script of a job that is requeued.
SCONTROL = """\
#!/bin/bash
echo "scontrol $*" >>"$CALLS"
case $1 in
    show)
        [ "${FAKE_SHOW:-}" != refused ] &&
            echo "JobId=7 JobState=${FAKE_STATE:-RUNNING} EndTime=${FAKE_END:-Unknown} Reason=None"
        ;;
    requeue) [ "${FAKE_REQUEUE:-}" != refused ] && kill -KILL $PPID ;;
esac
"""
SBATCH = """\
#!/bin/bash
printf 'sbatch' >>"$CALLS"; printf ' <%s>' "$@" >>"$CALLS"; echo >>"$CALLS"
case "$*" in *"${FAKE_REFUSED:-nothing}"*) echo "sbatch: error: no such partition" >&2; exit 1 ;; esac
grep -c ^sbatch "$CALLS"
"""
SCANCEL = '#!/bin/bash\necho "scancel $*" >>"$CALLS"\n'


class FakeCluster:
    """A folder of fake programs at the front of PATH, and the environment of a job."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.calls_file = folder, folder / "calls"
        programs = {"srun": SRUN, "scontrol": SCONTROL, "sbatch": SBATCH, "scancel": SCANCEL}
        (folder / "bin").mkdir()
        for name, text in programs.items():
            program = folder / "bin" / name
            program.write_text(text)
            program.chmod(0o755)
        (folder / "venv" / "bin").mkdir(parents=True)
        (folder / "venv" / "bin" / "activate").write_text("")
        clean = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("SLURM_", "MUOMNI_", "MASTER_", "OMP_"))
        }
        self.environ = {
            **clean,
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
            "CALLS": str(self.calls_file),
            "FAKE_SRUN": "exit 0",
            "MUOMNI_ROOT": str(ROOT),
            "MUOMNI_VENV": str(folder / "venv"),
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_JOB_NODELIST": "node[1-2]",
            "SLURM_CPUS_ON_NODE": "8",
        }

    def start(self, script: str, *arguments: str, **environ: str) -> "subprocess.Popen[str]":
        """Start a script of slurm/ as Slurm or a user would, with stderr merged into stdout."""
        return subprocess.Popen(
            ["bash", str(ROOT / "slurm" / script), *arguments],
            env={**self.environ, **environ},
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, script: str, *arguments: str, **environ: str) -> tuple[int, str]:
        """Run a script; returns its exit code (negative: killed by that signal) and output."""
        process = self.start(script, *arguments, **environ)
        output, _ = process.communicate(timeout=60)
        return process.returncode, output

    @property
    def calls(self) -> list[str]:
        return self.calls_file.read_text().splitlines() if self.calls_file.exists() else []

    def calls_of(self, program: str) -> list[str]:
        return [call for call in self.calls if call.startswith(program)]


def is_in_order(text: str, parts: Sequence[str]) -> bool:
    """Whether the text contains all parts in this order."""
    position = 0
    for part in parts:
        position = text.find(part, position)
        if position < 0:
            return False
    return True


@pytest.fixture
def cluster(tmp_path: Path) -> FakeCluster:
    return FakeCluster(tmp_path)
