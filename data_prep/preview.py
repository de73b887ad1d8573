"""Shows samples of a split: a text table, a contact sheet of pictures, spectrograms of recordings."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from data_prep.sample_figures import media_of
from data_prep.train_tokenizer import sample_texts
from muomni.data.decode import AUDIO_EXTENSIONS, IMAGE_EXTENSIONS, decode_image, read_audio
from muomni.data.manifest import Manifest
from muomni.data.shard_reader import SplitReader

_TILE = 128
_TEXT_WIDTH = 100
_NUM_FFT, _HOP = 512, 160


def describe(manifest: Manifest, split: str, num_samples: int) -> str:
    """The first samples of a split, a line each: key, members, length of audio, text."""
    reader = SplitReader(manifest, split)
    lines = []
    for index in range(min(num_samples, len(reader))):
        sample = reader.read(index)
        seconds = reader.columns[index]["duration_ms"] / 1000
        members = " ".join(sorted(name for name in sample if name != "__key__"))
        length = f"{seconds:6.2f} s  " if seconds else ""
        lines.append(f"{sample['__key__']}  [{members}]  {length}{_text(sample, manifest.task)}")
    return "\n".join(lines)


def sheet(manifest: Manifest, split: str, num_samples: int) -> Image.Image | None:
    """All pictures and spectrograms of the first samples in one picture; None without media."""
    reader = SplitReader(manifest, split)
    tiles = []
    for index in range(min(num_samples, len(reader))):
        sample = reader.read(index)
        tiles += [
            decode_image(d, _TILE).transpose(1, 2, 0) for _, d in media_of(sample, IMAGE_EXTENSIONS)
        ]
        tiles += [spectrogram(d) for _, d in media_of(sample, AUDIO_EXTENSIONS)]
    if not tiles:
        return None
    num_columns = int(np.ceil(np.sqrt(len(tiles))))
    num_rows = -(-len(tiles) // num_columns)
    picture = Image.new("RGB", (num_columns * _TILE, num_rows * _TILE), "white")
    for number, tile in enumerate(tiles):
        place = (number % num_columns * _TILE, number // num_columns * _TILE)
        picture.paste(Image.fromarray(tile), place)
    return picture


def save_sheet(manifest: Manifest, split: str, num_samples: int, path: Path) -> bool:
    """Write the sheet as a picture file; False when the samples have no media."""
    picture = sheet(manifest, split, num_samples)
    if picture is None:
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)
    return True


def spectrogram(data: bytes) -> np.ndarray:
    """A recording as uint8 [tile, tile, 3]: time to the right, low frequencies below, 80 dB."""
    samples, _ = read_audio(data)
    mono = np.pad(samples.mean(axis=1), (0, max(0, _NUM_FFT - len(samples))))
    frames = np.lib.stride_tricks.sliding_window_view(mono, _NUM_FFT)[::_HOP]
    power = np.abs(np.fft.rfft(frames * np.hanning(_NUM_FFT))) ** 2
    decibels = 10 * np.log10(power.T[::-1] + 1e-10)
    scaled = np.clip((decibels - decibels.max() + 80) / 80, 0, 1)
    image = Image.fromarray((255 * (1 - scaled)).astype(np.uint8)).resize((_TILE, _TILE))
    return np.repeat(np.asarray(image)[:, :, None], 3, axis=2)


def _text(sample: dict[str, bytes | str], task: str) -> str:
    if task == "sft":
        turns = json.loads(sample["json"])["turns"]
        text = " / ".join(f"{turn['role']}: {_parts(turn['content'])}" for turn in turns)
    else:
        text = " | ".join(sample_texts(sample, task))
    text = " ".join(text.split())
    return text if len(text) <= _TEXT_WIDTH else text[: _TEXT_WIDTH - 3] + "..."


def _parts(content: list[dict[str, str]]) -> str:
    return " ".join(part.get("text", f"<{part.get('name')}>") for part in content)
