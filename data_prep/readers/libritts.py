"""LibriTTS: `SUBSET/SPEAKER/CHAPTER/S_C_P_U.wav` beside `.normalized.txt` and `.original.txt`.

The normalized text is used unless `--text original` is given. Key: subset and utterance. Group: the
chapter, named as in LibriSpeech; or the speaker or transcript.
"""

from collections.abc import Iterator
from pathlib import Path

from data_prep.corpus import MISSING_TRANSCRIPT, Item, Problem, declared_split
from data_prep.options import ReaderOptions
from data_prep.readers.librispeech import subset_folders, utterance_group
from data_prep.readers.rows import Row, speech_item
from data_prep.readers.text_files import read_text
from data_prep.readers.walk import audio_by_stem, walk
from muomni.errors import DataError

_TEXTS = (".normalized.txt", ".original.txt")


def read_libritts(src: Path, options: ReaderOptions) -> Iterator[Item]:
    """List the utterances below SRC, or of `options.subsets`.

    Raises `DataError` if there is none or a subset is missing.
    """
    root, folders = subset_folders(src, "LibriTTS", options)
    ending = f".{options.text_form or 'normalized'}.txt"
    is_empty = True
    for subset in folders:
        for folder, names in walk(subset, options.skipped):
            texts = {n[: -len(ending)]: n for n in names if n.lower().endswith(ending)}
            audio = audio_by_stem(names)
            for name in names:
                if not name.lower().endswith(_TEXTS) and name not in audio.values():
                    options.skipped.add_other(name)
            is_empty = is_empty and not audio
            for name in sorted(texts.keys() | audio.keys()):
                path = folder.relative_to(root) / audio.get(name, f"{name}.wav")
                text_file = folder / texts[name] if name in texts else None
                yield speech_item(_row(path, name, text_file, options.group_by), root, options)
    if is_empty:
        raise DataError(f"{root} contains no SUBSET/SPEAKER/CHAPTER/*.wav of LibriTTS; check --src")


def _row(path: Path, name: str, text_file: Path | None, group_by: str) -> Row:
    subset = path.parts[0] if len(path.parts) > 3 else ""
    speaker, _, rest = name.partition("_")
    text, problem = "", None
    if text_file is None:
        problem = Problem(MISSING_TRANSCRIPT, f"{path.name} has no text beside it")
    else:
        text = read_text(text_file)
    group = utterance_group(f"{speaker}-{rest.partition('_')[0]}", speaker, text, group_by)
    values: dict[str, object] = {
        "id": f"{subset}-{name}" if subset else name,
        "audio": str(path),
        "text": text,
        "speaker": speaker,
        "split": declared_split(subset),
        "group": group,
    }
    return Row(name, str(path), values, problem)
