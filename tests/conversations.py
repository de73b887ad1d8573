"""Toy conversations that tests of the omni model share: colors to name, tones to name, words to say.

Images are one color, audio clips one tone with a little noise, so that small models learn them in
seconds, and only by looking and listening.
"""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from PIL import Image

from muomni.checkpoint.export import write_export
from muomni.config.models import (
    SAMPLE_RATE_HZ,
    AudioEncoderConfig,
    ClipConfig,
    CodecConfig,
    OmniConfig,
    TalkerConfig,
    ThinkerConfig,
)
from muomni.data.shards.manifest import Manifest
from muomni.data.shards.writer import SampleCost
from muomni.data.text.tokenizer import Tokenizer
from tests.corpora import Sample, write_dataset

COLORS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 220), "white": (250,) * 3}
TONES = {"low": 200.0, "middle": 700.0, "high": 2400.0}
STACK = {
    "hidden_size": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8,
    "intermediate_size": 64,
}  # fmt: skip
TOWER = {**STACK, "num_kv_heads": 4}
SIZES: dict[str, dict[str, Any]] = {
    "thinker": {**STACK, "max_positions": 256},
    "audio_encoder": {**STACK, "conv_channels": 8, "conv_kernel_size": 5, "dropout": 0.0},
    "vision_encoder": {
        "embedding_size": 16,
        "vision": {**TOWER, "image_size": 32, "patch_size": 16},
        "text": {**TOWER, "max_positions": 16},
    },
    "codec": {
        "hidden_size": 16, "latent_size": 8, "num_blocks": 1, "num_codebooks": 2, "codebook_size": 16,
    },
    "talker": {**STACK, "dropout": 0.0, "frame_dropout": 0.0},
}  # fmt: skip


def png(color: tuple[int, int, int], mode: str = "RGB", size: int = 40) -> bytes:
    """An image of one color."""
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), color).convert(mode).save(buffer, "PNG")
    return buffer.getvalue()


def tone(
    hz: float,
    duration_s: float = 0.4,
    rate_hz: int = SAMPLE_RATE_HZ,
    seed: int = 0,
    kind: str = "WAV",
) -> bytes:
    """A sound file of a tone with a little noise."""
    time_s = np.arange(round(duration_s * rate_hz)) / rate_hz
    noise = np.random.default_rng(seed).normal(0, 0.01, len(time_s))
    buffer = io.BytesIO()
    samples = 0.4 * np.sin(2 * np.pi * hz * time_s) + noise
    soundfile.write(buffer, samples.astype(np.float32), rate_hz, format=kind)
    return buffer.getvalue()


def text_part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def sample(key: str, turns: list[tuple[str, list[dict[str, str]]]], **media: bytes) -> Sample:
    """An sft sample; media are given as image0=..., audio1=... (kind and number in the sample)."""
    members = []
    for name, data in media.items():
        kind, number = name[:5], name[5:]
        members.append((f"{number}.{'png' if kind == 'image' else 'wav'}", data))
    content = {"turns": [{"role": role, "content": parts} for role, parts in turns]}
    cost = SampleCost(num_images=sum(n.startswith("image") for n in media))
    return key, [("json", json.dumps(content).encode()), *members], cost


IMAGE_0 = {"type": "image", "name": "0.png"}
AUDIO_0 = {"type": "audio", "name": "0.wav"}


def color_sample(key: str, name: str) -> Sample:
    """Name the color of an image."""
    turns = [("user", [IMAGE_0, text_part("the door")]), ("assistant", [text_part(name)])]
    return sample(key, turns, image0=png(COLORS[name]))


def tone_sample(key: str, name: str, seed: int = 0) -> Sample:
    """Name the pitch of an audio clip."""
    turns = [("user", [AUDIO_0, text_part("the river")]), ("assistant", [text_part(name)])]
    return sample(key, turns, audio0=tone(TONES[name], seed=seed))


def speech_sample(key: str, name: str, seed: int = 0) -> Sample:
    """Say a word: the spoken answer is the tone of that name."""
    answer = [text_part(name), AUDIO_0]
    turns = [("user", [text_part(f"say {name}")]), ("assistant", answer)]
    return sample(key, turns, audio0=tone(TONES[name], seed=seed))


def write_sft_dataset(root: Path, num_each: int = 4) -> Manifest:
    """Colors, tones and spoken tones; splits train, val and test hold the same kinds."""
    splits = {}
    for number, split in enumerate(("train", "val", "test")):
        samples = []
        for i in range(num_each):
            seed = 1000 * number + i
            samples += [color_sample(f"{split}-{c}{i}", c) for c in COLORS]
            samples += [tone_sample(f"{split}-{t}{i}", t, seed) for t in TONES]
            samples += [speech_sample(f"{split}-say-{t}{i}", t, seed) for t in TONES]
        splits[split] = samples
    return write_dataset(root, "sft", splits)


def write_tts_dataset(root: Path, num_each: int = 4) -> Manifest:
    """The names of the tones with the tones, of two durations."""
    splits = {}
    for number, split in enumerate(("train", "val")):
        samples: list[Sample] = []
        for i in range(num_each):
            for name, hz in TONES.items():
                data = tone(hz, duration_s=0.3 + 0.2 * (i % 2), seed=100 * number + i)
                members = [("wav", data), ("txt", name.encode())]
                cost = SampleCost(duration_ms=300 + 200 * (i % 2), num_chars=len(name))
                samples.append((f"{split}-{name}{i}", members, cost))
        splits[split] = samples
    return write_dataset(root, "tts", splits)


def omni_config(tokenizer: Tokenizer, with_talker: bool = True, **changes: Any) -> OmniConfig:
    """Sizes of a toy omni model."""
    size = tokenizer.vocab_size
    talker = {**SIZES["talker"], "text_vocab_size": size, "num_codebooks": 2, "codebook_size": 16}
    content = {
        "thinker": {**SIZES["thinker"], "vocab_size": size},
        "audio_encoder": {**SIZES["audio_encoder"], "vocab_size": size},
        "vision_encoder": SIZES["vision_encoder"]["vision"],
        "talker": {**talker, "thinker_hidden_size": 32} if with_talker else None,
        "codec": SIZES["codec"] if with_talker else None,
        "projector_hidden_size": 32,
        **changes,
    }
    return OmniConfig.model_validate(content)


def write_upstream(run: Path, tokenizer: Tokenizer) -> None:
    """Exports of all stages below sft, with random weights; codes of the codec are spread out."""
    import torch

    from muomni.config.loading import resolve
    from muomni.models.language.thinker import Thinker
    from muomni.models.speech.audio_encoder import AudioEncoder
    from muomni.models.speech.codec import Codec
    from muomni.models.speech.talker import Talker
    from muomni.models.vision.clip import Clip

    torch.manual_seed(5)
    size = tokenizer.vocab_size
    clip_sizes = SIZES["vision_encoder"]
    clip_sizes = {**clip_sizes, "text": {**clip_sizes["text"], "vocab_size": size}}
    talker_sizes = {
        **SIZES["talker"], "text_vocab_size": size, "num_codebooks": 2, "codebook_size": 16,
    }  # fmt: skip
    models: dict[str, Any] = {
        "thinker": Thinker(ThinkerConfig(**SIZES["thinker"], vocab_size=size)),
        "audio_encoder": AudioEncoder(
            AudioEncoderConfig(**SIZES["audio_encoder"], vocab_size=size)
        ),
        "vision_encoder": Clip(ClipConfig.model_validate(clip_sizes)),
        "codec": Codec(CodecConfig(**SIZES["codec"])),
        "talker": Talker(TalkerConfig(**talker_sizes)),
    }
    quantizer = models["codec"].quantizer
    quantizer.codebooks.normal_(std=0.1)
    quantizer.num_filled.fill_(2)
    upstream: dict[str, str] = {}
    for stage, model in models.items():
        folder = run / stage / "export"
        folder.parent.mkdir(parents=True, exist_ok=True)
        config = resolve(stage, "nano", None, {"model": SIZES[stage]}).model_dump(mode="json")
        about = {"preset": "nano", "step": 0, "config": config, "upstream": dict(upstream)}
        write_export(folder, stage, model.state_dict(), model.config, tokenizer, {}, about)
        content = json.loads((folder / "export.json").read_text())
        upstream[stage] = content["sha256"]["model.safetensors"]
