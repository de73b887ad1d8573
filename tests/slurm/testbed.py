"""A Slurm cluster for tests: the configured one, or a temporary one of two nodes.

MUOMNI_SLURM_TESTBED names a folder with the programs `up DIR` and `down DIR`, which start and stop a
temporary cluster and write DIR/env; the default is ../shared/slurm-testbed next to the repository.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")


class Cluster:
    """Submits the scripts of slurm/ and inspects their jobs."""

    def __init__(self, environ: dict[str, str], is_testbed: bool) -> None:
        self.environ, self.is_testbed = environ, is_testbed

    def call(self, *command: str, **environ: str) -> str:
        """Run a Slurm command or a script; returns its standard output."""
        done = subprocess.run(
            command,
            env={**self.environ, **environ},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, f"{command} exited with {done.returncode}: {done.stderr}"
        return done.stdout

    def submit(self, options: list[str], script: str, *arguments: str, **environ: str) -> "Job":
        """Submit a script of slurm/ with sbatch."""
        path = str(ROOT / "slurm" / script)
        id_ = self.call("sbatch", "--parsable", *options, path, *arguments, **environ).strip()
        return Job(self, id_)


class Job:
    """One submitted job."""

    def __init__(self, cluster: Cluster, id_: str) -> None:
        self.cluster, self.id = cluster, id_

    def field(self, name: str) -> str:
        """A field of `scontrol show job`; for an array, of the first listed task."""
        text = self.cluster.call("scontrol", "show", "job", self.id)
        found = re.search(rf"\b{name}=(\S*)", text)
        assert found, f"job {self.id} has no {name}: {text}"
        return found.group(1)

    def states(self) -> list[str]:
        """States of all tasks of an array, or of a single job."""
        text = self.cluster.call("scontrol", "show", "job", self.id)
        return re.findall(r"\bJobState=(\S*)", text)

    def wait(self, timeout_s: float) -> list[str]:
        """Wait until all tasks have ended; returns their states."""
        deadline = time.monotonic() + timeout_s
        while not all(state in ENDED for state in self.states()):
            if time.monotonic() > deadline:
                self.cluster.call("scancel", self.id)
                raise TimeoutError(f"job {self.id} has not ended: {self.tail()}")
            time.sleep(1)
        return self.states()

    @property
    def log(self) -> str:
        path = Path(self.field("StdOut"))
        return path.read_text(errors="replace") if path.exists() else ""

    def tail(self) -> str:
        return self.log[-3000:]


@contextmanager
def open_cluster() -> Iterator[Cluster]:
    """Provide a cluster of at least two nodes; raises RuntimeError if there is none."""
    environ = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("SLURM_", "MASTER_")) or name == "SLURM_CONF"
    }
    environ |= {
        "MUOMNI_ROOT": str(ROOT),
        "MUOMNI_VENV": sys.prefix,
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
    }
    default = ROOT.parent / "shared" / "slurm-testbed"
    programs = Path(os.environ.get("MUOMNI_SLURM_TESTBED", default))
    if not (programs / "up").is_file():
        if shutil.which("sinfo") is None or subprocess.run(["sinfo"]).returncode:
            raise RuntimeError(
                f"tests with the marker slurm need a cluster, but {programs}/up does not exist (set "
                f"MUOMNI_SLURM_TESTBED) and sinfo finds none"
            )
        yield Cluster(environ, is_testbed=False)
        return
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # socket paths must be short
    try:
        subprocess.run(
            [programs / "up", folder], check=True, timeout=300, stdout=subprocess.DEVNULL
        )
        written = dict(re.findall(r"(\w+)=(\S+)", (folder / "env").read_text()))
        environ["SLURM_CONF"] = written["SLURM_CONF"]
        if written["TESTBED_NS"] == "0":
            environ["MASTER_ADDR"] = "127.0.0.1"  # node names do not resolve
        yield Cluster(environ, is_testbed=True)
    finally:
        subprocess.run([programs / "down", folder], timeout=120, stdout=subprocess.DEVNULL)
        shutil.rmtree(folder, ignore_errors=True)
