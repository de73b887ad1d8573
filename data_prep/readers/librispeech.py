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
from muomni.errors import DataError


def read_librispeech(src: Path, options: ReaderOptions) -> Iterator[Item]:
    """List the utterances of all transcript files under SRC, or of `options.subsets`.

    Raises `DataError` if there is no transcript file or a subset is missing.
    """
    root, folders = subset_folders(src, "LibriSpeech", options)
    files = sorted(path for folder in folders for path in folder.rglob("*.trans.txt"))
    if not files:
        raise DataError(
            f"{root} contains no transcript (SUBSET/SPEAKER/CHAPTER/*.trans.txt); check --src"
        )
    for path in files:
        yield from _read_chapter(path, root, options)


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


def _read_chapter(path: Path, root: Path, options: ReaderOptions) -> Iterator[Item]:
    relative = path.relative_to(root)
    # SUBSET/SPEAKER/CHAPTER/FILE; SRC may also be a subset.
    subset = relative.parts[0] if len(relative.parts) > 3 else ""
    # Different subsets may reuse the numbers of speakers and chapters.
    prefix = f"{subset}-" if subset else ""
    chapter = path.name.removesuffix(".trans.txt")
    speaker = chapter.partition("-")[0]
    audio_clips = {flac.stem: flac for flac in sorted(path.parent.glob("*.flac"))}
    text = read_text(path)
    for number, line in enumerate(text.split("\n"), start=1):
        name, _, transcript = line.strip().partition(" ")
        if not name:
            continue
        audio_clips.pop(name, None)
        problem = text_problem(transcript, "the transcript")
        transcript = " ".join(transcript.split())
        if not options.keep_case:
            transcript = transcript.lower()
        yield Item(
            key=clean_key(f"{prefix}{name}"),
            group=utterance_group(chapter, speaker, transcript, options.group_by),
            source=f"{relative} line {number}",
            declared_split=declared_split(subset),
            texts=() if problem else (transcript,),
            media=(str(path.parent / f"{name}.flac"),),
            metadata={"speaker": options.speaker or speaker, "language": options.language},
            problem=problem,
        )
    for name, flac in audio_clips.items():
        yield Item(
            key=clean_key(f"{prefix}{name}"),
            group=utterance_group(chapter, speaker, name, options.group_by),
            source=str(flac.relative_to(root)),
            problem=Problem(MISSING_TRANSCRIPT, f"{flac.name} has no line in {path.name}"),
        )


def utterance_group(chapter: str, speaker: str, transcript: str, group_by: str) -> str:
    """The group of an utterance; LibriTTS has the same chapters and hence the same groups."""
    if group_by == "transcript":
        return transcript_group(transcript.encode(errors="replace").decode())
    if group_by == "speaker":
        return f"speaker:{speaker}"
    return f"chapter:{chapter}"
