"""Corpora that the benchmarks make themselves: texts, photograph-like images, speech-like audio clips.

What is costly to make (an image, an audio clip) is made a few times and repeated under other keys; each
sample still has bytes of its own in the shards.
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
# Each octave of detail has this share of the contrast of the one below: about that of photographs.
_DETAIL = 0.75


def write_dataset(
    root: Path, task: Task, samples: Iterator[Sample], shard_samples: int
) -> Manifest:
    """A finished dataset of one split, `train`, in shards of `shard_samples`."""
    records = []
    following = next(samples, None)
    while following is not None:
        path = f"train/{root.name}-train-{len(records):06d}.tar"
        with ShardWriter(root, path, "train") as writer:
            for _ in range(shard_samples):
                if following is None:
                    break
                key, members, cost = following
                writer.add(key, members, key, cost)
                following = next(samples, None)
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
    """The tars of the training split, as other readers are given them."""
    return [str(manifest.root / shard.path) for shard in manifest.split("train").shards]


def sentences(num: int, num_words: int, seed: int = 0) -> list[str]:
    """Sentences of made-up words, common and rare ones as in a language (Zipf)."""
    random = np.random.default_rng(seed)
    words = ["".join(random.choice(_SYLLABLES, random.integers(1, 4))) for _ in range(_NUM_WORDS)]
    shares = 1 / np.arange(1, _NUM_WORDS + 1)
    drawn = random.choice(_NUM_WORDS, (num, num_words), p=shares / shares.sum())
    return [" ".join(words[number] for number in row) for row in drawn.tolist()]


def texts(num: int) -> Iterator[Sample]:
    """Texts of about 100 bytes."""
    for number, line in enumerate(sentences(num, 20)):
        yield f"t{number:08d}", [("txt", line.encode())], SampleCost(num_chars=len(line))


def images(num: int, size: tuple[int, int], quality: int, num_distinct: int) -> Iterator[Sample]:
    """JPEGs of `size` (width, height), each with a caption."""
    made = [_image(seed, size, quality) for seed in range(min(num, num_distinct))]
    for number, caption in enumerate(sentences(num, 10, seed=1)):
        cost = SampleCost(num_chars=len(caption), num_pixels=size[0] * size[1], num_images=1)
        members = [("jpg", made[number % len(made)]), ("txt", caption.encode())]
        yield f"p{number:08d}", members, cost


def _image(seed: int, size: tuple[int, int], quality: int) -> bytes:
    """Noise of all scales, coarse ones strongest, as JPEG."""
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
    """FLACs of 2 to 16 s, most of them long as in read speech, each with a transcript."""
    random = np.random.default_rng(0)
    durations_s = np.clip(17 - random.gamma(2.0, 2.5, num_distinct), 2, 16)
    made = [_audio(float(s), rate_hz, random) for s in durations_s[: min(num, num_distinct)]]
    for number, transcript in enumerate(sentences(num, 25, seed=2)):
        place = number % len(made)
        cost = SampleCost(
            duration_ms=round(1000 * float(durations_s[place])),
            num_chars=len(transcript),
            num_audios=1,
        )
        members = [("flac", made[place]), ("txt", transcript.encode())]
        yield f"s{number:08d}", members, cost


def _audio(duration_s: float, rate_hz: int, random: np.random.Generator) -> bytes:
    """Harmonics under a slow envelope, with noise: compresses about as far as speech."""
    time = np.arange(int(duration_s * rate_hz)) / rate_hz
    pitch = 2 * np.pi * np.cumsum(130 + 30 * np.sin(2 * np.pi * 0.7 * time)) / rate_hz
    voice = sum(np.sin(k * pitch) / k for k in range(1, 12))
    envelope = np.clip(np.sin(2 * np.pi * 2.1 * time), 0, None)
    waveform = 0.15 * envelope * voice + 0.003 * random.standard_normal(len(time))
    buffer = io.BytesIO()
    soundfile.write(buffer, waveform, rate_hz, format="FLAC", subtype="PCM_16")
    return buffer.getvalue()
