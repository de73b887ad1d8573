"""Layout of a run folder.

RUN/STAGE/config.yaml      the config, and in section `resolved` facts about the run
RUN/STAGE/train.log        output of the ranks that `muomni pipeline` started
RUN/STAGE/logs/            messages of the ranks other than 0, which print errors only
RUN/STAGE/owner.json       the process that trains it now
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
import subprocess
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from muomni.config.loading import RESOLVED, read_yaml
from muomni.errors import ConfigError
from muomni.io.atomic_write import write_atomic

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
