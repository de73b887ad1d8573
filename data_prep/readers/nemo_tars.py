"""Audio files of NeMo's tarred datasets: `audio_0.tar`, ... beside `tarred_audio_manifest.json`.

A line names the file by its name in the tar `shard_id`. Manifests of single tars are in `sharded_manifests`.
"""

import re
from pathlib import Path, PurePosixPath

from data_prep.corpus import MISSING_MEDIA, BadSampleError, Member
from data_prep.readers.tars import tar_members
from data_prep.readers.text_files import Record
from data_prep.readers.walk import find_files
from data_prep.skipped_files import SkippedFiles
from data_prep.values import name_value
from muomni.errors import DataError


class TarredAudio:
    """The audio files in the tars of a folder, or of the folder above."""

    def __init__(self, root: Path, skipped: SkippedFiles) -> None:
        """Raises `DataError` if there are no tars or one is damaged."""
        folders = (folder for folder in (root, root.parent) if any(folder.glob("*.tar")))
        folder = next(folders, root)
        self._skipped = skipped
        self._members: dict[tuple[str, str], Member] = {}
        self._used: set[tuple[str, str]] = set()
        paths = find_files(folder, (".tar",), SkippedFiles())
        if not paths:
            raise DataError(
                f"the manifest is about files in tars, but {root} contains no *.tar; pass their folder "
                "with --media"
            )
        for path in paths:
            numbers = re.findall(r"\d+", path.stem)
            shard = str(int(numbers[-1])) if numbers else ""
            for member in tar_members(path, skipped):
                self._members[shard, PurePosixPath(member.name).stem] = member

    def find(self, record: Record, name: str) -> Member:
        """The file of a line; raises `BadSampleError` if its tar does not contain it."""
        shard = name_value(record.get("shard_id"), "shard_id")
        key = shard, PurePosixPath(name).stem
        if key not in self._members:
            raise BadSampleError(MISSING_MEDIA, f"the tar of shard {shard} does not contain {name}")
        self._used.add(key)
        return self._members[key]

    def count_unused(self) -> None:
        """Count the files that no line is about."""
        if unused := len(self._members) - len(self._used):
            self._skipped.others["in tars, without a line in the manifest"] += unused
