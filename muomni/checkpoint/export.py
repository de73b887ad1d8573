"""Exports: the result of a finished stage, for later stages and inference.

An export is a folder of safetensors weights, model config, tokenizer, metrics, and hashes. It is staged and
renamed, so it is complete or absent; it is loaded strictly, and never by pickle.
"""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import BaseModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from muomni.config.loading import run_config, validate
from muomni.config.run import RunConfig
from muomni.data.text.tokenizer import Tokenizer
from muomni.errors import UpstreamError
from muomni.io.hashing import sha256_file

SCHEMA_VERSION = 1
_WEIGHTS, _CONFIG, _TOKENIZER = "model.safetensors", "config.json", "tokenizer.model"
_METRICS, _MANIFEST = "metrics.json", "export.json"

Config = TypeVar("Config", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class Export:
    """One stage's export folder."""

    path: Path
    stage: str
    tokenizer_digest: str
    content: dict[str, Any]

    @property
    def tokenizer_file(self) -> Path:
        return self.path / _TOKENIZER

    @property
    def metrics(self) -> dict[str, float]:
        return json.loads((self.path / _METRICS).read_text(encoding="utf-8"))

    @property
    def digest(self) -> str:
        """SHA-256 of the weights, which identifies the training run."""
        return self.content["sha256"][_WEIGHTS]

    @property
    def run_config(self) -> RunConfig:
        """The config that the stage was trained with; raises UpstreamError if it is not recorded."""
        if "config" not in self.content:
            raise UpstreamError(
                f"{self.path} does not record its config; train stage {self.stage} again"
            )
        return run_config(self.content["config"], str(self.path / _MANIFEST))

    def config(self, config_type: type[Config]) -> Config:
        """The sizes of the exported model."""
        content = json.loads((self.path / _CONFIG).read_text(encoding="utf-8"))
        return validate(config_type, content, str(self.path / _CONFIG))

    def state(self) -> dict[str, torch.Tensor]:
        """The exported fp32 weights."""
        try:
            return load_file(self.path / _WEIGHTS)
        except (SafetensorError, OSError) as error:
            raise UpstreamError(f"weights of export {self.path} are unreadable ({error})") from None

    def load_into(self, module: nn.Module) -> None:
        """Load the weights strictly; raises UpstreamError that names the first tensor that does not match."""
        state, own = self.state(), module.state_dict()
        for name in sorted(own.keys() | state.keys()):
            if name not in state or name not in own:
                where = "the export" if name not in state else "this model"
                raise UpstreamError(
                    f"export {self.path} does not match: {where} has no tensor '{name}'; "
                    f"train stage {self.stage} again with the same preset"
                )
            if state[name].shape != own[name].shape:
                raise UpstreamError(
                    f"export {self.path} differs in size: '{name}' is {tuple(state[name].shape)}, "
                    f"expected {tuple(own[name].shape)}; train stage {self.stage} with the same preset"
                )
        module.load_state_dict(state, strict=True)


def write_export(
    path: Path,
    stage: str,
    state: dict[str, torch.Tensor],
    config: BaseModel,
    tokenizer: Tokenizer,
    metrics: dict[str, float],
    about: dict[str, Any],
) -> None:
    """Write an export to a staging folder, then rename it over an older one; raises OSError."""
    staging = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, staging / _WEIGHTS)
    except SafetensorError as error:  # how it reports a full disk
        raise OSError(str(error)) from None
    (staging / _CONFIG).write_text(config.model_dump_json(indent=2) + "\n", encoding="utf-8")
    tokenizer.save(staging / _TOKENIZER)
    (staging / _METRICS).write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    content = {
        "schema_version": SCHEMA_VERSION,
        "stage": stage,
        "sha256": {name: sha256_file(staging / name) for name in (_WEIGHTS, _CONFIG, _TOKENIZER)},
        **about,
    }
    (staging / _MANIFEST).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    if path.exists():
        old = path.with_name(f".{path.name}.{os.getpid()}.old")
        path.rename(old)
        staging.rename(path)
        shutil.rmtree(old)
    else:
        staging.rename(path)


def read_export(path: Path, stage: str, with_hashes: bool = True) -> Export:
    """Open an export and check its hashes; raises UpstreamError if it is missing or damaged.

    Without `with_hashes`, its files must only exist.
    """
    manifest = path / _MANIFEST
    if not manifest.is_file():
        raise UpstreamError(
            f"no export of stage {stage} at {path}; create it with {train_command(stage)}"
        )
    try:
        content = json.loads(manifest.read_text(encoding="utf-8"))
        hashes, found = content["sha256"], content["stage"]
    except (json.JSONDecodeError, KeyError, UnicodeDecodeError) as error:
        raise UpstreamError(
            f"{manifest} is damaged ({error!r}); train stage {stage} again"
        ) from None
    if found != stage:
        raise UpstreamError(f"{path} is an export of stage {found}, not {stage}")
    for name, expected in hashes.items():
        file = path / name
        if not file.is_file() or (with_hashes and sha256_file(file) != expected):
            raise UpstreamError(f"{path / name} is missing or damaged; train stage {stage} again")
    return Export(path, stage, hashes[_TOKENIZER], content)


def find_exports(run: Path, stages: tuple[str, ...], with_hashes: bool = True) -> dict[str, Export]:
    """Open the exports of several stages of a run; one UpstreamError names all missing ones."""
    missing = [stage for stage in stages if not (run / stage / "export" / _MANIFEST).is_file()]
    if missing:
        commands = " && ".join(f"{train_command(stage)} --run {run}" for stage in missing)
        raise UpstreamError(
            f"{run} has no export of {', '.join(missing)}; create {'it' if len(missing) == 1 else 'them'} "
            f"with 'make quickstart', or with: {commands}"
        )
    return {stage: read_export(run / stage / "export", stage, with_hashes) for stage in stages}


def train_command(stage: str) -> str:
    return f"deepspeed launch/train.py --stage {stage}"
