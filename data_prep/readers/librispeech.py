"""LibriSpeech: `SUBSET/SPEAKER/CHAPTER/S-C-NNNN.flac` and `S-C.trans.txt` with upper-case text.

The upper case carries no information, so transcripts are lower-cased unless `keep_case` is set.
Key: subset and utterance. Group: the chapter; `group_by` = speaker or transcript (for corpora that
repeat their prompts).
"""

from collections.abc import Iterator
from pathlib import Path

from data_prep.corpus import (
    MISSING_TRANSCRIPT,
    Item,
    Problem,
    ReaderOptions,
    clean_key,
    require_folder,
    text_problem,
    transcript_group,
)
from muomni.errors import DataError

_DECLARED = {"train": "train", "dev": "val", "test": "test"}


def read_librispeech(src: Path, options: ReaderOptions) -> Iterator[Item]:
    """List the utterances of all transcript files under SRC, or of `options.subsets` only.

    Raises `DataError` when there is no transcript file or a named subset is missing.
    """
    root = require_folder(src, "LibriSpeech folder")
    if (root / "LibriSpeech").is_dir():
        root = root / "LibriSpeech"
    for subset in options.subsets:
        require_folder(root / subset, "LibriSpeech subset")
    folders = [root / subset for subset in options.subsets] or [root]
    files = sorted(path for folder in folders for path in folder.rglob("*.trans.txt"))
    if not files:
        raise DataError(
            f"{root} holds no transcript file (SUBSET/SPEAKER/CHAPTER/*.trans.txt); check --src"
        )
    for path in files:
        yield from _read_chapter(path, root, options)


def _read_chapter(path: Path, root: Path, options: ReaderOptions) -> Iterator[Item]:
    relative = path.relative_to(root)
    # SUBSET/SPEAKER/CHAPTER/FILE; SRC may also be one subset.
    subset = relative.parts[0] if len(relative.parts) > 3 else ""
    # Subsets may number the same speakers and chapters on their own.
    prefix = f"{subset}-" if subset else ""
    speaker = path.stem.partition("-")[0]
    recordings = {flac.stem: flac for flac in sorted(path.parent.glob("*.flac"))}
    text = path.read_text(encoding="utf-8", errors="surrogateescape")
    for number, line in enumerate(text.split("\n"), start=1):
        name, _, transcript = line.strip().partition(" ")
        if not name:
            continue
        recordings.pop(name, None)
        problem = text_problem(transcript, "the transcript")
        transcript = " ".join(transcript.split())
        if not options.keep_case:
            transcript = transcript.lower()
        yield Item(
            key=clean_key(f"{prefix}{name}"),
            group=_group(name, speaker, transcript, options.group_by),
            source=f"{relative} line {number}",
            declared_split=_DECLARED.get(subset.partition("-")[0]),
            texts=() if problem else (transcript,),
            media=(str(path.parent / f"{name}.flac"),),
            metadata={"speaker": options.speaker or speaker, "language": options.language},
            problem=problem,
        )
    for name, flac in recordings.items():
        yield Item(
            key=clean_key(f"{prefix}{name}"),
            group=_group(name, speaker, name, options.group_by),
            source=str(flac.relative_to(root)),
            problem=Problem(MISSING_TRANSCRIPT, f"{flac.name} has no line in {path.name}"),
        )


def _group(name: str, speaker: str, transcript: str, group_by: str) -> str:
    if group_by == "transcript":
        return transcript_group(transcript.encode(errors="replace").decode())
    if group_by == "speaker":
        return f"speaker:{speaker}"
    return f"chapter:{name.rpartition('-')[0]}"
