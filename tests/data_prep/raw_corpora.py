"""Tiny raw corpora in public layouts."""

import io
import json
from pathlib import Path

import numpy as np
import soundfile
from PIL import Image


def image(number: int, mode: str = "RGB", kind: str = "PNG") -> bytes:
    """A small image whose color depends on `number`."""
    buffer = io.BytesIO()
    color = (number * 37 % 256, number * 59 % 256, number * 83 % 256, 128)[: len(mode)]
    Image.new(mode, (24, 18), color).save(buffer, kind)
    return buffer.getvalue()


def audio(
    number: int,
    duration_s: float = 0.3,
    rate: int = 16_000,
    fmt: str = "WAV",
    subtype: str | None = None,
) -> bytes:
    """A tone whose pitch depends on `number`."""
    buffer = io.BytesIO()
    time = np.arange(int(duration_s * rate)) / rate
    tone = 0.3 * np.sin(2 * np.pi * (200 + 20 * number) * time)
    soundfile.write(buffer, tone, rate, subtype, format=fmt)
    return buffer.getvalue()


def write_coco(root: Path, num_images: int = 12) -> Path:
    """COCO captions with `num_images` images in train2017."""
    (root / "train2017").mkdir(parents=True)
    (root / "annotations").mkdir()
    images = [{"id": n, "file_name": f"{n:012d}.png"} for n in range(1, num_images + 1)]
    for entry in images:
        (root / "train2017" / entry["file_name"]).write_bytes(image(entry["id"]))
    captions = [
        {"id": n, "image_id": n, "caption": f"thing number {n}"} for n in range(1, num_images + 1)
    ]
    write_annotations(root, images, captions)
    return root


def write_annotations(root: Path, images: list[dict], captions: list[dict]) -> None:
    content = {"images": images, "annotations": captions}
    path = root / "annotations" / "captions_train2017.json"
    path.write_text(json.dumps(content), encoding="utf-8")


def read_annotations(root: Path) -> tuple[list[dict], list[dict]]:
    path = root / "annotations" / "captions_train2017.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    return content["images"], content["annotations"]


def write_ljspeech(root: Path, texts: list[str]) -> Path:
    """LJSpeech with one tone per text."""
    (root / "wavs").mkdir(parents=True)
    lines = []
    for number, text in enumerate(texts):
        (root / "wavs" / f"LJ-{number:04d}.wav").write_bytes(audio(number))
        lines.append(f"LJ-{number:04d}|{text}|{text}\n")
    (root / "metadata.csv").write_text("".join(lines), encoding="utf-8")
    return root


def write_librispeech(
    root: Path, subset: str = "train-clean-100", chapters: int = 3, speaker: int = 19
) -> Path:
    """LibriSpeech with two utterances per chapter."""
    for chapter in range(chapters):
        folder = root / subset / f"{speaker}" / f"{100 + chapter}"
        folder.mkdir(parents=True)
        stem = f"{speaker}-{100 + chapter}"
        lines = []
        for number in range(2):
            data = audio(number, rate=11_025, fmt="FLAC")
            (folder / f"{stem}-{number:04d}.flac").write_bytes(data)
            lines.append(f"{stem}-{number:04d} HELLO CHAPTER {chapter} LINE {number}\n")
        (folder / f"{stem}.trans.txt").write_text("".join(lines), encoding="utf-8")
    return root
