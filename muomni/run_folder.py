"""Layout of a run folder.

RUN/STAGE/config.yaml      the config, and in section `resolved` facts about the run
RUN/STAGE/train.log        output of the ranks that `muomni pipeline` started
RUN/STAGE/logs/            messages of the ranks other than 0, which print errors only
RUN/STAGE/owner.json       the process that trains it now
RUN/STAGE/start.json       the job that started it over, with --resume never or a checkpoint
RUN/STAGE/before-DATE/     the state of earlier starts, moved there by such a job
RUN/STAGE/metrics.jsonl    all logged metrics, the source for MLflow
RUN/STAGE/mlflow.json      the id of its MLflow run; RUN/mlflow.json: of that of the pipeline
RUN/STAGE/checkpoints/     step_00000100/, latest, best
RUN/STAGE/samples/         sample outputs, and step_00000100/ of validations
RUN/STAGE/profile/         traces and memory snapshots of a few steps
RUN/STAGE/nonfinite/       micro-batches with non-finite gradients, and reports on them
RUN/STAGE/export/          weights and config for later stages and inference
"""

import json
import os
import platform
import shutil
import subprocess
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from muomni.config.loading import RESOLVED, read_yaml
from muomni.distributed.discovery import is_restarted, job_name
from muomni.errors import ConfigError
from muomni.io.atomic_write import write_atomic

_START_FILE = "start.json"
_PACKAGES = ("muomni", "torch", "deepspeed", "torchaudio", "webdataset", "sentencepiece", "mlflow")


@dataclass(frozen=True, slots=True)
class RunFolder:
    """The folder of one stage of one run."""

    run: Path
    stage: str

    @property
    def root(self) -> Path:
        return self.run / self.stage

    @property
    def config_file(self) -> Path:
        return self.root / "config.yaml"

    @property
    def log(self) -> Path:
        return self.root / "train.log"

    def rank_log(self, rank: int) -> Path:
        """The log of a rank other than 0."""
        return self.root / "logs" / f"rank_{rank}.log"

    @property
    def metrics_file(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def samples(self) -> Path:
        return self.root / "samples"

    @property
    def nonfinite(self) -> Path:
        return self.root / "nonfinite"

    @property
    def export(self) -> Path:
        return self.root / "export"

    def create(self) -> None:
        """Create the folder; raises ConfigError if that fails or it is not writable."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"cannot create run folder {self.root}: {error.strerror}") from None
        if not os.access(self.root, os.W_OK):
            raise ConfigError(f"run folder {self.root} is not writable; choose another --run")

    def start_over(self, job: str | None, source: Path | None = None) -> Path | None:
        """Move the state of earlier starts away, so that nothing resumes from it; returns where, if any.

        A run that continues from its own checkpoint `source` keeps that one, and its metrics. `resume_now`
        recognizes this `job` when it is restarted.
        """
        is_own = source is not None and source.resolve().parent == self.checkpoints.resolve()
        moved = [self.samples, *([] if is_own else [self.metrics_file])]
        moved += [
            path
            for path in self.checkpoints.glob("*")
            if source is None or path.resolve() != source.resolve()
        ]
        moved = [path for path in moved if path.exists()]
        aside = self.root / f"before-{time.strftime('%Y%m%d-%H%M%S')}"
        for path in moved:
            target = aside / path.relative_to(self.root)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.rename(target)
        write_atomic(self.root / _START_FILE, json.dumps({"job": job}).encode())
        return aside if moved else None

    def resume_now(self, resume: str) -> str:
        """What `--resume` means for this start: a restarted job continues with the state that it saved."""
        path, job = self.root / _START_FILE, job_name()
        if resume == "auto" or not is_restarted() or not path.is_file():
            return resume
        if json.loads(path.read_text(encoding="utf-8"))["job"] != job:
            return resume
        has_saved = any(self.checkpoints.glob("step_*"))
        return "auto" if resume == "never" or has_saved else resume

    def remove_leftovers(self) -> None:
        """Delete what killed saves and exports have left; only the owner of the run may call it."""
        for path in (*self.checkpoints.glob(".step_*"), *self.root.glob(".export.*.tmp")):
            shutil.rmtree(path, ignore_errors=True)

    def resolved(self) -> dict[str, Any]:
        """Facts about the last start of the run, such as its upstream exports; empty if it never started."""
        content = read_yaml(self.config_file) if self.config_file.is_file() else {}
        return content.get(RESOLVED) or {}

    def write_config(self, config: dict[str, Any], resolved: dict[str, Any]) -> None:
        """Write the config, and facts about the run, which `--config` ignores."""
        content = {**config, RESOLVED: resolved}
        write_atomic(self.config_file, yaml.safe_dump(content, sort_keys=False).encode())


def export_digest(export: Path) -> str | None:
    """The digest that identifies the export in a folder, from its manifest; None without one."""
    manifest = export / "export.json"
    if not manifest.is_file():
        return None
    return json.loads(manifest.read_text(encoding="utf-8"))["sha256"]["model.safetensors"]


def provenance() -> dict[str, Any]:
    """Package versions, platform, and git state, for config files and checkpoints."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "versions": versions,
        "python": platform.python_version(),
        "machine": platform.platform(),
        "git": _git_state(),
    }


def _git_state() -> str:
    root = Path(__file__).resolve().parents[1]
    try:
        described = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty"],
            capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return "not a git checkout"
    return described.stdout.strip()
