"""Tiny datasets with audio clips and images, made of tones and colored shapes."""

import io
import json
from pathlib import Path

import numpy as np
import soundfile
from PIL import Image, ImageDraw

from muomni.data.shards.manifest import Manifest, Task
from muomni.data.shards.writer import SampleCost
from tests.corpora import Sample, write_dataset

RATE_HZ = 16_000
# Each word is a chord, so that speech of these words can be recognized.
WORDS = ("the", "cat", "old", "river", "door", "train", "again", "care")
_WORD_S = 0.24
COLORS = ("red", "green", "blue", "yellow", "black", "purple", "orange", "gray")
SHAPES = ("circle", "square", "bar", "pole")


def flac(waveform: np.ndarray, rate_hz: int = RATE_HZ) -> bytes:
    """A waveform as the bytes of a FLAC file."""
    buffer = io.BytesIO()
    soundfile.write(buffer, waveform, rate_hz, format="FLAC")
    return buffer.getvalue()


def say(words: list[str], seed: int = 0) -> np.ndarray:
    """Words as chords, with a little noise."""
    random = np.random.default_rng(seed)
    time_s = np.arange(int(_WORD_S * RATE_HZ)) / RATE_HZ
    envelope = np.sin(np.pi * time_s / _WORD_S) ** 2
    sounds = []
    for word in words:
        base_hz = 200 * 1.35 ** WORDS.index(word) * random.uniform(0.99, 1.01)
        sounds.append(
            envelope * sum(np.sin(2 * np.pi * n * base_hz * time_s) / n for n in (1, 2, 3))
        )
    clean = 0.2 * np.concatenate(sounds)
    return (clean + 0.0002 * random.standard_normal(len(clean))).astype(np.float32)


def speech_sample(key: str, words: list[str], seed: int) -> Sample:
    """One sample of a speech or tts dataset."""
    waveform = say(words, seed)
    text = " ".join(words)
    about = json.dumps({"text": text, "sample_rate_hz": RATE_HZ})
    members = [("flac", flac(waveform)), ("txt", text.encode()), ("json", about.encode())]
    duration_ms = round(len(waveform) * 1000 / RATE_HZ)
    return key, members, SampleCost(duration_ms, num_chars=len(text), num_audios=1)


def write_speech_dataset(
    root: Path, num_train: int = 32, num_val: int = 6, task: Task = "speech"
) -> Manifest:
    """Audio clips of one to four words."""
    random = np.random.default_rng(7)
    splits = {}
    for split, count in (("train", num_train), ("val", num_val)):
        chosen = [list(random.choice(WORDS, random.integers(1, 5))) for _ in range(count)]
        splits[split] = [
            speech_sample(f"{split}{i:04d}", words, seed=i) for i, words in enumerate(chosen)
        ]
    return write_dataset(root, task, splits)


def image(color: str, shape: str, offset: int = 0) -> bytes:
    """A shape on a transparent ground, as the bytes of an RGBA PNG."""
    image = Image.new("RGBA", (40, 32), (0, 0, 0, 0))
    box = {"circle": (8, 6, 28, 26), "square": (8, 6, 28, 26), "bar": (2, 12, 36, 20)}
    draw = ImageDraw.Draw(image)
    corners = tuple(
        v + offset * (i % 2 == 0) for i, v in enumerate(box.get(shape, (16, 2, 24, 30)))
    )
    (draw.ellipse if shape == "circle" else draw.rectangle)(corners, fill=color)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def image_sample(key: str, data: bytes, captions: list[str]) -> Sample:
    """One sample of an image-caption dataset."""
    about = json.dumps({"captions": captions}).encode()
    members = [("png", data), ("json", about), ("txt", captions[0].encode())]
    return key, members, SampleCost(num_pixels=40 * 32, num_images=1)


def write_image_dataset(root: Path, num_train: int = 64, num_val: int = 10) -> Manifest:
    """Colored shapes; images of the same thing have the same first caption."""
    things = [(color, shape) for shape in SHAPES for color in COLORS]
    splits = {
        split: [
            image_sample(
                f"{split}{i:04d}",
                image(*things[i % len(things)], offset=i // len(things)),
                [" ".join(things[i % len(things)]), f"a {things[i % len(things)][1]}"],
            )
            for i in range(count)
        ]
        for split, count in (("train", num_train), ("val", num_val))
    }
    return write_dataset(root, "image-caption", splits)
