"""inspect --html: a page of samples that a browser opens, and fonts for scripts beyond Latin."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from PIL import Image, ImageDraw

from data_prep.cli.main import main
from data_prep.inspection import fonts as fonts_module
from data_prep.inspection.fonts import Fonts
from tests.data_prep.raw_corpora import image


def _shard(task: str, rows: list[dict[str, str]], src: Path, out: Path) -> Path:
    (src / "t.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    command = [task, "--format", "jsonl", "--src", str(src / "t.jsonl"), "--out", str(out)]
    main([*command, "--workers", "1", "--val-fraction", "0", "--test-fraction", "0"])
    return out


def test_page_shows_images_and_escapes_texts(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(image(3))
    rows = [{"id": "a", "image": "a.png", "caption": "<script>alert(1)</script> قطة"}]
    out = _shard("image-caption", rows, tmp_path, tmp_path / "out")
    main(["inspect", str(out), "--html", str(tmp_path / "page")])
    page = (tmp_path / "page/index.html").read_text(encoding="utf-8")
    assert "<script>" not in page and "&lt;script&gt;alert(1)&lt;/script&gt; قطة" in page
    assert '<img src="00000-0.png"' in page
    assert (tmp_path / "page/00000-0.png").read_bytes() == image(3)


def test_page_has_audio_clips_as_wav(tmp_path: Path) -> None:
    samples = (np.sin(np.arange(8000) / 7) * 9000).astype(np.int16)
    soundfile.write(tmp_path / "a.flac", samples, 8000)
    out = _shard("speech", [{"audio": "a.flac", "text": "hello"}], tmp_path, tmp_path / "out")
    main(["inspect", str(out), "--html", str(tmp_path / "page")])
    assert '<audio controls src="00000-0.wav">' in (tmp_path / "page/index.html").read_text()
    written, rate_hz = soundfile.read(tmp_path / "page/00000-0.wav", dtype="int16")
    assert rate_hz == 8000
    np.testing.assert_array_equal(written, samples)


def test_page_refuses_a_file_in_the_place_of_its_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "page").write_text("mine")
    with pytest.raises(SystemExit):
        main(["inspect", str(tmp_path), "--html", str(tmp_path / "page")])
    assert "page is not a folder" in capsys.readouterr().err


def _font_with(characters: str, path: Path) -> None:
    """Write a font whose glyphs are filled squares."""

    def square() -> object:
        pen = TTGlyphPen(None)
        pen.moveTo((0, 0))
        for point in ((0, 1000), (1000, 1000), (1000, 0)):
            pen.lineTo(point)
        pen.closePath()
        return pen.glyph()

    names = [".notdef", *(f"g{ord(c)}" for c in characters)]
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder(names)
    builder.setupCharacterMap({ord(c): f"g{ord(c)}" for c in characters})
    builder.setupGlyf({name: square() for name in names})
    builder.setupHorizontalMetrics({name: (1000, 0) for name in names})
    builder.setupHorizontalHeader(ascent=1000, descent=0)
    builder.setupNameTable({"familyName": "Test", "styleName": "Regular"})
    builder.setupOS2(sTypoAscender=1000, usWinAscent=1000)
    builder.setupPost()
    builder.save(path)


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The fonts that are installed, none at first."""
    paths: list[str] = []
    monkeypatch.setattr(fonts_module, "findSystemFonts", lambda: paths)
    fonts_module._installed_face.cache_clear()
    return paths


def test_letters_of_other_scripts_come_from_installed_fonts(
    tmp_path: Path, installed: list[str]
) -> None:
    for name, characters in (("General-Regular.ttf", "ก漢"), ("NotoSansThai-Bold.ttf", "กข")):
        _font_with(characters, tmp_path / name)
        installed.append(str(tmp_path / name))
    (tmp_path / "broken.ttf").write_bytes(b"no font")
    installed.append(str(tmp_path / "broken.ttf"))
    fonts = Fonts()
    canvas = Image.new("L", (200, 20), 255)
    fonts.draw(ImageDraw.Draw(canvas), (0, 0), "กข漢", "black")
    assert not fonts.missing
    # Three squares, each an em wide.
    assert (np.asarray(canvas) < 128).any(axis=0).sum() == round(fonts.length("กข漢")) == 33


def test_characters_without_a_font_are_reported(installed: list[str]) -> None:
    fonts = Fonts()
    assert fonts.length("e ก") > 0
    assert fonts.missing == {"ก"}


def test_sheet_says_which_characters_it_could_not_draw(
    tmp_path: Path, installed: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    Image.open(io.BytesIO(image(1))).save(tmp_path / "a.png")
    out = _shard("image-caption", [{"image": "a.png", "caption": "กา"}], tmp_path, tmp_path / "out")
    main(["inspect", str(out), "--png", str(tmp_path / "sheet.png")])
    assert "no installed font has 2 of the characters" in capsys.readouterr().out
