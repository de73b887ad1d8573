"""AISHELL-1: `transcript/aishell_transcript_*.txt` and `wav/SUBSET/SPEAKER/ID.wav`.

Transcripts separate words by spaces, which Chinese does not have: spaces between Han characters are removed.
Group: the words of the text, or with `--group speaker` the speaker.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from data_prep.corpus import MISSING_TRANSCRIPT, Item, Problem, declared_split, require_folder
from data_prep.options import ReaderOptions
from data_prep.readers.rows import Row, speech_item
from data_prep.readers.text_files import read_text
from data_prep.readers.walk import audio_by_stem, walk
from muomni.errors import DataError

_BETWEEN_HAN = re.compile(r"(?<=[\u3400-\u9fff])\s+(?=[\u3400-\u9fff])")
_SPEAKER = re.compile(r"S\d{4}")


def read_aishell(src: Path, options: ReaderOptions) -> Iterator[Item]:
    """List the audio files below SRC/wav, or of `options.subsets`.

    Raises `DataError` if there is no transcript or audio file.
    """
    root = src / "data_aishell" if (src / "data_aishell").is_dir() else src
    paths = sorted((root / "transcript").glob("aishell_transcript*.txt"))
    if not paths:
        raise DataError(f"{root} contains no transcript/aishell_transcript*.txt; check --src")
    lines = (line.split(maxsplit=1) for line in read_text(paths[0]).split("\n"))
    texts = {line[0]: line[1] for line in lines if len(line) == 2}
    wav = require_folder(root / "wav", "AISHELL audio folder")
    is_empty = True
    for folder, names in walk(wav, options.skipped):
        audio = audio_by_stem(names)
        for name in set(names) - set(audio.values()):
            options.skipped.add_other(name)
        path = folder.relative_to(root)
        subset = path.parts[1] if len(path.parts) > 1 else ""
        if options.subsets and subset not in options.subsets:
            continue
        for name, file in audio.items():
            is_empty = False
            yield speech_item(_row(name, path / file, subset, texts.get(name)), root, options)
    if is_empty:
        raise DataError(f"{wav} contains no audio file; unpack its S*.tar.gz")


def _row(name: str, path: Path, subset: str, text: str | None) -> Row:
    speaker = _SPEAKER.search(name)
    values: dict[str, object] = {
        "audio": str(path),
        "text": _BETWEEN_HAN.sub("", text or ""),
        "speaker": speaker[0] if speaker else path.parent.name,
        "language": "zh",
        "split": declared_split(subset),
    }
    problem = None
    if text is None:
        problem = Problem(MISSING_TRANSCRIPT, f"{path.name} has no line in the transcript")
    return Row(name, str(path), values, problem)
