"""Takes over WebDataset tars that others made: writes index, columns, records and a manifest.

The tars stay as and where they are. A sample that lacks what the task needs, or does not decode, stays
in its tar, since an index cannot leave a hole; it is counted, and too many of them are an error.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.inspection.measurements import metrics
from data_prep.sharding.finalize import store_manifest
from data_prep.sharding.sharder import Progress
from muomni.data.media.decode import AUDIO_EXTENSIONS, IMAGE_EXTENSIONS
from muomni.data.shards.manifest import (
    COLUMNS,
    MANIFEST_NAME,
    SPLIT_NAMES,
    Manifest,
    ShardRecord,
    Split,
    Task,
    Totals,
    fingerprint,
    hash64,
)
from muomni.data.shards.tar_index import (
    SampleSpan,
    group_samples,
    index_offsets,
    index_path,
    scan_tar,
    split_member_name,
    write_index,
)
from muomni.data.shards.writer import SampleCost, finish_record, load_record
from muomni.errors import DataError


@dataclass(frozen=True, slots=True)
class _BadSample:
    key: str
    path: Path
    message: str


def adopt(
    root: Path, task: Task, name: str, license: str, max_bad_fraction: float, progress: Progress
) -> Manifest:
    """Index all tars in `root` and below; the folder of a tar decides its split, else train.

    Raises `DataError` for a folder without tars, a damaged tar, a dataset that has a manifest, or
    too many bad samples.
    """
    if (root / MANIFEST_NAME).exists():
        raise DataError(f"{root} already has a {MANIFEST_NAME}; delete it to index the tars again")
    paths = sorted(path for path in root.rglob("*.tar") if not path.name.startswith("."))
    if not paths:
        raise DataError(f"{root} holds no *.tar shard; name the folder that does, or one above it")
    bad: list[_BadSample] = []
    shards: dict[str, list[ShardRecord]] = {split: [] for split in SPLIT_NAMES}
    for path in paths:
        if not path.is_file():
            raise DataError(f"{path} is no regular file; move it out of {root}")
        _refuse_foreign_json(path)
        split = next(
            (part for part in path.relative_to(root).parts if part in SPLIT_NAMES), "train"
        )
        record = _index_shard(path, root, task, split, bad, progress)
        if record.num_samples:
            shards[split].append(record)
    splits = {split: Split(shards=tuple(records)) for split, records in shards.items() if records}
    num_samples = sum(split.num_samples for split in splits.values())
    if num_samples == 0:
        raise DataError(f"the tars in {root} hold no sample")
    if len(bad) > max_bad_fraction * num_samples:
        raise DataError(
            f"{len(bad)} of {num_samples} samples do not serve task {task!r} "
            f"({len(bad) / num_samples:.2%}), more than --max-bad-fraction {max_bad_fraction:g}; "
            f"the first is {bad[0].key!r} in {bad[0].path}: {bad[0].message}"
        )
    manifest = Manifest(
        root=root,
        name=name,
        task=task,
        reader="webdataset",
        split_rule="by folder of the shard, else train",
        license=license,
        fingerprint=fingerprint(splits),
        splits=splits,
        dropped={"kept-but-bad": len(bad)} if bad else {},
    )
    store_manifest(manifest)
    return manifest


def _refuse_foreign_json(path: Path) -> None:
    """A record may not overwrite a `.json` that another tool put beside its tar."""
    record = path.with_suffix(".json")
    if not record.exists():
        return
    try:
        load_record(path)
    except DataError as error:
        raise DataError(
            f"{record} was written by another tool and stands where the record of {path.name} goes; "
            "move it away and run again"
        ) from error


def _index_shard(
    path: Path, root: Path, task: Task, split: str, bad: list[_BadSample], progress: Progress
) -> ShardRecord:
    """Write index, columns and record of one tar."""
    samples = group_samples(scan_tar(path), path)
    rows = []
    extensions: set[str] = set()
    with path.open("rb") as file:
        for sample in samples:
            _refuse_names(sample, path, task)
            content: dict[str, bytes | str] = {"__key__": sample.key}
            for member in sample.members:
                file.seek(member.data_offset)
                content[split_member_name(member.name)[1]] = file.read(member.num_bytes)
            try:
                cost = metrics(content, task)
            except DataError as error:
                bad.append(_BadSample(sample.key, path, str(error)))
                cost = SampleCost()
            extensions.update(extension for extension in content if extension != "__key__")
            rows.append(_row(sample, content, cost))
            progress.update(1)
    columns = np.array(rows, dtype=COLUMNS)
    offsets = index_offsets(samples)
    write_index(index_path(path), offsets)
    record = ShardRecord(
        path=str(path.relative_to(root)),
        split=split,
        num_samples=len(samples),
        num_bytes=path.stat().st_size,
        sha256=_digest(path),
        index_sha256=hashlib.sha256(offsets.tobytes()).hexdigest(),
        columns_sha256="",
        members=tuple(sorted(extensions)),
        totals=Totals.of_columns(columns),
        num_planned=len(samples),
    )
    return finish_record(path, record, columns)


def _refuse_names(sample: SampleSpan, path: Path, task: Task) -> None:
    """Raise `DataError` for names that lead out of a folder, and for keys that hold dots.

    Such keys make one sample of several: img.v1.001.jpg and img.v1.002.jpg are both of sample `img`.
    """
    if sample.key.startswith("/") or ".." in sample.key.split("/"):
        raise DataError(
            f"{path}: member {sample.members[0].name!r} leads out of the folder that it would be "
            "unpacked to; write the shard again with plain names"
        )
    extensions = [split_member_name(member.name)[1] for member in sample.members]
    kinds = Counter(extension.rpartition(".")[2].lower() for extension in extensions)
    single = ["json", "txt", *(() if task == "sft" else IMAGE_EXTENSIONS + AUDIO_EXTENSIONS)]
    for kind in single:
        if kinds[kind] > 1:
            names = [member.name for member in sample.members if member.name.endswith(kind)]
            raise DataError(
                f"{path}: {names[0]!r} and {names[1]!r} count as one sample, whose key ends at the "
                "first dot; write the shard again with keys without dots"
            )


def _row(sample: SampleSpan, content: dict[str, bytes | str], cost: SampleCost) -> tuple[int, ...]:
    members = {name: data for name, data in content.items() if isinstance(data, bytes)}
    digest = hashlib.blake2b(digest_size=8)
    for extension, data in members.items():
        digest.update(f"{extension}:{len(data)}:".encode())
        digest.update(data)
    return (
        hash64(sample.key),
        hash64(sample.key),
        int.from_bytes(digest.digest(), "little"),
        sum(len(data) for data in members.values()),
        cost.duration_ms,
        cost.num_chars,
        cost.num_pixels,
        cost.num_images,
        cost.num_audios,
    )


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    for chunk in _chunks(path):
        digest.update(chunk)
    return digest.hexdigest()


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            yield chunk
