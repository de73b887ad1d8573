"""How far each stage of a run folder is, judged without starting it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from muomni.config.loading import read_yaml
from muomni.config.run import RunConfig
from muomni.errors import MuomniError
from muomni.observe.mlflow_log import flatten
from muomni.run_folder import RunFolder

State = Literal["finished", "outdated", "open"]


@dataclass(slots=True)
class StageResult:
    """One line of the table that the pipeline prints at its end."""

    status: str  # trained, kept (training had nothing to do), or finished before
    duration_s: float
    step: int
    metrics: dict[str, float]


def stage_state(run: Path, stage: str, config: RunConfig) -> tuple[State, str]:
    """Whether a stage is finished, outdated, or open, and the reason.

    Finished: its export is complete and was trained with this config, data, tokenizer, and upstream exports.
    Outdated: an upstream stage was trained again after it started. Anything else is open, and the training
    command decides whether to start or to resume.
    """
    folder = RunFolder(run, stage)
    if folder.config_file.is_file():
        used = read_yaml(folder.config_file).get("upstream_digests", {})
        changed = changed_upstream(run, used)
        if changed:
            return "outdated", f"because {', '.join(changed)} was trained again"
    if not (folder.export / "export.json").is_file():
        return "open", ""
    # Imports torch, which the first run of a pipeline does not need.
    from muomni.checkpoint.export import read_export

    try:
        export = read_export(folder.export, stage)
        settings = changed_settings(export.content["config"], config)
        if settings:
            return "open", f"because {', '.join(settings)} changed"
        if changed_upstream(run, export.content["upstream"]):
            return "open", "because it is not finished with the new upstream export"
        if not has_same_data(config, export.content["data"], export.tokenizer_digest):
            return "open", "because the data or the tokenizer changed"
    except MuomniError as error:
        return "open", f"because {error}"
    except KeyError as error:
        return "open", f"because its export is from an older version and lacks {error.args[0]}"
    return "finished", ""


def changed_settings(before: dict[str, Any], config: RunConfig) -> list[str]:
    """The keys, such as optim.lr, with which an export was trained differently."""
    old, new = flatten(before), flatten(config.model_dump(mode="json"))
    return sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))


def changed_upstream(run: Path, digests: dict[str, str]) -> list[str]:
    """The stages whose exports in `run` no longer have these digests."""
    changed = []
    for stage, digest in digests.items():
        manifest = RunFolder(run, stage).export / "export.json"
        if manifest.is_file():
            hashes = json.loads(manifest.read_text(encoding="utf-8"))["sha256"]
            if hashes["model.safetensors"] != digest:
                changed.append(stage)
    return changed


def has_same_data(config: RunConfig, data: dict[str, Any], tokenizer_digest: str) -> bool:
    """Whether datasets and tokenizer are still those of an export; raises DataError."""
    from muomni.data.loading.stream import fingerprint, stream_shards
    from muomni.data.shards.data_root import datasets_of, tokenizer_of
    from muomni.data.shards.source import Source

    if (stream := config.data.stream) is not None:
        now = fingerprint(stream_shards(stream.shards, stream.samples_per_shard))
    else:
        now = Source(datasets_of(config.data, data["tasks"]), "train").fingerprint
    return now == data["fingerprint"] and tokenizer_of(config.data).digest == tokenizer_digest


def published(folder: RunFolder) -> bytes | None:
    """What identifies the current export of a stage; None without one."""
    manifest = folder.export / "export.json"
    return manifest.read_bytes() if manifest.is_file() else None


def finished_result(folder: RunFolder) -> StageResult:
    """The metrics that a finished stage wrote beside its export."""
    step = json.loads((folder.export / "export.json").read_text(encoding="utf-8"))["step"]
    metrics = json.loads((folder.export / "metrics.json").read_text(encoding="utf-8"))
    return StageResult("finished before", 0.0, step, metrics)
