"""The files in the tars of a corpus, which are read from there when their samples are written."""

from collections.abc import Iterator
from pathlib import Path

from data_prep.corpus import Member
from data_prep.skipped_files import SkippedFiles
from muomni.data.shards.tar_index import member_clutter, scan_tar


def tar_members(path: Path, skipped: SkippedFiles) -> Iterator[Member]:
    """The files of a tar, without clutter; raises `DataError` if it is damaged."""
    for member in scan_tar(path):
        if kind := member_clutter(member.name):
            skipped.clutter[kind] += 1
        else:
            yield Member(str(path), member.data_offset, member.num_bytes, member.name)
