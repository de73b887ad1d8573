"""The state of each stage of a run folder, determined without starting it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from muomni.config.run import RunConfig
from muomni.errors import MuomniError
from muomni.observe.tracking.facts import flatten
from muomni.run_folder import RunFolder, export_digest

State = Literal["finished", "outdated", "open"]
# Settings that may differ from those of an export: places of data, and what trackers record.
_NOT_COMPARED = {
    "data.root", "data.tokenizer", "data.cache_dir",
    "training.recorders", "training.experiment", "training.register_model",
}  # fmt: skip


@dataclass(slots=True)
class StageResult:
    """A row of the table that the pipeline prints at the end."""

    status: str  # trained, kept (nothing to train), or finished before
    duration_s: float
    step: int
    metrics: dict[str, float]


def stage_state(run: Path, stage: str, config: RunConfig) -> tuple[State, str]:
    """Return the state of a stage and the reason.

    finished: its export is complete and was trained with this config, data, tokenizer, and upstream exports.
    outdated: an upstream stage was retrained after it started.
    open: anything else; the training command decides whether to start or to resume.
    """
    folder = RunFolder(run, stage)
    changed = changed_upstream(run, folder.resolved().get("upstream_digests", {}))
    if changed:
        return "outdated", f"because {', '.join(changed)} was retrained"
    if not (folder.export / "export.json").is_file():
        return "open", ""
    # Imports torch, which is slow and not needed for new runs.
    from muomni.checkpoint.export import read_export

    try:
        export = read_export(folder.export, stage)
        settings = changed_settings(export.content["config"], config)
        if settings:
            return "open", f"because {', '.join(settings)} changed"
        if changed_upstream(run, export.content["upstream"]):
            return "open", "because it was trained on an earlier upstream export"
        if not has_same_data(config, export.content["data"], export.tokenizer_digest):
            return "open", "because the data or the tokenizer changed"
    except MuomniError as error:
        return "open", f"because {error}"
    except KeyError as error:
        return "open", f"because its export is from an older version and lacks {error.args[0]}"
    return "finished", ""


def changed_settings(before: dict[str, Any], config: RunConfig) -> list[str]:
    """Return the keys, such as optim.lr, whose values differ from those of an export.

    Places of the data may differ; `has_same_data` compares their content.
    """
    old, new = flatten(before), flatten(config.model_dump(mode="json"))
    keys = (old.keys() | new.keys()) - _NOT_COMPARED
    return sorted(key for key in keys if old.get(key) != new.get(key))


def changed_upstream(run: Path, digests: dict[str, str]) -> list[str]:
    """Return the stages whose exports in `run` no longer have these digests."""
    return [
        stage
        for stage, digest in digests.items()
        if export_digest(RunFolder(run, stage).export) not in (None, digest)
    ]


def has_same_data(config: RunConfig, data: dict[str, Any], tokenizer_digest: str) -> bool:
    """Whether datasets and tokenizer match those of an export; raises DataError."""
    from muomni.data.loading.stream import fingerprint, stream_shards
    from muomni.data.shards.datasets import open_datasets, open_tokenizer
    from muomni.data.shards.source import Source

    if (stream := config.data.stream) is not None:
        now = fingerprint(stream_shards(stream.shards, stream.samples_per_shard))
    else:
        now = Source(open_datasets(config.data, data["tasks"]), "train").fingerprint
    return now == data["fingerprint"] and open_tokenizer(config.data).digest == tokenizer_digest


def published(folder: RunFolder) -> bytes | None:
    """Return bytes that identify the current export of a stage, or None."""
    manifest = folder.export / "export.json"
    return manifest.read_bytes() if manifest.is_file() else None


def finished_result(folder: RunFolder) -> StageResult:
    """Return step and metrics of a finished stage, from its export."""
    step = json.loads((folder.export / "export.json").read_text(encoding="utf-8"))["step"]
    metrics = json.loads((folder.export / "metrics.json").read_text(encoding="utf-8"))
    return StageResult("finished before", 0.0, step, metrics)
