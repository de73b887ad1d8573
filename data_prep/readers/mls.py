"""Multilingual LibriSpeech: `SUBSET/transcripts.txt` with tabs and `SUBSET/audio/SPEAKER/BOOK/S_B_N.flac`.

Subsets are train, dev, and test. Audio files are FLAC or Opus. Group: the book of a speaker, or with
`--group` the speaker or the transcript.
"""

from collections.abc import Iterator
from pathlib import Path

from data_prep.corpus import BAD_RECORD, Item, Problem, declared_split
from data_prep.options import ReaderOptions
from data_prep.readers.librispeech import subset_folders, utterance_group
from data_prep.readers.rows import Row, speech_item
from data_prep.readers.text_files import open_text
from data_prep.readers.walk import audio_by_stem, walk
from data_prep.skipped_files import SkippedFiles
from data_prep.values import shown
from muomni.errors import DataError

_TABLE = "transcripts.txt"


def read_mls(src: Path, options: ReaderOptions) -> Iterator[Item]:
    """List the utterances of all subsets in SRC, which may be a subset, or of `options.subsets`.

    Raises `DataError` if there is no transcript file or a subset is missing.
    """
    root, folders = subset_folders(src, "MLS", options)
    if not options.subsets and not (root / _TABLE).is_file():
        folders = sorted(path.parent for path in root.glob(f"*/{_TABLE}"))
    if not folders:
        raise DataError(f"{root} contains no SUBSET/{_TABLE} of MLS; check --src")
    for folder in folders:
        suffix = _audio_suffix(folder / "audio")
        with open_text(folder / _TABLE) as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    source = f"{folder.name}/{_TABLE} line {number}"
                    row = _row(line, folder.name, suffix, source, options.group_by)
                    yield speech_item(row, folder, options)


def _audio_suffix(folder: Path) -> str:
    """The suffix of the audio files, which is the same for all."""
    for _, names in walk(folder, SkippedFiles()) if folder.is_dir() else ():
        for name in audio_by_stem(names).values():
            return Path(name).suffix
    raise DataError(f"{folder} contains no audio file of MLS; download it")


def _row(line: str, subset: str, suffix: str, source: str, group_by: str) -> Row:
    name, tab, text = line.strip().partition("\t")
    parts = name.split("_")
    if not tab or len(parts) != 3:
        message = f"the line is not SPEAKER_BOOK_NUMBER and a transcript: {shown(line.strip())}"
        return Row(source, source, {}, Problem(BAD_RECORD, message))
    speaker, book, _ = parts
    values: dict[str, object] = {
        "audio": f"audio/{speaker}/{book}/{name}{suffix}",
        "text": text,
        "speaker": speaker,
        "split": declared_split(subset),
        "group": utterance_group(f"{speaker}_{book}", speaker, text, group_by),
    }
    return Row(f"{subset}-{name}", source, values)
