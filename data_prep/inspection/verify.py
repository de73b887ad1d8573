"""Verify datasets on disk; each level includes the previous one.

quick: sizes and counts of all files against the manifest. full: SHA-256 of tars, indices, and columns, a
scan of all tar headers, and unique keys across shards. decode: a fraction of the samples is decoded.
Bad samples can be masked; those under a mask are no problem, since training skips them.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import partial
from itertools import accumulate
from pathlib import Path

import numpy as np

from data_prep.curation.exclude import Mask, mask_problems, remove_mask, write_mask
from data_prep.datasets import by_shard, map_shards
from data_prep.members import measure
from muomni.data.shards.exclusion_mask import FOLDER, read_exclusion, read_mask
from muomni.data.shards.manifest import Manifest, ShardRecord, Split, Totals, hash64
from muomni.data.shards.reader import SplitReader, check_shard
from muomni.data.shards.tar_index import (
    BLOCK_BYTES,
    group_samples,
    index_offsets,
    index_path,
    read_index,
    scan_tar,
    split_member_name,
)
from muomni.data.shards.writer import (
    SampleCost,
    columns_path,
    content_hash,
    load_columns,
    load_record,
)
from muomni.errors import ConfigError, DataError
from muomni.io.hashing import sha256_file

_MASK_NAME = "verify"
# Costs that decoding yields and columns store.
_COST_NAMES = tuple(field.name for field in fields(SampleCost))


@dataclass(frozen=True, slots=True)
class Report:
    """What was checked, and a message for each problem.

    `excluded` are messages about samples that masks exclude. `bad_samples` are the ids of all bad samples by
    split, and `masks` the masks that were written.
    """

    num_shards: int
    num_samples: int
    num_decoded: int
    problems: tuple[str, ...]
    excluded: tuple[str, ...]
    bad_samples: dict[str, tuple[int, ...]]
    masks: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Finding:
    """A problem of a split: of the sample `id`, or of a whole file or dataset."""

    message: str
    split: str = ""
    id: int | None = None


def verify(
    manifest: Manifest,
    full: bool,
    decode_percent: float,
    num_workers: int,
    quarantine: bool = False,
) -> Report:
    """Check all shards in parallel; with `quarantine`, mask bad samples. Nothing is repaired.

    Raises `ConfigError` for a percentage outside of 0 to 100.
    """
    if not 0 <= decode_percent <= 100:
        raise ConfigError(f"--decode must be between 0 and 100 percent, got {decode_percent:g}")
    shards = by_shard(manifest)
    name = f"{manifest.name} (verify)"
    results = map_shards(partial(_check, full, decode_percent), shards, num_workers, name)
    findings = []
    starts: Counter[str] = Counter()
    for shard, (found, _) in zip(shards, results, strict=True):
        ((split, content),) = shard.splits.items()
        findings += [
            _Finding(message, split, None if index is None else starts[split] + index)
            for message, index in found
        ]
        starts[split] += content.num_samples
    findings += [_Finding(text) for text in mask_problems(manifest) + _unlisted_tars(manifest)]
    if full and all(finding.id is not None for finding in findings):
        findings += _repeated_keys(manifest)
    bad = {split: _bad_ids(findings, split) for split in manifest.splits}
    is_complete = full and decode_percent == 100 and all(f.id is not None for f in findings)
    masks = _mask(manifest, bad, is_complete) if quarantine else []
    excluded = {split: _excluded_ids(manifest, split) for split in manifest.splits}
    is_excluded = [each.id in excluded.get(each.split, ()) for each in findings]
    return Report(
        num_shards=len(shards),
        num_samples=sum(split.num_samples for split in manifest.splits.values()),
        num_decoded=sum(num_decoded for _, num_decoded in results),
        problems=tuple(_messages(findings, is_excluded, False)),
        excluded=tuple(_messages(findings, is_excluded, True)),
        bad_samples={split: ids for split, ids in bad.items() if ids},
        masks=tuple(f"{mask.path}: {len(mask.ids)} samples" for mask in masks),
    )


def _bad_ids(findings: list[_Finding], split: str) -> tuple[int, ...]:
    return tuple(sorted({f.id for f in findings if f.split == split and f.id is not None}))


def _excluded_ids(manifest: Manifest, split: str) -> set[int]:
    """The samples that masks exclude; none if a mask is broken, which is a problem of its own."""
    try:
        return set(read_exclusion(manifest, split).ids.tolist())
    except DataError:
        return set()


def _messages(findings: list[_Finding], is_excluded: list[bool], are_wanted: bool) -> Iterator[str]:
    for finding, excluded in zip(findings, is_excluded, strict=True):
        if excluded is are_wanted:
            yield finding.message


def _mask(manifest: Manifest, bad: dict[str, tuple[int, ...]], is_complete: bool) -> list[Mask]:
    """Mask the bad samples of each split; a complete check replaces an earlier mask, others add to it."""
    masks = []
    for split, found in bad.items():
        name = f"{_MASK_NAME}-{split}"
        ids = np.array(found, dtype=np.uint64)
        path = manifest.root / FOLDER / f"{name}.json"
        if not is_complete and path.is_file():
            earlier = read_mask(path, manifest, split)
            ids = ids if earlier is None else np.union1d(ids, earlier)
        if len(ids):
            masks.append(write_mask(manifest, name, split, ids, "found bad by verify"))
        else:
            remove_mask(manifest.root, name)
    return masks


# A problem of a shard, and the number of the sample in it that it concerns, if it is one.
_Problem = tuple[str, int | None]


def _check(full: bool, decode_percent: float, manifest: Manifest) -> tuple[list[_Problem], int]:
    """Problems of a single-shard dataset, and the number of decoded samples."""
    ((split, content),) = manifest.splits.items()
    (shard,) = content.shards
    path = manifest.root / shard.path
    try:
        load_columns(columns_path(path))
        check_shard(manifest, shard)
        texts = _check_sidecars(path, shard)
    except DataError as error:
        texts = [str(error)]
    if full and not texts:
        texts, is_changed = _check_bytes(path, shard)
        try:
            texts += _check_headers(path, shard)
        except DataError as error:
            texts.append(str(error))
        if is_changed:
            return [*((text, None) for text in texts), *_changed_samples(manifest, split)], 0
    if texts or not decode_percent:
        return [(text, None) for text in texts], 0
    return _decode(manifest, split, decode_percent)


def _changed_samples(manifest: Manifest, split: str) -> Iterator[_Problem]:
    """The samples of a changed shard whose content is not that of the columns."""
    reader = SplitReader(manifest, split)
    (shard,) = manifest.split(split).shards
    for index, expected in enumerate(reader.columns["content_hash"].tolist()):
        try:
            sample = reader.read(index)
            members = [(name, data) for name, data in sample.items() if isinstance(data, bytes)]
            is_same = content_hash(members) == expected
        except DataError:
            is_same = False
        if not is_same:
            path = manifest.root / shard.path
            yield f"sample {index} of {path} has changed since it was written", index


def _check_sidecars(path: Path, shard: ShardRecord) -> list[str]:
    """Check the record and the end of the index; reads one block of the tar."""
    record = load_record(path)
    if record is None:
        return [f"the record of {path} is missing"]
    if record != shard:
        return [f"the record of {path} differs from the manifest"]
    end = int(read_index(index_path(path))[-1])
    with path.open("rb") as file:
        file.seek(end)
        # An empty block ends a tar; an index may also include it and end with the file.
        if file.read(BLOCK_BYTES).strip(b"\0"):
            return [f"{index_path(path)} ends at byte {end}, but {path} continues"]
    return []


def _check_bytes(path: Path, shard: ShardRecord) -> tuple[list[str], bool]:
    """Problems of all files, and whether only the tar has changed."""
    files = {
        path: shard.sha256,
        index_path(path): shard.index_sha256,
        columns_path(path): shard.columns_sha256,
    }
    changed = [file for file, expected in files.items() if sha256_file(file) != expected]
    texts = [
        f"the SHA-256 of {file} differs from the manifest; copy or create it again"
        for file in changed
    ]
    return texts, changed == [path]


def _check_headers(path: Path, shard: ShardRecord) -> list[str]:
    """Scan all headers: offsets must match the index, and keys the columns."""
    problems = []
    samples = group_samples(scan_tar(path), path)
    starts = index_offsets(samples)[:-1]
    if not np.array_equal(starts, read_index(index_path(path))[:-1]):
        problems.append(f"{index_path(path)} does not match {path}; create it again")
    columns = load_columns(columns_path(path))
    keys = np.array([hash64(sample.key) for sample in samples], dtype=np.uint64)
    if not np.array_equal(columns["key_hash"], keys):
        problems.append(f"{columns_path(path)} and {path} have different keys")
    if Totals.of_columns(columns) != shard.totals:
        problems.append(f"the totals of {columns_path(path)} differ from the manifest")
    return problems


def _decode(manifest: Manifest, split: str, percent: float) -> tuple[list[_Problem], int]:
    """Decode a random but reproducible fraction of a shard's samples, and compare their costs."""
    reader = SplitReader(manifest, split)
    (shard,) = manifest.split(split).shards
    problems: list[_Problem] = []
    shares = reader.columns["key_hash"] / 2**64 * 100
    chosen = np.flatnonzero(shares < percent)
    for index in map(int, chosen):
        try:
            sample = reader.read(index)
            where = f"{manifest.root / shard.path} sample {sample['__key__']!r}"
        except DataError as error:
            problems.append((str(error), index))
            continue
        try:
            cost = measure(sample, manifest.task)
        except DataError as error:
            problems.append((f"{where}: {error}", index))
            continue
        row = reader.columns[index]
        problems += [
            (f"{where}: {name} is {getattr(cost, name)}, but the columns have {row[name]}", index)
            for name in _COST_NAMES
            if getattr(cost, name) != row[name]
        ]
    return problems, len(chosen)


def _unlisted_tars(manifest: Manifest) -> list[str]:
    """Non-empty shards that the manifest does not list: other tools would read them too."""
    listed = {shard.path for split in manifest.splits.values() for shard in split.shards}
    problems = []
    for path in sorted(manifest.root.rglob("*.tar")):
        name = str(path.relative_to(manifest.root))
        if name in listed or path.name.startswith("."):
            continue
        try:
            record = load_record(path)
        except DataError:
            record = None
        if record is None or record.num_samples:
            problems.append(
                f"{path} is not in the manifest; delete it, or rerun the command that created it"
            )
    return problems


def _repeated_keys(manifest: Manifest) -> list[_Finding]:
    """Samples whose key also occurs in an earlier shard."""
    shards = [
        (name, shard, start)
        for name, split in manifest.splits.items()
        for shard, start in zip(split.shards, _starts(split), strict=True)
    ]
    hashes = [
        load_columns(columns_path(manifest.root / shard.path))["key_hash"] for _, shard, _ in shards
    ]
    unique, counts = np.unique(np.concatenate(hashes), return_counts=True)
    suspects = unique[counts > 1]
    seen: dict[str, str] = {}
    problems = []
    # Read the keys only of shards with a repeated hash.
    for (split, shard, start), own in zip(shards, hashes, strict=True):
        if not np.isin(own, suspects).any():
            continue
        members = scan_tar(manifest.root / shard.path)
        keys = dict.fromkeys(split_member_name(member.name)[0] for member in members)
        for id_, key in enumerate(keys, start=start):
            first = seen.setdefault(key, shard.path)
            if first != shard.path:
                message = f"key {key!r} occurs in {first} and {shard.path}"
                problems.append(_Finding(message, split, id_))
    return problems


def _starts(split: Split) -> list[int]:
    """The id of the first sample of each shard."""
    counts = (shard.num_samples for shard in split.shards)
    return list(accumulate(counts, initial=0))[:-1]
