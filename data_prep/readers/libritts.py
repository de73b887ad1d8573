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
from muomni.errors import DataError


def read_libritts(src: Path, options: ReaderOptions) -> Iterator[Item]:
    """List the utterances below SRC, or of `options.subsets`.

    Raises `DataError` if there is none or a subset is missing.
    """
    root, folders = subset_folders(src, "LibriTTS", options)
    ending = f".{options.text_form or 'normalized'}.txt"
    is_empty = True
    for chapter in sorted(path for folder in folders for path in _chapters(folder)):
        texts = {path.name.removesuffix(ending): path for path in chapter.glob(f"*{ending}")}
        audio_clips = {path.stem for path in chapter.glob("*.wav")}
        for name in sorted(texts.keys() | audio_clips):
            is_empty = False
            row = _row(chapter.relative_to(root), name, texts.get(name), options.group_by)
            yield speech_item(row, root, options)
    if is_empty:
        raise DataError(f"{root} contains no SUBSET/SPEAKER/CHAPTER/*.wav of LibriTTS; check --src")


def _chapters(folder: Path) -> set[Path]:
    return {path.parent for path in folder.rglob("*.wav")}


def _row(chapter: Path, name: str, text_file: Path | None, group_by: str) -> Row:
    subset = chapter.parts[0] if len(chapter.parts) > 2 else ""
    speaker, _, rest = name.partition("_")
    audio = str(chapter / f"{name}.wav")
    text, problem = "", None
    if text_file is None:
        problem = Problem(MISSING_TRANSCRIPT, f"{name}.wav has no text beside it")
    else:
        text = read_text(text_file)
    group = utterance_group(f"{speaker}-{rest.partition('_')[0]}", speaker, text, group_by)
    values: dict[str, object] = {
        "id": f"{subset}-{name}" if subset else name,
        "audio": audio,
        "text": text,
        "speaker": speaker,
        "split": declared_split(subset),
        "group": group,
    }
    return Row(name, audio, values, problem)
