"""Kaldi data folders: `wav.scp`, `text`, and optionally `segments`, `utt2spk`, and `utt2lang`.

SRC is such a folder, or the folder above (`data/train`, `data/dev`), whose names may declare splits. Paths in
`wav.scp` are relative to `--media`, the folder, or a folder above it. Commands are not run: only the
decompression of FLAC is replaced by the file. Group: as of all speech, by audio file for segments.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from data_prep.corpus import (
    BAD_RECORD,
    MISSING_TRANSCRIPT,
    BadSampleError,
    Clip,
    Item,
    declared_split,
)
from data_prep.options import ReaderOptions
from data_prep.readers.media_paths import find_media
from data_prep.readers.rows import Row, speech_item
from data_prep.readers.text_files import open_text
from data_prep.values import shown
from muomni.errors import DataError

_FLAC_COMMAND = re.compile(r"flac (?:-[cds]+ |--\w+ )+(\S+)\s*\|")
_IN_ARCHIVE = re.compile(r"\.ark:\d+$")
# wav.scp of a recipe is in RECIPE/data/train, and its paths are relative to RECIPE.
_NUM_PARENTS = 3


def read_kaldi(src: Path, options: ReaderOptions) -> Iterator[Item]:
    """List the utterances of a data folder, or of all data folders in SRC.

    Raises `DataError` if there is none, or one has no `text`.
    """
    folders = (
        [src] if (src / "wav.scp").is_file() else sorted(p.parent for p in src.glob("*/wav.scp"))
    )
    if not folders:
        raise DataError(f"{src} contains no wav.scp of Kaldi, nor do its folders; check --src")
    for folder in folders:
        yield from _read_folder(folder, options)


def _read_folder(folder: Path, options: ReaderOptions) -> Iterator[Item]:
    audio = dict(_table(folder / "wav.scp"))
    segments = dict(_table(folder / "segments")) if (folder / "segments").is_file() else None
    facts = {
        name: dict(_table(folder / file)) if (folder / file).is_file() else {}
        for name, file in (("speaker", "utt2spk"), ("language", "utt2lang"))
    }
    texts = dict(_table(folder / "text"))
    root = options.media_root or _root(folder, audio)
    prefix = f"{folder.name}-" if declared_split(folder.name) else ""
    for name in sorted(texts.keys() | (audio if segments is None else segments).keys()):
        source = f"{folder.name} {name}"
        row = Row(f"{prefix}{name}", source, {"split": declared_split(folder.name)})
        try:
            if name not in texts:
                raise BadSampleError(MISSING_TRANSCRIPT, f"{name} has no line in text")
            row.values["audio"] = _audio(name, audio, segments, root)
            row.values["text"] = texts[name]
            row.values.update({column: table.get(name) for column, table in facts.items()})
        except BadSampleError as error:
            row = Row(row.name, source, {}, error.problem)
        yield speech_item(row, root, options)


def _table(path: Path) -> Iterator[tuple[str, str]]:
    """The first word and the rest of each line; raises `DataError` if the file is missing."""
    with open_text(path) as file:
        for line in file:
            if line.strip():
                name, rest = [*line.split(maxsplit=1), ""][:2]
                yield name, rest.strip()


def _audio(
    name: str, audio: dict[str, str], segments: dict[str, str] | None, root: Path
) -> str | Clip:
    if segments is None:
        return _path(name, audio, root)
    fields = segments.get(name, "").split()
    try:
        recording, start_s, end_s = fields[0], float(fields[1]), float(fields[2])
    except (ValueError, IndexError) as error:
        message = f"the line in segments is not RECORDING START END: {shown(' '.join(fields))}"
        raise BadSampleError(BAD_RECORD, message) from error
    return Clip(_path(recording, audio, root), start_s, round(end_s - start_s, 6))


def _path(name: str, audio: dict[str, str], root: Path) -> str:
    path = audio.get(name, "")
    if flac := _FLAC_COMMAND.fullmatch(path):
        path = flac[1]
    if not path:
        raise BadSampleError(BAD_RECORD, f"{name} has no line in wav.scp")
    if path.endswith("|"):
        message = f"the audio of {name} is the output of a command, which is not run: {shown(path)}"
        raise BadSampleError(
            BAD_RECORD, f"{message}; write it to a file, and put its path in wav.scp"
        )
    if _IN_ARCHIVE.search(path):
        message = f"the audio of {name} is in a Kaldi archive: {shown(path)}"
        raise BadSampleError(BAD_RECORD, f"{message}; extract it with wav-copy")
    return find_media(root, path, "wav.scp")


def _root(folder: Path, audio: dict[str, str]) -> Path:
    """The folder that the first relative path is relative to."""
    bases = [folder, *folder.absolute().parents[:_NUM_PARENTS]]
    for path in audio.values():
        if not path.startswith("/") and not path.endswith("|"):
            return next((base for base in bases if (base / path).exists()), folder)
    return folder
