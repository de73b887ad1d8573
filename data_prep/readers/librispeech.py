"""LibriSpeech: `SUBSET/SPEAKER/CHAPTER/S-C-NNNN.flac` and `S-C.trans.txt` with upper-case text.

Transcripts are converted to lower case unless `keep_case` is set. Key: subset and utterance. Group: the
chapter; or with `group_by` the speaker, or the transcript (for corpora that repeat their prompts).
"""

from collections.abc import Iterator
from pathlib import Path

from data_prep.corpus import (
    MISSING_TRANSCRIPT,
    Item,
    Problem,
    clean_key,
    declared_split,
    require_folder,
    text_problem,
    transcript_group,
)
from data_prep.options import ReaderOptions
from data_prep.readers.text_files import read_text
from data_prep.readers.walk import audio_by_stem, walk
from muomni.errors import DataError

_TRANSCRIPT = ".trans.txt"


def read_librispeech(src: Path, options: ReaderOptions) -> Iterator[Item]:
    """List the utterances of all transcript files under SRC, or of `options.subsets`.

    Raises `DataError` if there is no transcript file or a subset is missing.
    """
    root, folders = subset_folders(src, "LibriSpeech", options)
    is_empty = True
    for subset in folders:
        for folder, names in walk(subset, options.skipped):
            transcripts = [name for name in names if name.lower().endswith(_TRANSCRIPT)]
            audio = audio_by_stem(names)
            for name in set(names) - set(transcripts) - set(audio.values()):
                options.skipped.add_other(name)
            left = dict(audio)
            for name in transcripts:
                is_empty = False
                yield from _read_chapter(folder / name, audio, left, root, options)
            for name, file in left.items():
                yield _without_transcript(name, folder.relative_to(root) / file, options)
    if is_empty:
        raise DataError(
            f"{root} contains no transcript (SUBSET/SPEAKER/CHAPTER/*.trans.txt); check --src"
        )


def subset_folders(src: Path, corpus: str, options: ReaderOptions) -> tuple[Path, list[Path]]:
    """The folder of the subsets (SRC or SRC/CORPUS), and the subset folders to read.

    Raises `DataError` if one is missing.
    """
    root = require_folder(src, f"{corpus} folder")
    if (root / corpus).is_dir():
        root = root / corpus
    for subset in options.subsets:
        require_folder(root / subset, f"{corpus} subset")
    return root, [root / subset for subset in options.subsets] or [root]


def _read_chapter(
    path: Path, audio: dict[str, str], left: dict[str, str], root: Path, options: ReaderOptions
) -> Iterator[Item]:
    """The utterances of a transcript file, which are removed from `left`."""
    relative = path.relative_to(root)
    subset = _subset(relative)
    chapter = path.name[: -len(_TRANSCRIPT)]
    speaker = chapter.partition("-")[0]
    text = read_text(path)
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        name, transcript = [*line.split(maxsplit=1), ""][:2]
        left.pop(name, None)
        problem = text_problem(transcript, "the transcript")
        transcript = " ".join(transcript.split())
        if not options.keep_case:
            transcript = transcript.lower()
        yield Item(
            key=_key(subset, name),
            group=utterance_group(chapter, speaker, transcript, options.group_by),
            source=f"{relative} line {number}",
            declared_split=declared_split(subset),
            texts=() if problem else (transcript,),
            media=(str(path.parent / audio.get(name, f"{name}.flac")),),
            metadata={"speaker": options.speaker or speaker, "language": options.language},
            problem=problem,
        )


def _without_transcript(name: str, path: Path, options: ReaderOptions) -> Item:
    chapter = name.rpartition("-")[0]
    return Item(
        key=_key(_subset(path), name),
        group=utterance_group(chapter, chapter.partition("-")[0], name, options.group_by),
        source=str(path),
        problem=Problem(
            MISSING_TRANSCRIPT, f"{path.name} has no line in a {_TRANSCRIPT} beside it"
        ),
    )


def _subset(path: Path) -> str:
    """The subset of SUBSET/SPEAKER/CHAPTER/FILE; empty if SRC is a subset itself."""
    return path.parts[0] if len(path.parts) > 3 else ""


def _key(subset: str, name: str) -> str:
    # Different subsets may reuse the numbers of speakers and chapters.
    return clean_key(f"{subset}-{name}" if subset else name)


def utterance_group(chapter: str, speaker: str, transcript: str, group_by: str) -> str:
    """The group of an utterance; LibriTTS has the same chapters and hence the same groups."""
    if group_by == "transcript":
        return transcript_group(transcript.encode(errors="replace").decode())
    if group_by == "speaker":
        return f"speaker:{speaker}"
    return f"chapter:{chapter}"
