"""Parameters and forward FLOPs of each stage's model, without allocating it.

Models are built on torch's meta device. FLOPs come from their `flops` methods (2 per multiply-add; attention
over the full sequence).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import BaseModel
from torch import nn

from muomni.config.loading import load_preset, resolve, validate
from muomni.config.models import (
    FRAME_RATE_HZ,
    MEL_RATE_HZ,
    SAMPLE_RATE_HZ,
    AudioEncoderConfig,
    ClipConfig,
    CodecConfig,
    OmniConfig,
    TalkerConfig,
    ThinkerConfig,
)
from muomni.config.registry import STAGES, load
from muomni.io.table import format_table
from muomni.models.language.thinker import Thinker
from muomni.models.layers.flops import count_parameters, forward_flops
from muomni.models.omni import OmniModel
from muomni.models.speech.audio_encoder import AudioEncoder, audio_units
from muomni.models.speech.codec import Codec
from muomni.models.speech.talker import Talker, talker_units
from muomni.models.vision.clip import Clip

# Sizes of the units in the last column of the table.
AUDIO_S = 5
CAPTION_TOKENS = 16
SPEECH_CHARACTERS = 80
CONVERSATION_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Row:
    """One stage's model. `active` are the parameters used per token."""

    stage: str
    parameters: int
    active: int
    embedding: int
    forward_flops: int
    unit: str


@dataclass(frozen=True, slots=True)
class CountedModel:
    """How a stage's model is counted; the registry names one per stage.

    `flops(model, seq_len)` are the forward FLOPs of one `unit`; `seq_len` is that of the recipe, 0 without one.
    """

    config: type[BaseModel]
    build: Callable[[Any], nn.Module]
    flops: Callable[[Any, int], int]
    unit: str


def counted_models() -> dict[str, CountedModel]:
    """The counted models by stage."""
    return {name: load(spec.count) for name, spec in STAGES.items() if spec.count is not None}


def count_preset(preset: str, vocab_size: int) -> list[Row]:
    """Return one row per stage of the preset, for a tokenizer of `vocab_size` tokens."""
    configs, rows = model_configs(preset, vocab_size), []
    for stage, counted in counted_models().items():
        with torch.device("meta"):
            model = counted.build(configs[stage])
        count = count_parameters(model)
        flops = counted.flops(model, getattr(resolve(stage, preset).batch, "seq_len", 0))
        rows.append(Row(stage, count.total, count.active, count.embedding, flops, counted.unit))
    return rows


def model_configs(preset: str, vocab_size: int) -> dict[str, Any]:
    """Return the model config of every stage, as the stage would build it."""
    sizes = load_preset(preset)["models"]
    clip = {**sizes["vision_encoder"]}
    clip["text"] = {**clip["text"], "vocab_size": vocab_size}
    codec = validate(CodecConfig, sizes["codec"], f"preset {preset}")
    talker = {
        **sizes["talker"],
        "text_vocab_size": vocab_size,
        "num_codebooks": codec.num_codebooks,
        "codebook_size": codec.codebook_size,
    }
    content: dict[str, Any] = {
        "thinker": {**sizes["thinker"], "vocab_size": vocab_size},
        "audio_encoder": {**sizes["audio_encoder"], "vocab_size": vocab_size},
        "vision_encoder": clip,
        "codec": sizes["codec"],
        "talker": talker,
    }
    content["sft"] = {
        **sizes["sft"],
        **content,
        "vision_encoder": clip["vision"],
        "talker": {**talker, "thinker_hidden_size": sizes["thinker"]["hidden_size"]},
    }
    return {
        stage: validate(counted.config, content[stage], f"preset {preset}")
        for stage, counted in counted_models().items()
    }


def table(preset: str, vocab_size: int, rows: list[Row]) -> str:
    """Format the rows as aligned text."""
    headers = ["stage", "parameters", "active", "embedding", "forward MFLOP", "for"]
    cells = [
        [
            row.stage, f"{row.parameters:,}", f"{row.active:,}", f"{row.embedding:,}",
            f"{row.forward_flops / 1e6:,.1f}", row.unit,
        ]
        for row in rows
    ]  # fmt: skip
    title = f"preset {preset}, {vocab_size:,} tokens"
    return f"{title}\n{format_table(headers, cells)}"


def _thinker_flops(model: Thinker, seq_len: int) -> int:
    units = {"positions": seq_len, "pairs": seq_len**2, "predictions": seq_len}
    return forward_flops(model.flops(), units) // seq_len


def _audio_encoder_flops(model: AudioEncoder, _batch_size: int) -> int:
    return forward_flops(model.flops(), audio_units(_CLIP_SAMPLES)) // AUDIO_S


def _clip_flops(model: Clip, _batch_size: int) -> int:
    units = {"images": 1, "texts": 1, "tokens": CAPTION_TOKENS, "pairs": CAPTION_TOKENS**2}
    return forward_flops(model.flops(), units)


def _codec_flops(model: Codec, _batch_size: int) -> int:
    units = {"mel_frames": MEL_RATE_HZ, "encoded": FRAME_RATE_HZ, "decoded": FRAME_RATE_HZ}
    return forward_flops(model.flops(), units)


def _talker_flops(model: Talker, _batch_size: int) -> int:
    num_characters, num_frames = (
        torch.tensor([number]) for number in (SPEECH_CHARACTERS, AUDIO_S * FRAME_RATE_HZ)
    )
    return forward_flops(model.flops(), talker_units(num_characters, num_frames)) // AUDIO_S


def _omni_flops(model: OmniModel, _batch_size: int) -> int:
    """FLOPs of one conversation, without a spoken answer."""
    num_audio = -(-AUDIO_S * FRAME_RATE_HZ // model.config.audio_stack)
    audio, joined = audio_units(_CLIP_SAMPLES), {"images": 1, "audio_positions": num_audio}
    if model.config.ctc_embeddings:
        joined["ctc_positions"] = num_audio
    else:
        del audio["logits"]
    num_positions = CONVERSATION_TOKENS + model.config.num_image_tokens + num_audio
    text = {
        "positions": num_positions,
        "pairs": num_positions**2,
        "predictions": CONVERSATION_TOKENS,
    }
    return (
        model.vision_encoder.flops().forward
        + forward_flops(model.audio_encoder.flops(), audio)
        + forward_flops(model.flops(), joined)
        + forward_flops(model.thinker.flops(), text)
    )


_CLIP_SAMPLES = torch.tensor([AUDIO_S * SAMPLE_RATE_HZ])
THINKER = CountedModel(
    ThinkerConfig, Thinker, _thinker_flops, "a token, in sequences of the recipe's length"
)
AUDIO_ENCODER = CountedModel(
    AudioEncoderConfig, AudioEncoder, _audio_encoder_flops,
    f"a second of speech, in audio clips of {AUDIO_S} s",
)  # fmt: skip
VISION_ENCODER = CountedModel(
    ClipConfig, Clip, _clip_flops, f"an image and a caption of {CAPTION_TOKENS} tokens"
)
CODEC = CountedModel(
    CodecConfig, Codec, _codec_flops, f"a second of speech, in audio clips of {AUDIO_S} s"
)
TALKER = CountedModel(
    TalkerConfig, Talker, _talker_flops,
    f"a second of speech, {SPEECH_CHARACTERS} characters in {AUDIO_S} s",
)  # fmt: skip
OMNI = CountedModel(
    OmniConfig, OmniModel, _omni_flops,
    f"a conversation: {CONVERSATION_TOKENS} tokens of text, an image, {AUDIO_S} s of speech",
)  # fmt: skip
