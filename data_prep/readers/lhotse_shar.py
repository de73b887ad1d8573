"""Lhotse Shar: `cuts.NNNNNN.jsonl.gz` with the audio of its cuts in `recording.NNNNNN.tar`.

Each supervision is a sample, as in Lhotse manifests. Group: the recording that the cut is from. Other fields
of Shar, such as features, are not read.
"""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from data_prep.corpus import (
    MISSING_MEDIA,
    BadSampleError,
    Clip,
    Item,
    Member,
    declared_split,
    require_folder,
)
from data_prep.options import ReaderOptions
from data_prep.readers.lhotse import (
    read_cuts,
    seconds,
    segment,
    source_of,
    supervision_record,
    supervision_values,
)
from data_prep.readers.rows import Row, speech_item
from data_prep.readers.tars import tar_members
from data_prep.readers.text_files import Record
from data_prep.readers.walk import AUDIO_SUFFIXES, walk
from data_prep.values import name_value, shown
from muomni.errors import DataError


def read_lhotse_shar(src: Path, options: ReaderOptions) -> Iterator[Item]:
    """List the supervisions of all Shar folders in and below SRC; a folder may declare a split.

    Raises `DataError` if there are no cuts, or the tar of one is missing or damaged.
    """
    is_empty = True
    require_folder(src, "folder of Lhotse Shar")
    for folder, names in walk(src, options.skipped):
        for name in names:
            if name.startswith("cuts.") and name.endswith((".jsonl", ".jsonl.gz")):
                is_empty = False
                yield from _read_shard(folder / name, src, options)
            elif not name.startswith("recording."):
                options.skipped.add_other(name)
    if is_empty:
        raise DataError(f"{src} contains no cuts.NNNNNN.jsonl.gz of Lhotse Shar; check --src")


def _read_shard(path: Path, src: Path, options: ReaderOptions) -> Iterator[Item]:
    number = path.name.removeprefix("cuts").partition(".jsonl")[0]
    tar = path.with_name(f"recording{number}.tar")
    if not tar.is_file():
        raise DataError(f"{path} has no {tar.name} beside it; download it")
    # The key of a member is everything before its last suffix, since ids may contain dots.
    members = {
        str(PurePosixPath(member.name).with_suffix("")): member
        for member in tar_members(tar, options.skipped)
        if member.name.lower().endswith(AUDIO_SUFFIXES)
    }
    relative = path.relative_to(src)
    split = next((s for s in map(declared_split, relative.parts[:-1]) if s), None)
    for position, cut, supervisions in read_cuts(path):
        for index, supervision in enumerate(supervisions):
            name = f"{relative}-{position.removeprefix('line ')}-{index}"
            row = Row(name, f"{relative} {position}", {"split": split}, block=str(relative))
            try:
                row.values.update(_values(cut, supervision, members, options))
            except BadSampleError as error:
                row = Row(name, row.source, {"split": split}, error.problem)
            yield speech_item(row, src, options)


def _values(
    cut: Record, supervision: object, members: dict[str, Member], options: ReaderOptions
) -> Record:
    record = supervision_record(supervision)
    audio = cut["recording"]
    assert isinstance(audio, dict)
    cut_id = name_value(cut.get("id"), "id")
    member = members.get(cut_id)
    if member is None:
        raise BadSampleError(
            MISSING_MEDIA, f"the tar does not contain the audio of cut {shown(cut_id)}"
        )
    _, channel = source_of(audio, record.get("channel"))
    start_s = seconds(cut.get("start")) + seconds(record.get("start"))
    clip = Clip(member.path, start_s, seconds(record.get("duration")), channel, member)
    values = {**supervision_values(record), "audio": segment(clip, audio) or member}
    if not options.group_by:
        values["group"] = f"recording:{name_value(audio.get('id'), 'id') or cut_id}"
    return values
