"""A run that names colors, and files for its questions."""

from pathlib import Path

import pytest

from tests.conversations import COLORS, png, tone
from tests.inference.exports import write_sft_export


@pytest.fixture(scope="package")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    write_sft_export(folder, num_steps=85)
    return folder


@pytest.fixture(scope="package")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    for name, color in COLORS.items():
        (folder / f"{name}.png").write_bytes(png(color))
    (folder / "low.wav").write_bytes(tone(200))
    (folder / "broken.png").write_bytes(b"not an image")
    (folder / "empty.wav").write_bytes(tone(200, 0))
    (folder / "long.wav").write_bytes(tone(200, 600, 8000))
    (folder / "other").mkdir()
    (folder / "other" / "red.png").write_bytes(png(COLORS["blue"]))
    return folder
