"""Parameters and forward FLOPs of each stage's model, without allocating it.

Models are built on torch's meta device, FLOPs follow the formulas beside the models (2 a multiplication
with its addition, attention over all keys of a row).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
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
from muomni.config.registry import STAGES
from muomni.io.table import format_table
from muomni.models.language.thinker import Thinker
from muomni.models.layers.flops import count_parameters, talker_flops, thinker_flops
from muomni.models.omni import (
    OmniModel,
    audio_projector_flops,
    image_projector_flops,
    spelling_flops,
)
from muomni.models.speech.audio_encoder import AudioEncoder, audio_encoder_flops
from muomni.models.speech.codec import Codec, codec_flops
from muomni.models.speech.talker import Talker
from muomni.models.vision.clip import Clip, clip_image_flops, clip_text_flops
from muomni.models.vision.vision_encoder import vision_encoder_flops

# What a unit of the table's last column is made of.
AUDIO_S = 5
CAPTION_TOKENS = 16
SPEECH_CHARACTERS = 80
CONVERSATION_TOKENS = 64
UNITS = {
    "thinker": "a token, in rows of the recipe's length",
    "audio_encoder": f"a second of speech, in audio clips of {AUDIO_S} s",
    "vision_encoder": f"an image and a caption of {CAPTION_TOKENS} tokens",
    "codec": f"a second of speech, in audio clips of {AUDIO_S} s",
    "talker": f"a second of speech, {SPEECH_CHARACTERS} characters said in {AUDIO_S} s",
    "sft": f"a conversation: {CONVERSATION_TOKENS} tokens of text, an image, {AUDIO_S} s of speech",
}


@dataclass(frozen=True, slots=True)
class Row:
    """One stage's model. `active` parameters are those that one token uses."""

    stage: str
    parameters: int
    active: int
    embedding: int
    forward_flops: int
    unit: str


def count_preset(preset: str, vocab_size: int) -> list[Row]:
    """One row a stage of the preset, for a tokenizer of `vocab_size` pieces."""
    configs = model_configs(preset, vocab_size)
    rows = []
    for stage in STAGES:
        with torch.device("meta"):
            count = count_parameters(_BUILDERS[stage](configs[stage]))
        seq_len = getattr(resolve(stage, preset).batch, "seq_len", 0)
        flops = _FLOPS[stage](configs[stage], seq_len)
        rows.append(Row(stage, count.total, count.active, count.embedding, flops, UNITS[stage]))
    return rows


def model_configs(preset: str, vocab_size: int) -> dict[str, Any]:
    """The sizes of every stage's model, completed as the stages complete them."""
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
        stage: validate(_CONFIG_TYPES[stage], content[stage], f"preset {preset}")
        for stage in STAGES
    }


def table(preset: str, vocab_size: int, rows: list[Row]) -> str:
    """The rows as aligned text."""
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


def _thinker_flops(config: ThinkerConfig, row_length: int) -> int:
    return thinker_flops(config, row_length).total // row_length


def _audio_encoder_flops(config: AudioEncoderConfig, _batch_size: int) -> int:
    return audio_encoder_flops(config, AUDIO_S * SAMPLE_RATE_HZ).total // AUDIO_S


def _clip_flops(config: ClipConfig, _batch_size: int) -> int:
    return (clip_image_flops(config) + clip_text_flops(config, CAPTION_TOKENS)).total


def _codec_flops(config: CodecConfig, _batch_size: int) -> int:
    return codec_flops(config, AUDIO_S * MEL_RATE_HZ).total // AUDIO_S


def _talker_flops(config: TalkerConfig, _batch_size: int) -> int:
    frames = AUDIO_S * FRAME_RATE_HZ
    return talker_flops(config, SPEECH_CHARACTERS, frames).total // AUDIO_S


def _omni_flops(config: OmniConfig, _batch_size: int) -> int:
    """Reading one conversation: towers, projectors, Thinker; not what is spoken."""
    frames, samples = AUDIO_S * FRAME_RATE_HZ, AUDIO_S * SAMPLE_RATE_HZ
    positions = CONVERSATION_TOKENS + config.num_image_tokens + -(-frames // config.audio_stack)
    parts = (
        vision_encoder_flops(config.vision_encoder),
        image_projector_flops(config),
        audio_encoder_flops(config.audio_encoder, samples, config.ctc_embeddings),
        audio_projector_flops(config, frames),
        spelling_flops(config, frames),
        thinker_flops(config.thinker, positions, CONVERSATION_TOKENS),
    )
    return sum(part.total for part in parts)


_CONFIG_TYPES: dict[str, Any] = {
    "thinker": ThinkerConfig,
    "audio_encoder": AudioEncoderConfig,
    "vision_encoder": ClipConfig,
    "codec": CodecConfig,
    "talker": TalkerConfig,
    "sft": OmniConfig,
}
_BUILDERS: dict[str, Callable[[Any], nn.Module]] = {
    "thinker": Thinker,
    "audio_encoder": AudioEncoder,
    "vision_encoder": Clip,
    "codec": Codec,
    "talker": Talker,
    "sft": OmniModel,
}
_FLOPS: dict[str, Callable[[Any, int], int]] = {
    "thinker": _thinker_flops,
    "audio_encoder": _audio_encoder_flops,
    "vision_encoder": _clip_flops,
    "codec": _codec_flops,
    "talker": _talker_flops,
    "sft": _omni_flops,
}
