"""Checks a dataset on disk, each level including the one before.

quick: sizes and counts of all files against the manifest. full: digests of tar, index and columns,
a walk over all tar headers, keys unique over all shards. decode: a share of the samples is decoded.
"""

import hashlib
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import numpy as np

from data_prep.curation.exclude import mask_problems
from data_prep.datasets import by_shard
from data_prep.inspection.measurements import metrics
from data_prep.sharding.shard_pool import map_shards
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

_CHUNK_BYTES = 1 << 20
# The metrics that decoding gives and the columns hold.
_COST_NAMES = tuple(field.name for field in fields(SampleCost))


@dataclass(frozen=True, slots=True)
class Report:
    """What was checked and every problem that was found, as sentences."""

    num_shards: int
    num_samples: int
    num_decoded: int
    problems: tuple[str, ...]


def verify(manifest: Manifest, full: bool, decode_percent: float, num_workers: int) -> Report:
    """Check all shards in parallel and collect their problems; nothing is repaired.

    Raises `ConfigError` for a percentage outside of 0 to 100.
    """
    if not 0 <= decode_percent <= 100:
        raise ConfigError(f"--decode {decode_percent:g} lies outside 0 to 100 percent")
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
    """Problems of a dataset of one shard, and how many of its samples were decoded."""
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
    """Record and the end of the index; reads one block of the tar."""
    record = load_record(path)
    if record is None:
        return [f"the record of {path} is missing"]
    if record != shard:
        return [f"the record of {path} differs from the manifest"]
    end = int(read_index(index_path(path))[-1])
    with path.open("rb") as file:
        file.seek(end)
        # An empty block ends a tar; an index may also count it in and end with the file.
        if file.read(BLOCK_BYTES).strip(b"\0"):
            return [f"{index_path(path)} ends at byte {end}, where {path} still goes on"]
    return []


def _check_bytes(path: Path, shard: ShardRecord) -> list[str]:
    files = {
        path: shard.sha256,
        index_path(path): shard.index_sha256,
        columns_path(path): shard.columns_sha256,
    }
    return [
        f"{file} has another SHA-256 than the manifest says; copy or make it again"
        for file, expected in files.items()
        if _sha256(file) != expected
    ]


def _check_headers(path: Path, shard: ShardRecord) -> list[str]:
    """A walk over all headers: samples must lie where the index, and be those that the columns say."""
    problems = []
    samples = group_samples(scan_tar(path), path)
    starts = index_offsets(samples)[:-1]
    if not np.array_equal(starts, read_index(index_path(path))[:-1]):
        problems.append(f"{index_path(path)} does not fit {path}; make it again")
    columns = load_columns(columns_path(path))
    keys = np.array([hash64(sample.key) for sample in samples], dtype=np.uint64)
    if not np.array_equal(columns["key_hash"], keys):
        problems.append(f"{columns_path(path)} holds other keys than {path}")
    if Totals.of_columns(columns) != shard.totals:
        problems.append(f"{columns_path(path)} adds up to other totals than the manifest says")
    return problems


def _decode(manifest: Manifest, split: str, percent: float) -> tuple[list[str], int]:
    """Decode a random but repeatable share of a shard's samples and compare their cost."""
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
            cost = metrics(sample, manifest.task)
        except DataError as error:
            problems.append(f"{where}: {error}")
            continue
        row = reader.columns[index]
        problems += [
            f"{where}: {name} is {getattr(cost, name)}, the columns say {row[name]}"
            for name in _COST_NAMES
            if getattr(cost, name) != row[name]
        ]
    return problems, len(chosen)


def _unlisted_tars(manifest: Manifest) -> list[str]:
    """Shards with samples that the manifest does not name: other tools would read them too."""
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
                f"{path} is not in the manifest; delete it, or run the command that made it again"
            )
    return problems


def _repeated_keys(manifest: Manifest) -> list[str]:
    """Keys that stand in more than one shard."""
    shards = [shard for split in manifest.splits.values() for shard in split.shards]
    hashes = [
        load_columns(columns_path(manifest.root / shard.path))["key_hash"] for shard in shards
    ]
    unique, counts = np.unique(np.concatenate(hashes), return_counts=True)
    suspects = unique[counts > 1]
    seen: dict[str, str] = {}
    problems = []
    # Only shards with a suspect are read again, for the keys themselves.
    for shard, own in zip(shards, hashes, strict=True):
        if not np.isin(own, suspects).any():
            continue
        members = scan_tar(manifest.root / shard.path)
        for key in dict.fromkeys(split_member_name(member.name)[0] for member in members):
            first = seen.setdefault(key, shard.path)
            if first != shard.path:
                problems.append(f"key {key!r} stands in {first} and in {shard.path}")
    return problems


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
