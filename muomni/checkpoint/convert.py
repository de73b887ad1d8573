"""Exports in the formats of other libraries: transformers' Qwen3 and open_clip's CLIP."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from muomni.checkpoint.export import Export
from muomni.config.models import ClipConfig, ThinkerConfig
from muomni.data.text.tokenizer import Tokenizer
from muomni.errors import ConfigError
from muomni.models.language.convert_qwen3 import qwen3_config, to_qwen3
from muomni.models.vision.convert_open_clip import open_clip_config, to_open_clip


def write_converted(export: Export, target: Path) -> str:
    """Write `config.json`, `model.safetensors`, and the tokenizer into a new folder; returns the format.

    A Thinker becomes transformers' Qwen3 or Qwen3Moe, a vision encoder with its text tower open_clip's CLIP
    (`config.json` holds the arguments of `open_clip.model.CLIP`). Raises ConfigError for other stages, for
    sizes that the format cannot express, and when the folder exists.
    """
    if target.exists():
        raise ConfigError(f"{target} already exists; choose another --out")
    name, config, state = _converted(export)
    folder = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    folder.mkdir(parents=True)
    try:
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        tensors = {key: tensor.contiguous() for key, tensor in state.items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "tokenizer.model").write_bytes(export.tokenizer_file.read_bytes())
        folder.rename(target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return name


def _converted(export: Export) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    if export.stage == "thinker":
        config = export.config(ThinkerConfig)
        state = to_qwen3(export.state(), config)
        if config.tie_embeddings:  # safetensors stores no tensor twice; transformers ties it itself
            del state["lm_head.weight"]
        return "transformers Qwen3", qwen3_config(config), state
    if export.stage == "vision_encoder":
        config = export.config(ClipConfig)
        eos_id = Tokenizer.load(export.tokenizer_file).eos_id
        return "open_clip CLIP", open_clip_config(config, eos_id), to_open_clip(export.state())
    raise ConfigError(
        f"stage {export.stage} has no published format; convert thinker or vision_encoder"
    )
