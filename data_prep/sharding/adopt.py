"""Adopt existing WebDataset tars: write their indices, columns, and records, and a manifest.

The tars stay unchanged and in place. An index cannot have gaps, so samples that lack a member or do not
decode stay in the dataset; they are counted, and too many of them are an error.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.members import measure
from data_prep.readers.walk import find_files
from data_prep.sharding.finalize import store_manifest
from data_prep.skipped_files import SkippedFiles
from muomni.data.media.formats import AUDIO_EXTENSIONS, IMAGE_EXTENSIONS
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
    member_clutter,
    scan_tar,
    split_member_name,
    write_index,
)
from muomni.data.shards.writer import (
    SampleCost,
    columns_path,
    content_hash,
    finish_record,
    load_record,
    record_path,
)
from muomni.errors import DataError
from muomni.io.count_progress import Progress
from muomni.io.hashing import sha256_bytes, sha256_file


@dataclass(frozen=True, slots=True)
class _BadSample:
    key: str
    path: Path
    message: str


def adopt(
    root: Path,
    task: Task,
    name: str,
    license: str,
    max_bad_fraction: float,
    progress: Progress,
    skipped: SkippedFiles,
) -> Manifest:
    """Index all tars in and below `root`; the folder of a tar determines its split (default: train).

    Files and members that are not data are counted in `skipped`. Raises `DataError` if there are no tars, a
    tar is damaged, the dataset has a manifest, or too many samples are bad; nothing is kept of them then.
    """
    if (root / MANIFEST_NAME).exists():
        raise DataError(f"{root} already has a {MANIFEST_NAME}; delete it to index the tars again")
    paths = find_files(root, (".tar",), skipped)
    if not paths:
        raise DataError(
            f"{root} contains no *.tar shard; pass the folder that does, or a parent folder"
        )
    bad: list[_BadSample] = []
    shards: dict[str, list[ShardRecord]] = {split: [] for split in SPLIT_NAMES}
    for path in paths:
        if not path.is_file():
            raise DataError(f"{path} is not a regular file; move it out of {root}")
        _check_record_name(path)
        split = next(
            (part for part in path.relative_to(root).parts if part in SPLIT_NAMES), "train"
        )
        record = _index_shard(path, root, task, split, bad, skipped, progress)
        if record.num_samples:
            shards[split].append(record)
    splits = {split: Split(shards=tuple(records)) for split, records in shards.items() if records}
    num_samples = sum(split.num_samples for split in splits.values())
    if num_samples == 0:
        raise DataError(f"the tars in {root} contain no sample")
    if len(bad) > max_bad_fraction * num_samples:
        for path in paths:
            for side_file in (index_path(path), columns_path(path), record_path(path)):
                side_file.unlink(missing_ok=True)
        raise DataError(
            f"{len(bad)} of {num_samples} samples cannot be used for task {task!r} "
            f"({len(bad) / num_samples:.2%}), more than --max-bad-fraction {max_bad_fraction:g}; "
            f"the first is {bad[0].key!r} in {bad[0].path}: {bad[0].message}{_hint(task)}"
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


def _hint(task: Task) -> str:
    """How to use tars of other layouts."""
    if task == "sft":
        return ""
    return f"; 'python -m data_prep {task} --format webdataset' reads more layouts, into new shards"


def _check_record_name(path: Path) -> None:
    """Raise `DataError` if the record would overwrite a `.json` file of another tool."""
    record = path.with_suffix(".json")
    if not record.exists():
        return
    try:
        load_record(path)
    except DataError as error:
        raise DataError(
            f"{record} was written by another tool, but the record of {path.name} needs that name; "
            "move it away and run again"
        ) from error


def _index_shard(
    path: Path,
    root: Path,
    task: Task,
    split: str,
    bad: list[_BadSample],
    skipped: SkippedFiles,
    progress: Progress,
) -> ShardRecord:
    """Write the index, columns, and record of one tar."""
    members = scan_tar(path)
    skipped.clutter.update(filter(None, (member_clutter(member.name) for member in members)))
    samples = group_samples(members, path)
    rows = []
    extensions: set[str] = set()
    with path.open("rb") as file:
        for sample in samples:
            _check_names(sample, path, task)
            content: dict[str, bytes | str] = {"__key__": sample.key}
            for member in sample.members:
                file.seek(member.data_offset)
                content[split_member_name(member.name)[1]] = file.read(member.num_bytes)
            try:
                cost = measure(content, task)
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
        sha256=sha256_file(path),
        index_sha256=sha256_bytes(offsets.tobytes()),
        columns_sha256="",
        members=tuple(sorted(extensions)),
        totals=Totals.of_columns(columns),
        num_planned=len(samples),
    )
    return finish_record(path, record, columns)


def _check_names(sample: SampleSpan, path: Path, task: Task) -> None:
    """Raise `DataError` for paths outside of the folder, and for keys that contain dots.

    Dots merge several samples into one: img.v1.001.jpg and img.v1.002.jpg both have the key `img`.
    """
    if sample.key.startswith("/") or ".." in sample.key.split("/"):
        raise DataError(
            f"{path}: member {sample.members[0].name!r} would be extracted outside of the target "
            "folder; rewrite the shard with relative names"
        )
    extensions = [split_member_name(member.name)[1] for member in sample.members]
    kinds = Counter(extension.rpartition(".")[2] for extension in extensions)
    single = ["json", "txt", *(() if task == "sft" else IMAGE_EXTENSIONS + AUDIO_EXTENSIONS)]
    for kind in single:
        if kinds[kind] > 1:
            names = [member.name for member in sample.members if member.name.lower().endswith(kind)]
            raise DataError(
                f"{path}: {names[0]!r} and {names[1]!r} form one sample, since keys end at the first "
                "dot; rewrite the shard with keys without dots, or write new shards with --format webdataset"
            )


def _row(sample: SampleSpan, content: dict[str, bytes | str], cost: SampleCost) -> tuple[int, ...]:
    members = {name: data for name, data in content.items() if isinstance(data, bytes)}
    return (
        hash64(sample.key),
        hash64(sample.key),
        content_hash(members.items()),
        sum(len(data) for data in members.values()),
        cost.duration_ms,
        cost.num_chars,
        cost.num_pixels,
        cost.num_images,
        cost.num_audios,
    )
