"""The manifest of a dataset (`manifest.json`): splits, shards, totals, and fingerprint.

The manifest is written last, so a folder with a manifest is complete. Each shard has three sidecars: an
index (offset of each sample), a column file (sizes of each sample), and a record. Paths are relative to
the manifest, so a dataset can be moved. Nothing here imports torch.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np
from pydantic import Field, ValidationError, model_validator

from muomni.config.models import Record
from muomni.config.run import Task
from muomni.errors import DataError
from muomni.io.remote_folder import RemoteFolder

SCHEMA_VERSION = 1
MANIFEST_NAME = "manifest.json"
SPLIT_NAMES = ("train", "val", "test")

TASKS: tuple[Task, ...] = get_args(Task)

# One row per sample. Hashes are `hash64`; `duration_ms` is the sum over the audio clips of a sample.
COLUMNS = np.dtype(
    [
        ("key_hash", "<u8"),
        ("group_hash", "<u8"),
        ("content_hash", "<u8"),
        ("num_bytes", "<u4"),
        ("duration_ms", "<u4"),
        ("num_chars", "<u4"),
        ("num_pixels", "<u4"),
        ("num_images", "<u2"),
        ("num_audios", "<u2"),
    ]
)


def hash64(text: str | bytes) -> int:
    """A 64-bit hash that is the same on every machine and in every process."""
    content = text.encode() if isinstance(text, str) else text
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


class Totals(Record):
    """Sums over samples."""

    num_samples: int = 0
    num_bytes: int = 0
    duration_ms: int = 0
    num_chars: int = 0
    num_pixels: int = 0
    num_images: int = 0
    num_audios: int = 0

    @classmethod
    def of_columns(cls, columns: np.ndarray) -> "Totals":
        """Sum the column file of a shard (structured array of `COLUMNS`)."""
        names = [name for name in cls.model_fields if name != "num_samples"]
        sums = {name: int(columns[name].sum(dtype=np.uint64)) for name in names}
        return cls(num_samples=len(columns), **sums)

    def __add__(self, other: "Totals") -> "Totals":
        return Totals(
            **{name: getattr(self, name) + getattr(other, name) for name in Totals.model_fields}
        )


class ShardRecord(Record):
    """A complete shard: the content of its `.json` file and its entry in the manifest.

    `path` is the tar relative to the dataset and `num_bytes` its size. `config_digest` identifies the
    plan and options that it was written with, `sources_digest` the state of the source files.
    """

    path: str
    split: str
    num_samples: int
    num_bytes: int
    sha256: str
    index_sha256: str
    columns_sha256: str
    members: tuple[str, ...] = ()
    totals: Totals
    num_planned: int
    dropped: dict[str, int] = Field(default_factory=dict)
    config_digest: str = ""
    sources_digest: str = ""


class Split(Record):
    """An ordered list of shards; sample ids are numbered through them in this order."""

    shards: tuple[ShardRecord, ...]

    @property
    def totals(self) -> Totals:
        """Sums over all shards."""
        return sum((shard.totals for shard in self.shards), Totals())

    @property
    def num_samples(self) -> int:
        return sum(shard.num_samples for shard in self.shards)

    def __len__(self) -> int:
        return self.num_samples


@dataclass(frozen=True, slots=True)
class Origin:
    """The remote folder of a dataset, and the cache that holds at most `max_bytes` of its tars."""

    folder: RemoteFolder
    cache_dir: Path
    max_bytes: int


class Manifest(Record):
    """A complete dataset: `Manifest.load(folder)`.

    `root` contains the shards; for a remote dataset (`origin`), only copies of the sidecars.

    `fingerprint` is a SHA-256 over splits, shard names, sample counts, and shard digests: equal
    fingerprints mean equal samples in equal order. `dropped` counts unusable and filtered samples by
    reason; `preprocessing` lists the changes applied to samples, and `changed` counts samples that were
    changed for other reasons. `overlap` is the number of samples per held-out split whose groups are also in
    train, if this was allowed.
    """

    root: Path = Field(exclude=True)
    origin: Origin | None = Field(default=None, exclude=True)
    schema_version: int = SCHEMA_VERSION
    name: str
    task: Task
    reader: str
    reader_options: dict[str, str] = Field(default_factory=dict)
    split_rule: str
    license: str = ""
    sources: tuple[str, ...] = ()
    config_digest: str = ""
    fingerprint: str
    splits: dict[str, Split]
    dropped: dict[str, int] = Field(default_factory=dict)
    filters: dict[str, str] = Field(default_factory=dict)
    preprocessing: dict[str, str] = Field(default_factory=dict)
    changed: dict[str, int] = Field(default_factory=dict)
    overlap: dict[str, int] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check(self) -> "Manifest":
        if self.schema_version != SCHEMA_VERSION:
            raise ValueError(
                f"schema_version is {self.schema_version}, this version reads {SCHEMA_VERSION}"
            )
        return self

    @classmethod
    def load(cls, folder: Path | str) -> "Manifest":
        """Read `folder/manifest.json`; raises `DataError` if it is missing or malformed."""
        folder = Path(folder)
        path = folder / MANIFEST_NAME
        try:
            content = path.read_bytes()
        except FileNotFoundError as error:
            raise DataError(
                f"{folder} is not a complete dataset: {MANIFEST_NAME} is missing; "
                "run its `python -m data_prep` command, which continues where it stopped"
            ) from error
        except OSError as error:
            raise DataError(f"cannot read {path}: {error}") from error
        return cls.parse(content, folder, str(path))

    @classmethod
    def parse(cls, text: bytes, root: Path, source: str) -> "Manifest":
        """Parse the text of the manifest of the dataset in `root`.

        Raises `DataError` that names the `source` of the text if it is malformed.
        """
        try:
            content = json.loads(text)
        except ValueError as error:
            raise DataError(f"cannot read {source}: {error}") from error
        try:
            manifest = cls(root=root, **content)
        except (ValidationError, TypeError) as error:
            raise DataError(f"{source} is not a valid manifest: {_first_problem(error)}") from error
        expected = fingerprint(manifest.splits)
        if manifest.fingerprint != expected:
            raise DataError(
                f"{source} was edited: its fingerprint does not match its shards; "
                "restore the file or rebuild the dataset"
            )
        return manifest

    @property
    def location(self) -> str:
        """The folder or URL of the dataset, for messages."""
        return str(self.root) if self.origin is None else self.origin.folder.url

    def split(self, name: str) -> Split:
        """The split `name`; raises `DataError` that lists the splits if it does not exist."""
        if name not in self.splits:
            raise DataError(
                f"dataset {self.location} has no split {name!r}; it has {', '.join(self.splits)}"
            )
        return self.splits[name]

    def without_shards(self) -> "Manifest":
        """A copy with empty splits, which is small enough to send to other processes."""
        return self.model_copy(update={"splits": dict.fromkeys(self.splits, Split(shards=()))})

    def to_json(self) -> str:
        """The text of `manifest.json`, with sorted keys, so equal manifests have equal bytes."""
        # Older versions reject these keys; omitting them keeps a dataset readable.
        optional = ("filters", "preprocessing", "changed", "overlap")
        unused = {name for name in optional if not getattr(self, name)}
        content = self.model_dump(mode="json", exclude=unused)
        return json.dumps(content, indent=1, sort_keys=True) + "\n"


def fingerprint(splits: dict[str, Split]) -> str:
    """SHA-256 over (split, path, samples, digest) of all shards in order."""
    digest = hashlib.sha256()
    for name in sorted(splits):
        for shard in splits[name].shards:
            digest.update(f"{name}\t{shard.path}\t{shard.num_samples}\t{shard.sha256}\n".encode())
    return digest.hexdigest()


def find_datasets(data_dir: Path | str, task: Task) -> list[Manifest]:
    """Datasets of one task in `data_dir` or its direct subfolders, sorted by name.

    Raises `DataError` if there is none.
    """
    data_dir = Path(data_dir)
    if not data_dir.is_dir():
        raise DataError(
            f"data folder {data_dir} does not exist; create one with "
            f"`python -m data_prep {task} --out {data_dir}/NAME ...` "
            f"or `python -m data_prep sample --out {data_dir}`"
        )
    folders = [data_dir, *sorted(path for path in data_dir.iterdir() if path.is_dir())]
    complete = [folder for folder in folders if (folder / MANIFEST_NAME).is_file()]
    found = [manifest for manifest in map(Manifest.load, complete) if manifest.task == task]
    if not found:
        raise DataError(
            f"{data_dir} has no complete dataset of task {task!r}; create one with "
            f"`python -m data_prep {task} --format FORMAT --src SOURCE --out {data_dir}/NAME`"
        )
    return sorted(found, key=lambda manifest: (manifest.name, str(manifest.root)))


def _first_problem(error: Exception) -> str:
    """The first problem of a validation error, in one line."""
    if isinstance(error, ValidationError):
        problem = error.errors()[0]
        field = ".".join(str(part) for part in problem["loc"])
        return f"{field}: {problem['msg']}" if field else str(problem["msg"])
    return str(error)
