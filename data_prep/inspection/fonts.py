"""Draws text of any script with the fonts installed on this machine.

Pillow's own font has few scripts. Characters that it lacks are drawn with an installed font that has them;
those that no font has are drawn as empty boxes, and `missing` collects them.
"""

import io
import unicodedata
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import BinaryIO

from fontTools.ttLib import TTFont, TTLibError
from matplotlib.font_manager import findSystemFonts
from PIL import ImageDraw, ImageFont

_SIZE_PIXELS = 11
# First words of the Unicode names of characters that fonts named "CJK" have.
_CJK = ("CJK", "HIRAGANA", "KATAKANA", "HANGUL", "BOPOMOFO", "IDEOGRAPHIC", "FULLWIDTH")
_GENERAL = ("dejavusans", "freesans", "unifont")


@dataclass(frozen=True, eq=False, slots=True)
class _Face:
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont
    characters: frozenset[str]


class Fonts:
    """Measures and draws lines of text.

    Attributes:
        missing: characters of these texts that no font has.
    """

    def __init__(self) -> None:
        self.missing: set[str] = set()

    def length(self, text: str) -> float:
        """Width of a line in pixels."""
        return sum(face.font.getlength(part) for part, face in self._runs(text))

    def draw(
        self, draw: ImageDraw.ImageDraw, xy: tuple[float, float], text: str, fill: str
    ) -> None:
        """Draw a line with its upper left corner at `xy`."""
        x, y = xy
        for part, face in self._runs(text):
            is_scalable = isinstance(face.font, ImageFont.FreeTypeFont)
            anchor = "ls" if is_scalable else "la"  # letters of all fonts stand on one line
            draw.text((x, y + is_scalable * _SIZE_PIXELS), part, fill, face.font, anchor)
            x += face.font.getlength(part)

    def _runs(self, text: str) -> list[tuple[str, _Face]]:
        """The text in runs of one font each.

        Marks, spaces, and punctuation keep the font before them, so that letters are shaped and right-to-left
        words are ordered together.
        """
        runs: list[tuple[str, _Face]] = []
        for character in text:
            last = runs[-1][1] if runs else None
            is_letter = character.isalnum()
            is_kept = last and not is_letter and character in last.characters
            face = last if last and is_kept else self._face_of(character)
            if face is last:
                runs[-1] = (runs[-1][0] + character, face)
            else:
                runs.append((character, face))
        return runs

    def _face_of(self, character: str) -> _Face:
        own = _own_face()
        if character in own.characters:
            return own
        face = _installed_face(character)
        if face is None:
            self.missing.add(character)
        return face or own


@cache
def _own_face() -> _Face:
    font = ImageFont.load_default(_SIZE_PIXELS)
    if isinstance(font, ImageFont.FreeTypeFont) and isinstance(font.path, io.BytesIO):
        return _Face(font, _characters(io.BytesIO(font.path.getvalue())))
    return _Face(font, frozenset(map(chr, range(0x20, 0x7F))))  # Pillow was built without FreeType


@cache
def _installed_face(character: str) -> _Face | None:
    """The first installed font that has a character, with those named after its script first."""
    script = unicodedata.name(character, "").partition(" ")[0]
    name = "cjk" if script in _CJK else script.lower()

    def rank(path: Path) -> tuple[bool, bool, bool, str]:
        stem = path.stem.lower()
        is_plain = "sans" in stem and not any(s in stem for s in ("bold", "italic", "oblique"))
        return (name not in stem, not stem.startswith(_GENERAL), not is_plain, stem)

    paths = sorted(map(Path, findSystemFonts()), key=rank)
    return next((_face(path) for path in paths if character in _characters(path)), None)


@cache
def _face(path: Path) -> _Face:
    return _Face(ImageFont.truetype(path, _SIZE_PIXELS), _characters(path))


@cache
def _characters(file: Path | BinaryIO) -> frozenset[str]:
    """The characters of a font file; none if it is not a font of characters."""
    try:
        with TTFont(file, lazy=True, fontNumber=0) as font:
            return frozenset(map(chr, font.getBestCmap() or ()))
    except (TTLibError, OSError, KeyError, AssertionError):
        return frozenset()
