"""The files in the tars of a corpus, which are read from there when their samples are written."""

from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

from data_prep.corpus import Member
from data_prep.skipped_files import SkippedFiles
from muomni.data.shards.tar_index import member_clutter, scan_tar, split_member_name
from muomni.errors import DataError

# The members of a sample by suffix, such as `.jpg` or `.mask.png`, in lower case.
Members = dict[str, Member]


def tar_members(path: Path, skipped: SkippedFiles) -> Iterator[Member]:
    """The files of a tar, without clutter; raises `DataError` if it is damaged."""
    for member in scan_tar(path):
        if kind := member_clutter(member.name):
            skipped.clutter[kind] += 1
        else:
            yield Member(str(path), member.data_offset, member.num_bytes, member.name)


def tar_samples(
    path: Path, unique: tuple[tuple[str, ...], ...], skipped: SkippedFiles
) -> dict[str, Members]:
    """The samples of a tar by key; their members may be apart.

    Keys end at the first dot of a name, as in WebDataset; in a tar where a sample would then have two files of
    a kind in `unique`, such as `a.v1.jpg` and `a.v2.jpg`, they end at the last one.
    """
    members = list(tar_members(path, skipped))
    samples = _by_key(members, split_member_name)
    for sample in samples.values():
        if any(len(members_of_kind(sample, suffixes)) > 1 for suffixes in unique if suffixes):
            return _by_key(members, _split_at_last_dot)
    return samples


def members_of_kind(members: Members, suffixes: tuple[str, ...]) -> list[Member]:
    """The members of a kind; those with one suffix are preferred to others, such as `.mask.png`."""
    found = {name: member for name, member in members.items() if name.endswith(suffixes)}
    return [member for name, member in found.items() if name in suffixes] or list(found.values())


def _by_key(members: list[Member], split: Callable[[str], tuple[str, str]]) -> dict[str, Members]:
    samples: dict[str, Members] = {}
    for member in members:
        key, suffix = split(member.name)
        sample = samples.setdefault(key, {})
        first = sample.setdefault(f".{suffix.lower()}", member)
        if first is not member:
            raise DataError(
                f"{member.path}: {first.name!r} and {member.name!r} are the same member"
            )
    return samples


def _split_at_last_dot(name: str) -> tuple[str, str]:
    path = PurePosixPath(name)
    return str(path.with_suffix("")), path.suffix.removeprefix(".")
