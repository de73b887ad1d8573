"""Synthetic corpora for benchmarks: texts, photograph-like images, and speech-like audio clips.

A few distinct images and audio clips are generated and repeated under new keys; each sample still has its
own bytes in the shards.
"""

import io
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import soundfile
from PIL import Image

from muomni.data.shards.manifest import MANIFEST_NAME, Manifest, Split, Task, fingerprint
from muomni.data.shards.writer import SampleCost, ShardWriter

Sample = tuple[str, list[tuple[str, bytes]], SampleCost]

_NUM_WORDS = 2000
_SYLLABLES = re.findall("..", "bacedifoguhajekilomunaperisotuvawexiyozu")
# Contrast ratio of successive octaves, similar to photographs.
_DETAIL = 0.75


def write_dataset(
    root: Path, task: Task, samples: Iterator[Sample], shard_samples: int
) -> Manifest:
    """Write a dataset with the split `train`, in shards of `shard_samples`."""
    records = []
    upcoming = next(samples, None)
    while upcoming is not None:
        path = f"train/{root.name}-train-{len(records):06d}.tar"
        with ShardWriter(root, path, "train") as writer:
            for _ in range(shard_samples):
                if upcoming is None:
                    break
                key, members, cost = upcoming
                writer.add(key, members, key, cost)
                upcoming = next(samples, None)
        assert writer.record is not None
        records.append(writer.record)
    splits = {"train": Split(shards=tuple(records))}
    manifest = Manifest(
        root=root, name=root.name, task=task, reader="made", split_rule="given",
        fingerprint=fingerprint(splits), splits=splits,
    )  # fmt: skip
    (root / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")
    return manifest


def tar_paths(manifest: Manifest) -> list[str]:
    """The tar files of the training split, for other readers."""
    return [str(manifest.root / shard.path) for shard in manifest.split("train").shards]


def sentences(num: int, num_words: int, seed: int = 0) -> list[str]:
    """Sentences of random words with Zipf frequencies."""
    random = np.random.default_rng(seed)
    words = ["".join(random.choice(_SYLLABLES, random.integers(1, 4))) for _ in range(_NUM_WORDS)]
    shares = 1 / np.arange(1, _NUM_WORDS + 1)
    sampled = random.choice(_NUM_WORDS, (num, num_words), p=shares / shares.sum())
    return [" ".join(words[number] for number in row) for row in sampled.tolist()]


def texts(num: int) -> Iterator[Sample]:
    """Texts of about 100 bytes."""
    for number, line in enumerate(sentences(num, 20)):
        yield f"t{number:08d}", [("txt", line.encode())], SampleCost(num_chars=len(line))


def images(num: int, size: tuple[int, int], quality: int, num_distinct: int) -> Iterator[Sample]:
    """JPEGs of `size` (width, height), each with a caption."""
    distinct = [_image(seed, size, quality) for seed in range(min(num, num_distinct))]
    for number, caption in enumerate(sentences(num, 10, seed=1)):
        cost = SampleCost(num_chars=len(caption), num_pixels=size[0] * size[1], num_images=1)
        members = [("jpg", distinct[number % len(distinct)]), ("txt", caption.encode())]
        yield f"p{number:08d}", members, cost


def _image(seed: int, size: tuple[int, int], quality: int) -> bytes:
    """JPEG of multi-scale noise with decreasing contrast."""
    random = np.random.default_rng(seed)
    width, height = size
    light = np.zeros((height, width, 3), dtype=np.float32)
    cells, contrast = 2, 50.0
    while cells < width:
        shape = (max(2, cells * height // width), cells, 3)
        noise = random.standard_normal(shape).astype(np.float32)
        for channel in range(3):
            layer = Image.fromarray(noise[..., channel])
            light[..., channel] += contrast * np.asarray(
                layer.resize(size, Image.Resampling.BICUBIC)
            )
        cells, contrast = 2 * cells, contrast * _DETAIL
    buffer = io.BytesIO()
    levels = np.clip(128 + light, 0, 255).astype(np.uint8)
    Image.fromarray(levels).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def audio_clips(num: int, rate_hz: int, num_distinct: int) -> Iterator[Sample]:
    """FLACs of 2 to 16 s with the durations of read speech (mostly long), each with a transcript."""
    random = np.random.default_rng(0)
    durations_s = np.clip(17 - random.gamma(2.0, 2.5, num_distinct), 2, 16)
    distinct = [_audio(float(s), rate_hz, random) for s in durations_s[: min(num, num_distinct)]]
    for number, transcript in enumerate(sentences(num, 25, seed=2)):
        index = number % len(distinct)
        cost = SampleCost(
            duration_ms=round(1000 * float(durations_s[index])),
            num_chars=len(transcript),
            num_audios=1,
        )
        members = [("flac", distinct[index]), ("txt", transcript.encode())]
        yield f"s{number:08d}", members, cost


def _audio(duration_s: float, rate_hz: int, random: np.random.Generator) -> bytes:
    """Harmonics with a slow envelope and noise, which compress about as well as speech."""
    time = np.arange(int(duration_s * rate_hz)) / rate_hz
    pitch = 2 * np.pi * np.cumsum(130 + 30 * np.sin(2 * np.pi * 0.7 * time)) / rate_hz
    voice = sum(np.sin(k * pitch) / k for k in range(1, 12))
    envelope = np.clip(np.sin(2 * np.pi * 2.1 * time), 0, None)
    waveform = 0.15 * envelope * voice + 0.003 * random.standard_normal(len(time))
    buffer = io.BytesIO()
    soundfile.write(buffer, waveform, rate_hz, format="FLAC", subtype="PCM_16")
    return buffer.getvalue()
