"""Facts about a run for MLflow: parameters, tags, and datasets, from the recorded config.

A start of a run records its config, with what it resolved to, in `RUN/STAGE/config.yaml`.
"""

import getpass
import os
import shlex
import socket
import sys
from typing import Any

from muomni.config.loading import RESOLVED
from muomni.observe.recorder import RunInfo

# Settings that may be `auto` or open, and the resolved fact that replaces them.
_RESOLVED_SETTINGS = {
    "precision": "precision",
    "training.attention": "attention",
    "training.compile": "compile",
    "training.max_steps": "num_steps",
    "data.num_workers": "num_workers",
}
_TAGS = (
    "ranks", "nodes", "device", "precision", "zero_stage", "data_digest", "tokenizer_digest", "git",
)  # fmt: skip
_DIGEST_DIGITS = 36  # the most that MLflow takes for a dataset
_MAX_TAG_LENGTH = 4000
_SLURM = {"SLURM_JOB_ID": "slurm_job", "SLURM_ARRAY_TASK_ID": "slurm_array_task"}


def flatten(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten `{"a": {"b": 1}}` to `{"a.b": 1}`, the form in which MLflow compares parameters.

    A table with keys that are not identifiers (patterns, datasets) stays a value: MLflow rejects some of
    them.
    """
    flat: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, dict) and all(name.isidentifier() for name in value):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def parameters(config: dict[str, Any]) -> dict[str, str]:
    """All settings and resolved facts; `auto` is replaced by what it resolved to."""
    resolved = config.get(RESOLVED) or {}
    flat = flatten({**config, RESOLVED: {k: v for k, v in resolved.items() if k != "datasets"}})
    for setting, fact in _RESOLVED_SETTINGS.items():
        if flat.get(setting, "") in ("auto", None) and fact in resolved:
            flat[setting] = resolved[fact]
    return {key: str(value) for key, value in flat.items()}


def run_tags(info: RunInfo) -> dict[str, str]:
    """Tags to find and compare runs by."""
    config, resolved = info.config, info.config.get(RESOLVED) or {}
    tags = {"stage": info.stage, "run_folder": str(info.run.resolve())}
    tags |= {name: str(resolved[name]) for name in _TAGS if name in resolved}
    if "preset" in config:
        tags["preset"] = config["preset"]
    if "data" in config:
        tags["data"] = str(config["data"]["root"]).rstrip("/").rpartition("/")[2]
    commit = tags.get("git", "").removesuffix("-dirty")
    if " " not in commit and commit:  # else a sentence that there is none
        tags["git_dirty"] = str(tags["git"].endswith("-dirty")).lower()
        tags["mlflow.source.git.commit"] = commit.rpartition("-g")[2]
    return {name: value[:_MAX_TAG_LENGTH] for name, value in tags.items()}


def process_tags() -> dict[str, str]:
    """Tags of this start: machine, user, command line, and Slurm job."""
    tags = {
        "host": socket.gethostname(),
        "command": shlex.join(sys.argv)[:_MAX_TAG_LENGTH],
        "mlflow.source.name": sys.argv[0],
        "mlflow.source.type": "JOB" if "SLURM_JOB_ID" in os.environ else "LOCAL",
    }
    try:
        tags["mlflow.user"] = tags["user"] = getpass.getuser()
    except (OSError, KeyError):  # a container without an entry for this user
        tags["user"] = str(os.getuid())
    return tags | {tag: os.environ[name] for name, tag in _SLURM.items() if name in os.environ}


def datasets(config: dict[str, Any]) -> list[dict[str, str]]:
    """Name, digest (shortened), source, split, and number of samples of the datasets of a run.

    Names include the split, since MLflow tells datasets apart by name and digest.
    """
    found = (config.get(RESOLVED) or {}).get("datasets", [])
    return [
        {
            **{key: str(value) for key, value in each.items()},
            "name": f"{each['name']}/{each['split']}",
            "digest": each["digest"][:_DIGEST_DIGITS],
        }
        for each in found
    ]
