"""VCTK: `txt/pNNN/pNNN_MMM.txt` with audio files of all speakers.

Version 0.92 has `wav48_silence_trimmed/pNNN/pNNN_MMM_mic1.flac` (only the first microphone is used),
earlier versions have `wav48/pNNN/pNNN_MMM.wav`. Age, gender, and accent come from `speaker-info.txt` if
present. Group: the words of the text, since speakers read the same prompts; or with `--group speaker`
the speaker.
"""

from collections.abc import Iterator
from pathlib import Path

from data_prep.corpus import MISSING_TRANSCRIPT, Item, Problem, require_folder
from data_prep.options import ReaderOptions
from data_prep.readers.rows import Row, speech_item
from data_prep.readers.text_files import read_text
from data_prep.readers.walk import audio_by_stem, find_files, walk
from muomni.errors import DataError

_LAYOUTS = {"wav48_silence_trimmed": "_mic1", "wav48": ""}
_FACTS = ("age", "gender", "accent")


def read_vctk(src: Path, options: ReaderOptions) -> Iterator[Item]:
    """List the audio files and texts of all speakers; raises `DataError` if a folder is missing."""
    require_folder(src, "VCTK folder")
    texts = require_folder(src / "txt", "VCTK text folder")
    folder = next((src / name for name in _LAYOUTS if (src / name).is_dir()), None)
    if folder is None:
        raise DataError(f"{src} has neither {' nor '.join(_LAYOUTS)}; check --src")
    ending = _LAYOUTS[folder.name]
    facts = _speaker_facts(src / "speaker-info.txt")
    with_text = {path.stem: path for path in find_files(texts, (".txt",), options.skipped)}
    recorded: dict[str, str] = {}
    for path, names in walk(folder, options.skipped):
        for stem, file in audio_by_stem(names).items():
            if stem.endswith(ending):
                recorded[stem.removesuffix(ending)] = str((path / file).relative_to(src))
    for name in sorted(with_text.keys() | recorded.keys()):
        speaker = name.partition("_")[0]
        audio = recorded.get(name, f"{folder.name}/{speaker}/{name}{ending}")
        values: dict[str, object] = {
            "id": name,
            "audio": audio,
            "speaker": speaker,
            "language": "en",
        }
        problem = None
        if name in with_text:
            values["text"] = read_text(with_text[name])
        else:
            problem = Problem(MISSING_TRANSCRIPT, f"{audio} has no txt/{speaker}/{name}.txt")
        row = Row(name, audio, values, problem, facts.get(speaker, {}))
        yield speech_item(row, src, options)


def _speaker_facts(path: Path) -> dict[str, dict[str, str]]:
    """Metadata by speaker; the columns are ID AGE GENDER ACCENTS REGION, and IDs may lack the `p`."""
    if not path.is_file():
        return {}
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()[1:]
    rows = [line.split() for line in lines if line.strip()]
    return {
        name if name.startswith(("p", "s")) else f"p{name}": dict(zip(_FACTS, rest, strict=False))
        for name, *rest in rows
    }
