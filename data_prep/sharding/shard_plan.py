"""Assign samples to shards: a pure function of the items and the options.

Items are assigned to splits by group, shuffled by seed, and cut into shards. Every process that lists the
same corpus gets the same plan, so no coordinator is needed.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from data_prep.corpus import Item, Media, TextSpan
from data_prep.options import Filters, Preprocessing
from muomni.data.shards.manifest import SCHEMA_VERSION, SPLIT_NAMES, Task, hash64
from muomni.data.shards.tar_index import BLOCK_BYTES, padded
from muomni.errors import ConfigError, DataError

# The media are accompanied by two members of about one block each: json and txt.
_SIDE_MEMBER_BYTES = 4 * BLOCK_BYTES
_NUM_SIZED_ITEMS = 256
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True, slots=True)
class ShardingOptions:
    """Everything that defines a dataset besides its items; the manifest records its digest."""

    name: str
    task: Task
    reader: str
    reader_options: dict[str, str]
    source: Path
    media_root: Path | None = None
    seed: int = 0
    val_fraction: float = 0.01
    test_fraction: float = 0.01
    split_from: str = "hash"
    shard_size: str = "256MB"
    max_bad_fraction: float = 0.01
    license: str = ""
    filters: Filters = field(default_factory=Filters)
    preprocessing: Preprocessing = field(default_factory=Preprocessing)

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", self.name):
            raise ConfigError(
                f"--name {self.name!r} must consist of 1 to 64 letters, digits, _, or -"
            )
        for option, value in (("val", self.val_fraction), ("test", self.test_fraction)):
            if not 0 <= value < 1:
                raise ConfigError(f"--{option}-fraction must be in [0, 1), got {value}")
        if self.val_fraction + self.test_fraction >= 1:
            raise ConfigError("--val-fraction and --test-fraction leave nothing to train on")
        if not 0 <= self.max_bad_fraction <= 1:
            raise ConfigError(f"--max-bad-fraction must be in [0, 1], got {self.max_bad_fraction}")
        parse_shard_size(self.shard_size)

    @property
    def split_rule(self) -> str:
        """How the split of a sample follows from its group, for the manifest."""
        by_hash = (
            "u = hash64(group) / 2^64; "
            f"test where u < {self.test_fraction}, val where u < "
            f"{round(self.test_fraction + self.val_fraction, 9)}, else train"
        )
        return f"declared by the source, else {by_hash}" if self.split_from == "source" else by_hash


@dataclass(frozen=True, slots=True)
class PlannedShard:
    """A planned shard: path relative to the dataset, split, and ordered items."""

    path: str
    split: str
    items: tuple[Item, ...]


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """All shards of a dataset; `digest` covers items and options."""

    options: ShardingOptions
    shards: tuple[PlannedShard, ...]
    digest: str

    @property
    def num_items(self) -> int:
        return sum(len(shard.items) for shard in self.shards)

    def without(self, keys: frozenset[str]) -> "ShardPlan":
        """The same shards and digest without the items of these keys."""
        if not keys:
            return self
        shards = tuple(
            replace(shard, items=tuple(item for item in shard.items if item.key not in keys))
            for shard in self.shards
        )
        return replace(self, shards=shards)


def split_of(group: str, val_fraction: float, test_fraction: float) -> str:
    """The split of a group by its hash, independent of the seed, the corpus, and other samples."""
    position = hash64(group) / 2**64
    if position < test_fraction:
        return "test"
    return "val" if position < test_fraction + val_fraction else "train"


def parse_shard_size(text: str) -> tuple[int, bool]:
    """Parse a shard size as (number, is_bytes): "5000" is samples, "256MB" is bytes.

    Raises `ConfigError` for anything else.
    """
    match = re.fullmatch(r"([1-9][0-9]{0,14})\s*([KMG]I?B)?", text.strip().upper())
    if not match:
        raise ConfigError(f"--shard-size {text!r} is not a number of samples or a size like 256MB")
    number, unit = int(match[1]), match[2]
    return (number * _UNITS[unit], True) if unit else (number, False)


def build_plan(items: Iterable[Item], options: ShardingOptions) -> ShardPlan:
    """Check keys, assign splits, shuffle by seed, and cut into shards.

    Raises `DataError` for an empty corpus or a duplicate key (naming both sources).
    """
    by_key: dict[str, Item] = {}
    for item in items:
        first = by_key.setdefault(item.key, item)
        if first is not item:
            raise DataError(
                f"key {item.key!r} occurs twice: {first.source} and {item.source}; "
                "rename or remove one"
            )
    if not by_key:
        raise DataError(f"{options.source} contains no sample for {options.task}; check --src")
    ordered = order_items(by_key.values(), options.seed)
    digest = _digest(ordered, options)
    declared = {item.declared_split for item in ordered if item.declared_split}
    return ShardPlan(options, split_into_shards(ordered, declared, options), digest)


def order_items(items: Iterable[Item], seed: int) -> list[Item]:
    """Items in shard order."""
    return sorted(items, key=lambda item: _order(item, seed))


def split_into_shards(
    ordered: list[Item], declared: set[str], options: ShardingOptions, infix: str = ""
) -> tuple[PlannedShard, ...]:
    """Shards `split/NAME-split-infixNNNNNN.tar` of each split.

    `declared` are the splits that the corpus declares.
    """
    splits: dict[str, list[Item]] = {name: [] for name in SPLIT_NAMES}
    for item in ordered:
        splits[_split(item, declared, options)].append(item)
    per_shard = _samples_per_shard(ordered, options)
    shards = []
    for split, members in splits.items():
        for number, start in enumerate(range(0, len(members), per_shard)):
            path = f"{split}/{options.name}-{split}-{infix}{number:06d}.tar"
            shards.append(PlannedShard(path, split, tuple(members[start : start + per_shard])))
    return tuple(shards)


def _order(item: Item, seed: int) -> tuple[int, str, int, str]:
    """Sort key: blocks in seeded order, then the items of a block; an item without block is its own block."""
    in_block = hash64(f"{seed}:{item.key}")
    position = hash64(f"{seed}:{item.block}") if item.block else in_block
    return position, item.block, in_block, item.key


def _split(item: Item, declared: set[str], options: ShardingOptions) -> str:
    """The split of an item; with `source`, splits that the corpus lacks are taken from train."""
    if options.split_from == "source" and item.declared_split:
        if item.declared_split != "train":
            return item.declared_split
        val = 0.0 if "val" in declared else options.val_fraction
        test = 0.0 if "test" in declared else options.test_fraction
        return split_of(item.group, val, test)
    return split_of(item.group, options.val_fraction, options.test_fraction)


def _samples_per_shard(ordered: list[Item], options: ShardingOptions) -> int:
    """Samples per shard; for a size in bytes, by the mean size of the first items."""
    number, is_bytes = parse_shard_size(options.shard_size)
    if not is_bytes:
        return number
    sized = ordered[:_NUM_SIZED_ITEMS]
    return max(1, int(number // (sum(_tar_bytes(item) for item in sized) / len(sized))))


def _tar_bytes(item: Item) -> int:
    """Estimated bytes in the tar; missing files count as zero."""
    if item.span is not None:
        return BLOCK_BYTES + padded(item.span.num_bytes)
    sizes = [_num_bytes(source) for source in item.inputs]
    text = sum(len(text) for text in item.texts)
    return _SIDE_MEMBER_BYTES + text + sum(BLOCK_BYTES + padded(size) for size in sizes)


def _num_bytes(source: Media | TextSpan) -> int:
    if not isinstance(source, str):
        return source.num_bytes
    return os.path.getsize(source) if os.path.isfile(source) else 0


def _digest(ordered: list[Item], options: ShardingOptions) -> str:
    """SHA-256 over options and items; paths are relative to the source, so data may be moved."""
    settings = asdict(options)
    for name in ("source", "media_root", "max_bad_fraction", "filters", "preprocessing"):
        del settings[name]
    # The digest stays that of earlier versions: their spelling, and no keys for unused options.
    settings["licence"] = settings.pop("license")  # codespell:ignore
    if filters := options.filters.as_text():
        settings["filters"] = filters
    if preprocessing := options.preprocessing.as_text():
        settings["preprocessing"] = preprocessing
    settings["schema_version"] = SCHEMA_VERSION
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    base = options.source if options.source.is_dir() else options.source.parent
    roots = [root for root in (base, options.media_root) if root is not None]
    prefixes = [repr(f"{root}{os.sep}")[1:-1] for root in roots]
    for item in ordered:
        text = repr(item)
        for prefix in prefixes:
            text = text.replace(prefix, "")
        digest.update(text.encode())
    return digest.hexdigest()
