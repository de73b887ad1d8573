"""GigaSpeech: `GigaSpeech.json` with the segments of long audio files in `audio/`.

Segments are cut from the audio files. The tags `<COMMA>`, `<PERIOD>`, `<QUESTIONMARK>`, and
`<EXCLAMATIONPOINT>` become punctuation, and upper case becomes lower case unless `keep_case` is set.
Segments of silence, music, noise, or other sounds are skipped. `--subsets XS DEV TEST` selects subsets.
Group: the audio file.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from data_prep.corpus import BAD_RECORD, NO_SPEECH, BadSampleError, Clip, Item, Problem
from data_prep.options import ReaderOptions
from data_prep.readers.media_paths import find_media
from data_prep.readers.rows import Row, speech_item
from data_prep.readers.text_files import Record, read_json
from data_prep.values import name_value, text_value
from muomni.errors import DataError

_SIGNS = {"<COMMA>": ",", "<PERIOD>": ".", "<QUESTIONMARK>": "?", "<EXCLAMATIONPOINT>": "!"}
_NO_SPEECH = ("<SIL>", "<MUSIC>", "<NOISE>", "<OTHER>")
_DECLARED = {"DEV": "val", "TEST": "test"}


def read_gigaspeech(src: Path, options: ReaderOptions) -> Iterator[Item]:
    """List the segments of SRC/GigaSpeech.json, or of SRC if it is a file.

    Raises `DataError` if it is missing or has no list of audio files.
    """
    path = src if src.is_file() else src / "GigaSpeech.json"
    content = read_json(path, "GigaSpeech description")
    audios = content.get("audios") if isinstance(content, dict) else None
    if not isinstance(audios, list):
        raise DataError(f"{path} is not a GigaSpeech description: it has no list 'audios'")
    root = options.media_root or path.parent
    for number, audio in enumerate(audios):
        segments = audio.get("segments") if isinstance(audio, dict) else None
        if not isinstance(segments, list):
            problem = Problem(BAD_RECORD, "the audio file has no list 'segments'")
            name = f"{path.stem}-audio-{number:08d}"
            yield speech_item(Row(name, f"{path.name} audio {number}", {}, problem), root, options)
            continue
        for index, segment in enumerate(segments):
            source = f"{path.name} {audio.get('aid')} segment {index}"
            row = _row(audio, segment, source, root, options.keep_case)
            if not options.subsets or _subsets(row.values["subsets"]) & set(options.subsets):
                yield speech_item(row, root, options)


def _row(audio: Record, segment: object, source: str, root: Path, keep_case: bool) -> Row:
    if not isinstance(segment, dict):
        return Row(source, source, {"subsets": None}, Problem(BAD_RECORD, "it is not an object"))
    subsets = segment.get("subsets")
    split = next((s for name, s in _DECLARED.items() if name in _subsets(subsets)), "train")
    begin, end = segment.get("begin_time"), segment.get("end_time")
    try:
        text = text_value(segment.get("text_tn"), "text_tn")
        speaker = name_value(segment.get("speaker"), "speaker")
        path = find_media(root, text_value(audio.get("path"), "path"))
    except BadSampleError as error:
        return Row(source, source, {"id": segment.get("sid"), "subsets": subsets}, error.problem)
    values: dict[str, object] = {
        "id": segment.get("sid"),
        "text": _punctuate(text if keep_case else text.lower()),
        "speaker": "" if speaker == "N/A" else speaker,
        "language": "en",
        "split": split,
        "subsets": subsets,
        "group": "",
    }
    problem = None
    if any(tag in text for tag in _NO_SPEECH):
        problem = Problem(NO_SPEECH, f"the segment is {text.strip()}")
    elif not isinstance(begin, int | float) or not isinstance(end, int | float):
        problem = Problem(BAD_RECORD, "begin_time and end_time are not both numbers")
    else:
        values["audio"] = Clip(path, float(begin), round(float(end) - float(begin), 6))
    return Row(source, source, values, problem)


def _subsets(names: object) -> set[str]:
    """Subset names without braces: `["{XL}", "{DEV}"]` becomes XL and DEV."""
    return {str(name).strip("{}") for name in names} if isinstance(names, list) else set()


def _punctuate(text: str) -> str:
    """The text with tags replaced by punctuation, attached to the preceding word."""
    return re.sub(r"\s*(<[A-Za-z]+>)", lambda match: _SIGNS.get(match[1].upper(), match[0]), text)
