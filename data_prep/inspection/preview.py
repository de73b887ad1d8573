"""Preview samples of a split: a text table, and a contact sheet of images and audio clips."""

import json
import re

from PIL import Image, ImageDraw

from data_prep.inspection.audio_panel import HEIGHT, WIDTH, audio_panel
from data_prep.inspection.fonts import Fonts
from data_prep.members import media_of, sample_texts
from muomni.data.media.decode import open_image
from muomni.data.media.formats import AUDIO_EXTENSIONS, IMAGE_EXTENSIONS
from muomni.data.shards.manifest import Manifest
from muomni.data.shards.reader import SplitReader
from muomni.data.text.graphemes import cut_text
from muomni.errors import DataError
from muomni.io.table import format_table

_NUM_COLUMNS = 4
_TILE = WIDTH // _NUM_COLUMNS
_GAP, _LINE_HEIGHT = 4, 13
# The key, followed by the text.
_NUM_CAPTION_LINES = 3
_TEXT_WIDTH = 80
# Behind images, so that transparent and white ones have visible edges.
_GROUND = (236, 236, 236)


def describe(manifest: Manifest, split: str, num_samples: int) -> str:
    """A table of the first samples of a split: id, key, members, duration, pixels, and text."""
    reader = SplitReader(manifest, split)
    headers = ("id", "key", "members", "seconds", "pixels", "text")
    rows = []
    for index in range(min(num_samples, len(reader))):
        sample, row = reader.read(index), reader.columns[index]
        members = " ".join(sorted(name for name in sample if name != "__key__"))
        seconds = f"{row['duration_ms'] / 1000:.2f}" if row["num_audios"] else "-"
        pixels = f"{row['num_pixels']:,}" if row["num_images"] else "-"
        text = cut_text(_text(sample, manifest.task), _TEXT_WIDTH)
        rows.append((str(index), str(sample["__key__"]), members, seconds, pixels, text))
    return format_table(headers, rows, align="><<>><")


def sheet(manifest: Manifest, split: str, num_samples: int, fonts: Fonts) -> Image.Image | None:
    """Draw images in a grid and audio clips below it, with captions; None without media.

    Media that do not decode are replaced by the error message. `fonts` collects the characters that could
    not be drawn.
    """
    reader = SplitReader(manifest, split)
    tiles: list[Image.Image] = []
    panels: list[Image.Image] = []
    for index in range(min(num_samples, len(reader))):
        sample = reader.read(index)
        key, text = str(sample["__key__"]), _text(sample, manifest.task)
        tiles += [_tile(data, key, text, fonts) for _, data in media_of(sample, IMAGE_EXTENSIONS)]
        seconds = reader.columns[index]["duration_ms"] / 1000
        caption = f"{key}  {seconds:.2f} s  {text}"
        panels += [_panel(data, caption, fonts) for _, data in media_of(sample, AUDIO_EXTENSIONS)]
    if not tiles and not panels:
        return None
    tile_height = _TILE + _NUM_CAPTION_LINES * _LINE_HEIGHT + _GAP
    panel_height = HEIGHT + _LINE_HEIGHT + _GAP
    num_rows = -(-len(tiles) // _NUM_COLUMNS)
    num_columns = _NUM_COLUMNS if panels else min(_NUM_COLUMNS, len(tiles))
    height = num_rows * tile_height + len(panels) * panel_height
    image = Image.new("RGB", (num_columns * _TILE, height), "white")
    for number, tile in enumerate(tiles):
        row, column = divmod(number, _NUM_COLUMNS)
        image.paste(tile, (column * _TILE, row * tile_height))
    for number, panel in enumerate(panels):
        image.paste(panel, (0, num_rows * tile_height + number * panel_height))
    return image


def _tile(data: bytes, key: str, text: str, fonts: Fonts) -> Image.Image:
    side = _TILE - _GAP
    tile = Image.new("RGB", (_TILE, _TILE + _NUM_CAPTION_LINES * _LINE_HEIGHT), "white")
    draw = ImageDraw.Draw(tile)
    draw.rectangle([0, 0, side - 1, side - 1], fill=_GROUND)
    try:
        image = open_image(data)
    except DataError as error:
        _draw_lines(draw, fonts, (4, 4), _wrapped(fonts, str(error), side - 8, 8), "red")
    else:
        image.thumbnail((side, side))
        tile.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    caption = _wrapped(fonts, text, side, _NUM_CAPTION_LINES - 1)
    _draw_lines(draw, fonts, (0, side), [*_wrapped(fonts, key, side, 1), *caption])
    return tile


def _panel(data: bytes, caption: str, fonts: Fonts) -> Image.Image:
    panel = Image.new("RGB", (WIDTH, HEIGHT + _LINE_HEIGHT), "white")
    draw = ImageDraw.Draw(panel)
    _draw_lines(draw, fonts, (0, 0), _wrapped(fonts, caption, WIDTH, 1))
    try:
        panel.paste(audio_panel(data), (0, _LINE_HEIGHT))
    except DataError as error:
        fonts.draw(draw, (0, _LINE_HEIGHT), str(error), "red")
    return panel


def _draw_lines(
    draw: ImageDraw.ImageDraw,
    fonts: Fonts,
    xy: tuple[int, int],
    lines: list[str],
    fill: str = "black",
) -> None:
    for number, line in enumerate(lines):
        fonts.draw(draw, (xy[0], xy[1] + number * _LINE_HEIGHT), line, fill)


def _wrapped(fonts: Fonts, text: str, width: int, num_lines: int) -> list[str]:
    """The part of a text that fits into lines of `width` pixels; words are split only if necessary."""
    lines = [""]
    # Few characters are narrower than two pixels, and a document may be long.
    for word in re.findall(r"\s*\S+", text[: width * num_lines // 2]):
        if lines[-1] and fonts.length(lines[-1] + word) > width and len(lines) < num_lines:
            lines.append("")
            word = word.lstrip()
        lines[-1] += word
    for number, line in enumerate(lines):
        while fonts.length(lines[number]) > width:
            line = cut_text(line, len(line) - 1, mark="")
            lines[number] = line + "..."
    return lines


def text_lines(sample: dict[str, bytes | str], task: str) -> list[str]:
    """The document, transcript, captions, or turns with their roles; the error if they are unreadable."""
    try:
        if task != "sft":
            return sample_texts(sample, task)
        turns = json.loads(sample["json"])["turns"]
        return [f"{turn['role']}: {_parts(turn['content'])}" for turn in turns]
    except (ValueError, KeyError, TypeError, DataError) as error:
        return [f"(unreadable text: {error})"]


def _text(sample: dict[str, bytes | str], task: str) -> str:
    return " ".join((" / " if task == "sft" else " | ").join(text_lines(sample, task)).split())


def _parts(content: list[dict[str, str]]) -> str:
    return " ".join(part.get("text", f"<{part.get('name')}>") for part in content)
