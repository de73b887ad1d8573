"""Submit sharding, training, and evaluation jobs to Slurm, chained by dependencies."""

import argparse
import getpass
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from muomni.config.arguments import arguments_for
from muomni.config.registry import STAGES
from muomni.errors import ConfigError, MachineError

SCRIPTS = Path(__file__).resolve().parents[2] / "slurm"


def submit(arguments: argparse.Namespace, stages: list[str], extra: list[str]) -> None:
    """Submit everything, or print the sbatch commands with --dry-run; raises MuomniError.

    If sbatch rejects a job, those before it are canceled. The last lines of standard output are NAME JOBID.
    """
    jobs = JobChain(arguments, stages, extra)
    jobs.submit_shards()
    jobs.submit_stages()
    if not arguments.no_evaluate:
        jobs.submit_evaluations()
    if arguments.dry_run:
        return
    print(
        f"watch the jobs with: squeue -u {getpass.getuser()}; logs: {jobs.run}/STAGE/slurm-JOBID.log"
    )
    for name, number in sorted(jobs.ids.items(), key=lambda item: int(item[1])):
        print(name, number)


class JobChain:
    """The jobs of one pipeline; `ids` are the job ids by name."""

    def __init__(self, arguments: argparse.Namespace, stages: list[str], extra: list[str]) -> None:
        self.arguments, self.stages, self.extra = arguments, stages, extra
        self.data, self.run = (Path(os.path.realpath(p)) for p in (arguments.data, arguments.run))
        self.ids: dict[str, str] = {}
        self._after_shards: list[str] = []  # names of the jobs that training waits for
        root = os.environ.get("MUOMNI_ROOT")
        self.scripts = SCRIPTS if root is None else Path(root) / "slurm"
        if not (self.scripts / "train.sbatch").is_file():
            raise ConfigError(
                f"{self.scripts / 'train.sbatch'} does not exist; set MUOMNI_ROOT to the repository"
            )
        if not arguments.dry_run and shutil.which("sbatch") is None:
            raise MachineError(
                "sbatch is not on the PATH; run this command on a login node of a Slurm cluster"
            )
        # The jobs read these to find the repository and environment.
        os.environ["MUOMNI_ROOT"] = str(self.scripts.parent)
        os.environ.setdefault("MUOMNI_VENV", sys.prefix)
        if arguments.ranks is not None:
            os.environ["MUOMNI_TASKS_PER_NODE"] = str(arguments.ranks)

    def submit_shards(self) -> None:
        """One array per --shards, and then the tokenizer if --vocab-size is given."""
        arguments = self.arguments
        options = shlex.split(arguments.sbatch_shards)
        script = str(self.scripts / "shard_array.sbatch")
        for number, words in enumerate(arguments.shards):
            log = f"--output={self.run}/slurm-shards{number}-%A_%a.log"
            command = [f"--array={arguments.array}", log, *options, script, *shlex.split(words)]
            self._submit(f"shards{number}", [], command)
        self._after_shards = list(self.ids)
        if arguments.vocab_size is not None:
            log = f"--output={self.run}/slurm-tokenizer-%A.log"
            tokenizer = [
                "tokenizer", "--data", str(self.data), "--vocab-size", str(arguments.vocab_size),
                "--out", str(self.data / "tokenizer.model"),
            ]  # fmt: skip
            command = ["--array=0-0", log, *options, script, *tokenizer]
            self._submit("tokenizer", self._after_shards, command)
            self._after_shards = ["tokenizer"]

    def submit_stages(self) -> None:
        """One job per stage, which starts after its upstream stages have succeeded."""
        for stage in self.stages:
            needs = [name for name in STAGES[stage].upstream if name in self.ids]
            self._make_folder(self.run / stage)
            command = [
                f"--output={self.run}/{stage}/slurm-%j.log",
                *self._options(stage), str(self.scripts / "train.sbatch"),
                "--stage", stage, "--preset", self.arguments.preset,
                "--data", str(self.data), "--run", str(self.run),
                *arguments_for(stage, self.extra),
            ]  # fmt: skip
            self._submit(stage, [*self._after_shards, *needs], command)

    def submit_evaluations(self) -> None:
        """One single-node job per stage after all training, since some metrics use other stages."""
        for stage in self.stages:
            command = [
                f"--output={self.run}/{stage}/slurm-evaluate-%j.log",
                *shlex.split(self.arguments.sbatch), "--nodes=1",
                str(self.scripts / "train.sbatch"), "launch/evaluate.py",
                "--stage", stage, "--data", str(self.data), "--run", str(self.run),
            ]  # fmt: skip
            self._submit(f"evaluate-{stage}", self.stages, command)

    def _options(self, stage: str) -> list[str]:
        own = getattr(self.arguments, f"sbatch_{stage}", "")
        return [*shlex.split(self.arguments.sbatch), *shlex.split(own)]

    def _make_folder(self, folder: Path) -> None:
        if self.arguments.dry_run:
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"cannot create {folder}: {error.strerror}") from None

    def _submit(self, name: str, after: list[str], options: list[str]) -> None:
        """Submit a job that waits for the jobs named in `after`; raises ConfigError."""
        command = ["sbatch", "--parsable", f"--job-name=muomni-{name}"]
        if after:
            ids = ":".join(self.ids[other] for other in after)
            command += [f"--dependency=afterok:{ids}", "--kill-on-invalid-dep=yes"]
        command += options
        if self.arguments.dry_run:
            print(shlex.join(command))
            self.ids[name] = name
            return
        outcome = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if outcome.returncode:
            if self.ids:
                subprocess.run(["scancel", *self.ids.values()], check=False)
            raise ConfigError(
                f"sbatch rejected {name} (see above); the jobs submitted before it were canceled"
            )
        job_id, _, _ = outcome.stdout.strip().partition(";")  # ID;CLUSTER with several clusters
        self.ids[name] = job_id
