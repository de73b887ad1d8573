"""Verify datasets on disk; each level includes the previous one.

quick: sizes and counts of all files against the manifest. full: SHA-256 of tars, indices, and columns, a
scan of all tar headers, and unique keys across shards. decode: a fraction of the samples is decoded.
"""

from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import numpy as np

from data_prep.curation.exclude import mask_problems
from data_prep.datasets import by_shard, map_shards
from data_prep.members import measure
from muomni.data.shards.manifest import Manifest, ShardRecord, Totals, hash64
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
from muomni.data.shards.writer import SampleCost, columns_path, load_columns, load_record
from muomni.errors import ConfigError, DataError
from muomni.io.hashing import sha256_file

# Costs that decoding yields and columns store.
_COST_NAMES = tuple(field.name for field in fields(SampleCost))


@dataclass(frozen=True, slots=True)
class Report:
    """What was checked, and a message for each problem."""

    num_shards: int
    num_samples: int
    num_decoded: int
    problems: tuple[str, ...]


def verify(manifest: Manifest, full: bool, decode_percent: float, num_workers: int) -> Report:
    """Check all shards in parallel; nothing is repaired.

    Raises `ConfigError` for a percentage outside of 0 to 100.
    """
    if not 0 <= decode_percent <= 100:
        raise ConfigError(f"--decode must be between 0 and 100 percent, got {decode_percent:g}")
    shards = by_shard(manifest)
    results = map_shards(partial(_check, full, decode_percent), shards, num_workers)
    problems = [problem for found, _ in results for problem in found]
    problems += mask_problems(manifest) + _unlisted_tars(manifest)
    if full and not problems:
        problems += _repeated_keys(manifest)
    return Report(
        num_shards=len(shards),
        num_samples=sum(split.num_samples for split in manifest.splits.values()),
        num_decoded=sum(num_decoded for _, num_decoded in results),
        problems=tuple(problems),
    )


def _check(full: bool, decode_percent: float, manifest: Manifest) -> tuple[list[str], int]:
    """Problems of a single-shard dataset, and the number of decoded samples."""
    ((split, content),) = manifest.splits.items()
    (shard,) = content.shards
    path = manifest.root / shard.path
    try:
        load_columns(columns_path(path))
        check_shard(manifest, shard)
        problems = _check_sidecars(path, shard)
    except DataError as error:
        problems = [str(error)]
    if full and not problems:
        problems += _check_bytes(path, shard)
        try:
            problems += _check_headers(path, shard)
        except DataError as error:
            problems.append(str(error))
    if problems or not decode_percent:
        return problems, 0
    return _decode(manifest, split, decode_percent)


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


def _check_bytes(path: Path, shard: ShardRecord) -> list[str]:
    files = {
        path: shard.sha256,
        index_path(path): shard.index_sha256,
        columns_path(path): shard.columns_sha256,
    }
    return [
        f"the SHA-256 of {file} differs from the manifest; copy or create it again"
        for file, expected in files.items()
        if sha256_file(file) != expected
    ]


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


def _decode(manifest: Manifest, split: str, percent: float) -> tuple[list[str], int]:
    """Decode a random but reproducible fraction of a shard's samples, and compare their costs."""
    reader = SplitReader(manifest, split)
    (shard,) = manifest.split(split).shards
    problems = []
    shares = reader.columns["key_hash"] / 2**64 * 100
    chosen = np.flatnonzero(shares < percent)
    for index in map(int, chosen):
        try:
            sample = reader.read(index)
            where = f"{manifest.root / shard.path} sample {sample['__key__']!r}"
        except DataError as error:
            problems.append(str(error))
            continue
        try:
            cost = measure(sample, manifest.task)
        except DataError as error:
            problems.append(f"{where}: {error}")
            continue
        row = reader.columns[index]
        problems += [
            f"{where}: {name} is {getattr(cost, name)}, but the columns have {row[name]}"
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


def _repeated_keys(manifest: Manifest) -> list[str]:
    """Keys that occur in several shards."""
    shards = [shard for split in manifest.splits.values() for shard in split.shards]
    hashes = [
        load_columns(columns_path(manifest.root / shard.path))["key_hash"] for shard in shards
    ]
    unique, counts = np.unique(np.concatenate(hashes), return_counts=True)
    suspects = unique[counts > 1]
    seen: dict[str, str] = {}
    problems = []
    # Read the keys only of shards with a repeated hash.
    for shard, own in zip(shards, hashes, strict=True):
        if not np.isin(own, suspects).any():
            continue
        members = scan_tar(manifest.root / shard.path)
        for key in dict.fromkeys(split_member_name(member.name)[0] for member in members):
            first = seen.setdefault(key, shard.path)
            if first != shard.path:
                problems.append(f"key {key!r} occurs in {first} and {shard.path}")
    return problems
