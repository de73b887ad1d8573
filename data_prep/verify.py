"""Checks a dataset on disk, each level including the one before.

quick: sizes and counts of all files against the manifest. full: digests of tar, index and columns,
a walk over all tar headers, keys unique over all shards. decode: a share of the samples is decoded.
"""

import hashlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from data_prep.exclude import mask_problems
from data_prep.sample_figures import figures
from data_prep.shard_pool import map_shards
from muomni.data.manifest import Manifest, ShardRecord, Totals, hash64
from muomni.data.shard_reader import SplitReader, check_shard
from muomni.data.shard_writer import columns_path, load_record
from muomni.data.tar_index import (
    group_samples,
    index_offsets,
    index_path,
    read_index,
    scan_tar,
    split_member_name,
)
from muomni.errors import DataError

_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Report:
    """What was checked and every problem that was found, as sentences."""

    num_shards: int
    num_samples: int
    num_decoded: int
    problems: tuple[str, ...]


def verify(manifest: Manifest, full: bool, decode_percent: float, num_workers: int) -> Report:
    """Check all shards in parallel and collect their problems; nothing is repaired."""
    shards = [(name, shard) for name, split in manifest.splits.items() for shard in split.shards]
    check = partial(_check, manifest, full, decode_percent)
    results = map_shards(check, shards, num_workers)
    problems = [problem for found, _ in results for problem in found]
    problems += mask_problems(manifest)
    if full and not problems:
        problems += _repeated_keys(manifest)
    return Report(
        num_shards=len(shards),
        num_samples=sum(shard.num_samples for _, shard in shards),
        num_decoded=sum(num_decoded for _, num_decoded in results),
        problems=tuple(problems),
    )


def _check(
    manifest: Manifest, full: bool, decode_percent: float, entry: tuple[str, ShardRecord]
) -> tuple[list[str], int]:
    """Problems of one shard, and how many of its samples were decoded."""
    split, shard = entry
    try:
        check_shard(manifest, shard)
        record = load_record(manifest.root / shard.path)
        if record is None:
            return [f"the record of {manifest.root / shard.path} is missing"], 0
        if record != shard:
            return [f"the record of {manifest.root / shard.path} differs from the manifest"], 0
        problems = _check_fully(manifest.root / shard.path, shard) if full else []
        if problems or not decode_percent:
            return problems, 0
        return _decode(manifest, split, shard, decode_percent)
    except DataError as error:
        return [str(error)], 0


def _check_fully(path: Path, shard: ShardRecord) -> list[str]:
    files = {
        path: shard.sha256,
        index_path(path): shard.index_sha256,
        columns_path(path): shard.columns_sha256,
    }
    problems = [
        f"{file} has another SHA-256 than the manifest says; copy or make it again"
        for file, expected in files.items()
        if _sha256(file) != expected
    ]
    samples = group_samples(scan_tar(path), path)
    if not np.array_equal(index_offsets(samples), read_index(index_path(path))):
        problems.append(f"{index_path(path)} does not fit {path}; make it again")
    columns = np.load(columns_path(path))
    keys = np.array([hash64(sample.key) for sample in samples], dtype=np.uint64)
    if not np.array_equal(columns["key_hash"], keys):
        problems.append(f"{columns_path(path)} holds other keys than {path}")
    if Totals.of_columns(columns) != shard.totals:
        problems.append(f"{columns_path(path)} adds up to other totals than the manifest says")
    return problems


def _decode(
    manifest: Manifest, split: str, shard: ShardRecord, percent: float
) -> tuple[list[str], int]:
    """Decode a random but repeatable share of a shard's samples and compare their cost."""
    shards = manifest.split(split).shards
    reader = SplitReader(manifest, split)
    first = sum(other.num_samples for other in shards[: shards.index(shard)])
    problems = []
    num_decoded = 0
    for index in range(first, first + shard.num_samples):
        row = reader.columns[index]
        if int(row["key_hash"]) / 2**64 * 100 >= percent:
            continue
        num_decoded += 1
        sample = reader.read(index)
        where = f"{manifest.root / shard.path} sample {sample['__key__']!r}"
        try:
            cost = figures(sample, manifest.task)
        except DataError as error:
            problems.append(f"{where}: {error}")
            continue
        names = ("duration_ms", "num_chars", "num_pixels", "num_images", "num_audios")
        problems += [
            f"{where}: {name} is {getattr(cost, name)}, the columns say {row[name]}"
            for name in names
            if getattr(cost, name) != row[name]
        ]
    return problems, num_decoded


def _repeated_keys(manifest: Manifest) -> list[str]:
    """Keys that stand in more than one shard."""
    seen: dict[str, str] = {}
    problems = []
    for split in manifest.splits.values():
        for shard in split.shards:
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
