"""Files with sample outputs: tables, images, and audio, below `RUN/STAGE/samples`.

Media of the held-out samples themselves are in `samples/inputs`, once per run. A table names them, and shows
images in MLflow.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from muomni.config.models import MelConfig
from muomni.observe.spectrogram import write_spectrograms, write_waveform

Kind = Literal["text", "table", "image", "audio"]

_KINDS: dict[str, Kind] = {".txt": "text", ".json": "table", ".png": "image", ".wav": "audio"}
_INPUTS = "inputs"
_GAP_PIXELS = 4


@dataclass(frozen=True, slots=True)
class Artifact:
    """A file, and the folder of the recorders' files that it belongs to."""

    path: Path
    kind: Kind
    folder: str


def artifact_of(path: Path, root: Path) -> Artifact | None:
    """The artifact at a path below the folder `root` of a stage; None if it is no sample output."""
    kind = _KINDS.get(path.suffix)
    folder = path.parent.relative_to(root)
    return None if kind is None else Artifact(path, kind, f"{folder.as_posix()}/{kind}")


class SampleFiles:
    """Writes sample outputs of a stage into `target`, a folder below `root`/samples, and lists them."""

    def __init__(self, root: Path, target: Path) -> None:
        self.root, self._target = root, target
        self._inputs = root / "samples" / _INPUTS
        self.written: list[Artifact] = []
        for folder in (target, self._inputs):
            folder.mkdir(exist_ok=True, parents=True)

    def add_table(self, name: str, rows: Sequence[dict[str, str | Artifact]]) -> None:
        """Write rows with the same keys as `NAME.txt`, and as `NAME.json`, a table for MLflow.

        A column has texts, or the images of `add_input_images`.
        """
        if not rows:
            return
        width = max(map(len, rows[0])) + 1
        blocks = (
            "".join(f"{f'{key}:':<{width}} {self._shown(cell)}\n" for key, cell in row.items())
            for row in rows
        )
        text, table = self._target / f"{name}.txt", self._target / f"{name}.json"
        text.write_text("\n".join(blocks), encoding="utf-8")
        data = [[_cell(cell) for cell in row.values()] for row in rows]
        content = {"columns": list(rows[0]), "data": data}
        table.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
        self._add(text, table)

    def add_sound(
        self,
        name: str,
        panels: Mapping[str, np.ndarray],
        config: MelConfig,
        floor: float,
        waveform: np.ndarray,
    ) -> None:
        """Write `NAME.png`, see `write_spectrograms`, and `NAME.wav`."""
        image, sound = self._target / f"{name}.png", self._target / f"{name}.wav"
        write_spectrograms(image, panels, config, floor)
        write_waveform(sound, waveform)
        self._add(image, sound)

    def add_input_images(self, name: str, images: Sequence[np.ndarray]) -> Artifact:
        """Write images uint8 [3, H, W] beside each other; a black square stands for none."""
        shown = list(images) or [np.zeros((3, 8, 8), dtype=np.uint8)]
        height = max(image.shape[1] for image in shown)
        parts = []
        for image in shown:
            margins = ((0, 0), (0, height - image.shape[1]), (0, _GAP_PIXELS))
            parts.append(np.pad(image, margins, constant_values=255))
        joined = np.concatenate(parts, axis=2)[:, :, :-_GAP_PIXELS]
        image = Image.fromarray(joined.transpose(1, 2, 0))
        return self._add_input(f"{name}.png", image.save)

    def add_input_sound(self, name: str, waveform: np.ndarray) -> str:
        """Write an audio clip of a held-out sample; returns its name for a table."""
        return self._shown(
            self._add_input(f"{name}.wav", partial(write_waveform, waveform=waveform))
        )

    def _add_input(self, name: str, write: Callable[[Path], None]) -> Artifact:
        path = self._inputs / name
        artifact = artifact_of(path, self.root)
        assert artifact is not None
        if not path.exists():
            write(path)
            self.written.append(artifact)
        return artifact

    def _add(self, *paths: Path) -> None:
        found = (artifact_of(path, self.root) for path in paths)
        self.written += [artifact for artifact in found if artifact is not None]

    def _shown(self, cell: str | Artifact) -> str:
        return cell if isinstance(cell, str) else f"{_INPUTS}/{cell.path.name}"


def _cell(cell: str | Artifact) -> str | dict[str, str]:
    """A cell of a table; MLflow shows images that are given by their place among the run's artifacts."""
    if isinstance(cell, str):
        return cell
    file = f"{cell.folder}/{cell.path.name}"
    return {"type": "image", "filepath": file, "compressed_filepath": file}
