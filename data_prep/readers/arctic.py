"""CMU ARCTIC: `cmu_us_SPEAKER_arctic/etc/txt.done.data` with lines `( NAME "text" )`, and `wav/NAME.wav`.

Group: the words of the text, since all speakers read the same prompts.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from data_prep.corpus import BAD_RECORD, Item, Problem
from data_prep.options import ReaderOptions
from data_prep.readers.rows import Row, speech_item
from data_prep.readers.text_files import read_text
from data_prep.readers.walk import audio_by_stem
from data_prep.values import shown
from muomni.errors import DataError

_LINE = re.compile(r'\(\s*(\S+)\s+"(.*)"\s*\)')


def read_arctic(src: Path, options: ReaderOptions) -> Iterator[Item]:
    """List the prompts of a speaker's folder, or of all speakers in SRC.

    Raises `DataError` if there is no prompt file.
    """
    files = sorted([*src.glob("etc/txt.done.data"), *src.glob("*/etc/txt.done.data")])
    if not files:
        raise DataError(f"{src} contains no etc/txt.done.data of CMU ARCTIC; check --src")
    for path in files:
        folder = path.parent.parent
        speaker = folder.resolve().name.removeprefix("cmu_us_").removesuffix("_arctic")
        wav = folder / "wav"
        audio = audio_by_stem(os.listdir(wav) if wav.is_dir() else [])
        lines = read_text(path).split("\n")
        for number, line in enumerate(lines, start=1):
            if line.strip():
                row = _row(line, speaker, audio, f"{speaker} line {number}")
                yield speech_item(row, folder, options)


def _row(line: str, speaker: str, audio: dict[str, str], source: str) -> Row:
    match = _LINE.fullmatch(line.strip())
    if not match:
        problem = Problem(BAD_RECORD, f'the line is not ( NAME "text" ): {shown(line.strip())}')
        return Row(source, source, {}, problem)
    name, text = match[1], match[2].replace('\\"', '"')
    values: dict[str, object] = {
        "id": f"{speaker}-{name}",
        "audio": f"wav/{audio.get(name, f'{name}.wav')}",
        "text": text,
        "speaker": speaker,
        "language": "en",
    }
    return Row(name, source, values)
