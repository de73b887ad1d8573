"""Statistics of scripts, languages, levels, rates, and image sizes."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from data_prep.cli.main import main
from data_prep.inspection.content import script_of
from tests.data_prep.commands import Capture, shard


def stats_of(capsys: Capture, out: Path) -> dict:
    capsys.readouterr()
    main(["stats", "--json", "--content", "100", str(out)])
    return json.loads(capsys.readouterr().out)[str(out)]["train"]


@pytest.mark.parametrize(
    ("letter", "script"),
    [
        ("a", "latin"),
        ("ß", "latin"),
        ("ж", "cyrillic"),
        ("漢", "han"),
        ("क", "devanagari"),
        ("Ａ", "latin"),
    ],
)
def test_scripts(letter: str, script: str) -> None:
    assert script_of(letter) == script


def test_speech(tmp_path: Path, capsys: Capture) -> None:
    levels = {"loud": 1.0, "quiet": 0.0, "half": 0.5}
    rows = []
    for name, level in levels.items():
        wave = np.full(16_000, level)
        wave[8_000:] = 0.0
        soundfile.write(tmp_path / f"{name}.wav", wave, 8_000 if name == "half" else 16_000)
        rows.append({"audio": f"{name}.wav", "text": f"слово {name}", "language": "ru"})
    src = tmp_path / "rows.jsonl"
    src.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shard("speech", "jsonl", src, tmp_path / "out")
    stats = stats_of(capsys, tmp_path / "out")
    assert stats["num_read"] == 3 and stats["num_undecodable"] == 0
    assert stats["languages"] == {"ru": 3}
    assert stats["sample_rates_hz"] == {"16000": 2, "8000": 1}
    assert stats["clipped_fraction_percentiles"][-1] == 0.5
    assert stats["silence_fraction_percentiles"][2:] == [0.5, pytest.approx(0.95), 1.0]
    assert stats["scripts"] == {"cyrillic": 0.5357, "latin": 0.4643}
    main(["stats", "--content", "2", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert "train: 2 samples read" in printed and "languages: ru 2" in printed


def test_speakers(tmp_path: Path, capsys: Capture) -> None:
    rows = []
    for number, speaker in enumerate([0, 1, 0, None]):
        soundfile.write(tmp_path / f"{number}.wav", np.zeros(8_000 * (number + 1)), 8_000)
        rows.append({"audio": f"{number}.wav", "text": f"word {number}", "speaker": speaker})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shard("tts", "jsonl", tmp_path / "rows.jsonl", tmp_path / "out")
    speakers = stats_of(capsys, tmp_path / "out")["speakers"]
    assert speakers == {
        "0": {"samples": 2, "seconds": 4.0},
        "1": {"samples": 1, "seconds": 2.0},
    }
    main(["stats", "--content", "100", str(tmp_path / "out")])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["2", "speakers"] in lines and ["0", "2", "0.1"] in lines


def test_images_and_damage(tmp_path: Path, capsys: Capture) -> None:
    rows = []
    for number, size in enumerate([(30, 20), (10, 40), (50, 20)]):
        buffer = io.BytesIO()
        Image.new("RGB", size, (number, 0, 0)).save(buffer, "PNG")
        (tmp_path / f"{number}.png").write_bytes(buffer.getvalue())
        rows.append({"image": f"{number}.png", "caption": f"thing {number}"})
    src = tmp_path / "rows.jsonl"
    src.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shard("image-caption", "jsonl", src, tmp_path / "out")
    stats = stats_of(capsys, tmp_path / "out")
    assert stats["width_percentiles"][::2] == [10, 30, 50]
    assert stats["height_percentiles"][::2] == [20, 20, 40]
    assert stats["scripts"] == {"latin": 1.0} and stats["sample_rates_hz"] == {}
    (tar,) = (tmp_path / "out/train").glob("*.tar")
    content = bytearray(tar.read_bytes())
    content[530] ^= 255
    tar.write_bytes(content)
    assert stats_of(capsys, tmp_path / "out")["num_undecodable"] == 1
