"""Assemble the omni model from the exports of the other stages: sizes, weights, frozen parts."""

from fnmatch import fnmatchcase
from typing import Any

import torch

from muomni.checkpoint.export import Export, train_command
from muomni.config.loading import did_you_mean, load_preset, merge, validate
from muomni.config.models import (
    AudioEncoderConfig,
    ClipConfig,
    CodecConfig,
    OmniConfig,
    TalkerConfig,
    ThinkerConfig,
)
from muomni.config.stages import SftRun
from muomni.errors import ConfigError, UpstreamError
from muomni.models.omni import OmniModel
from muomni.models.speech.talker import Talker
from muomni.models.vision.clip import Clip

CONFIG_TYPES = {
    "thinker": ThinkerConfig,
    "audio_encoder": AudioEncoderConfig,
    "vision_encoder": ClipConfig,
    "codec": CodecConfig,
    "talker": TalkerConfig,
}


def check_sizes(config: SftRun, upstream: dict[str, Export]) -> None:
    """Compare each export with the preset's sizes, overridden by `model.STAGE.FIELD` of this run.

    Raises UpstreamError if a size differs, or if the Talker was trained on another codec.
    """
    preset = load_preset(config.preset)["models"]
    for stage, export in upstream.items():
        changed = getattr(config.model, stage)
        changes = {} if changed is None else changed.model_dump(exclude_none=True)
        expected = merge(preset.get(stage, {}), changes)
        found = export.config(CONFIG_TYPES[stage]).model_dump()
        for field, wanted, has in _differences(expected, found):
            raise UpstreamError(
                f"export {export.path} of stage {stage} has {field}={has}, but preset "
                f"'{config.preset}' has {wanted}; use the --preset that it was trained with, set "
                f"model.{stage}.{field}={has}, or retrain it with {train_command(stage)}"
            )
    learned = upstream["talker"].content.get("upstream", {}).get("codec")
    if learned != upstream["codec"].digest:
        raise UpstreamError(
            f"the Talker in {upstream['talker'].path} was trained on the codes of another codec than "
            f"{upstream['codec'].path}; retrain it with {train_command('talker')} --resume never"
        )


def _differences(
    expected: dict[str, Any], found: dict[str, Any], prefix: str = ""
) -> list[tuple[str, Any, Any]]:
    """Return (field, expected, found) for each field of `expected` that differs in `found`."""
    differences = []
    for field, wanted in expected.items():
        has = found.get(field)
        if isinstance(wanted, dict) and isinstance(has, dict):
            differences += _differences(wanted, has, f"{prefix}{field}.")
        elif wanted != has:
            differences.append((f"{prefix}{field}", wanted, has))
    return differences


def omni_config(
    config: SftRun, upstream: dict[str, Export], talker_sees_thinker: bool
) -> OmniConfig:
    """Return the sizes of the omni model: parts from their exports, the rest from section `model`."""
    parts = {stage: export.config(CONFIG_TYPES[stage]) for stage, export in upstream.items()}
    own = config.model.model_dump(exclude=set(parts))
    talker, thinker, vision = parts["talker"], parts["thinker"], parts["vision_encoder"]
    assert isinstance(thinker, ThinkerConfig) and isinstance(vision, ClipConfig)
    if talker_sees_thinker:
        talker = talker.model_copy(update={"thinker_hidden_size": thinker.hidden_size})
    content = {**own, **parts, "vision_encoder": vision.vision, "talker": talker}
    dumped = {k: v.model_dump() if k in parts else v for k, v in content.items()}
    return validate(OmniConfig, dumped, "section 'model'")


def load_parts(model: OmniModel, upstream: dict[str, Export]) -> None:
    """Load all exports strictly; the projection from Thinker to Talker starts at zero."""
    upstream["thinker"].load_into(model.thinker)
    embedding_std = float(model.thinker.embed_tokens.weight.detach().std())
    model.image_projector.start_at(embedding_std)
    # CTC tokens are embedded as text already; random features would only add noise.
    model.audio_projector.start_at(0.0 if model.config.ctc_embeddings else embedding_std)
    upstream["audio_encoder"].load_into(model.audio_encoder)
    clip = Clip(upstream["vision_encoder"].config(ClipConfig))
    upstream["vision_encoder"].load_into(clip)
    model.vision_encoder.load_state_dict(clip.vision.state_dict())
    assert model.talker is not None
    talker = Talker(upstream["talker"].config(TalkerConfig))
    upstream["talker"].load_into(talker)
    state = talker.state_dict()
    if model.talker.config.thinker_hidden_size is not None:
        state["thinker_proj.weight"] = torch.zeros_like(model.talker.thinker_proj.weight)
    model.talker.load_state_dict(state)


def freeze(model: OmniModel, patterns: tuple[str, ...]) -> None:
    """Freeze the parameters whose names match a shell pattern, such as `thinker.*`.

    An unused CTC head is always frozen. Raises ConfigError if a pattern matches nothing or if no trainable
    parameter remains.
    """
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            parts = sorted({f"{name.split('.')[0]}.*" for name in names})
            hint = did_you_mean(pattern, parts)
            raise ConfigError(
                f"pattern '{pattern}' in options.freeze matches no parameter{hint}; parts: {', '.join(parts)}"
            )
    unused = () if model.config.ctc_embeddings else ("audio_encoder.ctc_head.*",)
    for name, parameter in model.named_parameters():
        if any(fnmatchcase(name, pattern) for pattern in (*patterns, *unused)):
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError("options.freeze freezes all parameters; remove a pattern")
