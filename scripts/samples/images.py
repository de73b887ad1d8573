"""Images of the sample corpora, in the layout of COCO captions: clothing, digits, and emoji.

All have dark strokes or colors on white, so that shifted images need no other background.
"""

import gzip
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from muomni.data.shards.manifest import hash64
from scripts.samples.vocabulary import CLOTHING, DIGITS, EMOJI, ICONS, UNSEEN_NAMES, fraction

STYLES = ("noto", "openmoji", "fluent-emoji-flat", "twemoji")
HELD_OUT_STYLE = "twemoji"
SPLITS = ("train", "val", "test")
# Annotation files, so that the few emoji can have a weight of their own.
_CORPORA = {"": ("clothing", "digit"), "_emoji": ("emoji", "unseen_name")}
_CLOTHING_PER_CLASS = {"train": 500, "val": 30, "test": 30}
# load_digits is in the order of its writers, so the last images are by other writers than the first.
_NUM_TRAIN_DIGITS, _NUM_VAL_DIGITS = 1300, 150
_VAL_EMOJI = 0.12
_EMOJI_SIDE, _EMOJI_COLORS = 64, 48


@dataclass(frozen=True, slots=True)
class NamedImage:
    """An image: its path in the corpora, what it shows, and its type."""

    split: str
    file: str
    name: str
    type: str

    @property
    def path(self) -> str:
        return f"images/{self.split}2017/{self.file}"


def build_images(out: Path, fashion: Path, npm: Path) -> list[NamedImage]:
    """Write the COCO folder `out`/images; `fashion` and `npm` are the folders of the sources."""
    images = []
    for split in SPLITS:
        (out / "images" / f"{split}2017").mkdir(parents=True, exist_ok=True)
    sources = (read_clothing(fashion), read_digits(), render_emoji(npm))
    for named, image in (pair for source in sources for pair in source):
        image.save(out / named.path, compress_level=0)  # the archive compresses better
        images.append(named)
    (out / "images/annotations").mkdir()
    for suffix, types in _CORPORA.items():
        chosen = [named for named in images if named.type in types]
        write_captions(out / "images/annotations", suffix, chosen)
    return images


def write_captions(folder: Path, suffix: str, images: list[NamedImage]) -> None:
    """Write `captions_SPLIT2017SUFFIX.json` of each split."""
    for split in SPLITS:
        chosen = [named for named in images if named.split == split]
        content = {
            "images": [
                {"id": number, "file_name": named.file, "type": named.type}
                for number, named in enumerate(chosen, start=1)
            ],
            "annotations": [
                {"id": number, "image_id": number, "caption": named.name}
                for number, named in enumerate(chosen, start=1)
            ],
        }
        text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
        (folder / f"captions_{split}2017{suffix}.json").write_text(text + "\n", encoding="utf-8")


def read_clothing(folder: Path) -> Iterator[tuple[NamedImage, Image.Image]]:
    """Fashion-MNIST: train and val from its training images, test from its test images."""
    for part, splits in (("train", ("train", "val")), ("t10k", ("test",))):
        images = _idx(folder / f"{part}-images-idx3-ubyte.gz").reshape(-1, 28, 28)
        labels = _idx(folder / f"{part}-labels-idx1-ubyte.gz")
        for label, name in enumerate(CLOTHING):
            numbers = iter(np.flatnonzero(labels == label).tolist())
            for split in splits:
                for number in (next(numbers) for _ in range(_CLOTHING_PER_CLASS[split])):
                    file = f"clothing_{part}_{number:05d}.png"
                    yield NamedImage(split, file, name, "clothing"), _gray(images[number])


def read_digits() -> Iterator[tuple[NamedImage, Image.Image]]:
    """scikit-learn's copy of the UCI digits, in its order of writers."""
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    for number, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        split = "train" if number < _NUM_TRAIN_DIGITS else "val"
        split = split if number < _NUM_TRAIN_DIGITS + _NUM_VAL_DIGITS else "test"
        named = NamedImage(split, f"digit_{number:04d}.png", DIGITS[label], "digit")
        yield named, _gray((pixels * 255 / 16).round().astype(np.uint8))


def render_emoji(npm: Path) -> Iterator[tuple[NamedImage, Image.Image]]:
    """Each emoji in all styles: one is for testing only, and a part of the others for validation.

    Names that are not trained are in one style, for testing.
    """
    import resvg_py  # pyright: ignore[reportMissingImports]

    for style in STYLES:
        icons = json.loads((npm / f"@iconify-json/{style}/icons.json").read_text(encoding="utf-8"))
        for name in (*EMOJI, *(UNSEEN_NAMES if style == STYLES[0] else ())):
            svg = _svg(icons, ICONS.get(name, name))
            data = bytes(
                resvg_py.svg_to_bytes(svg_string=svg, width=_EMOJI_SIDE, height=_EMOJI_SIDE)
            )
            image = Image.open(io.BytesIO(data)).convert("RGBA")
            ground = Image.new("RGBA", image.size, "white")
            ground.alpha_composite(image)
            is_seen = name in EMOJI
            split = "test" if style == HELD_OUT_STYLE or not is_seen else "train"
            if split == "train" and _validates(name, style):
                split = "val"
            file = f"{style.replace('-', '_')}_{name.replace('-', '_')}.png"
            colors = ground.convert("RGB").quantize(_EMOJI_COLORS, dither=Image.Dither.NONE)
            yield NamedImage(split, file, name, "emoji" if is_seen else "unseen_name"), colors


def _validates(name: str, style: str) -> bool:
    """Whether an emoji validates: at most one of the styles that train, so two remain."""
    trained = [style for style in STYLES if style != HELD_OUT_STYLE]
    chosen = trained[hash64(f"val style {name}") % len(trained)]
    return style == chosen and fraction(f"val {name}") < len(trained) * _VAL_EMOJI


def _svg(icons: dict, name: str) -> str:
    """The SVG of an icon of an Iconify set."""
    name = icons.get("aliases", {}).get(name, {}).get("parent", name)
    icon = icons["icons"][name]
    width = icon.get("width", icons.get("width", 16))
    height = icon.get("height", icons.get("height", 16))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{icon.get("left", 0)} {icon.get("top", 0)} {width} {height}">{icon["body"]}</svg>'
    )


def _idx(path: Path) -> np.ndarray:
    """The bytes of an IDX file (MNIST's format) without its header."""
    data = gzip.decompress(path.read_bytes())
    return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3])


def _gray(pixels: np.ndarray) -> Image.Image:
    """Light pixels on black [h, w] as 16 gray levels, dark on white."""
    image = Image.fromarray((15 - pixels // 16).astype(np.uint8)).convert("P")
    image.putpalette([level * 17 for level in range(16) for _ in range(3)])
    return image
