"""Assign samples to shards: a pure function of the items and the options.

Items get unique keys (`samples`) and splits (`splits`), are shuffled by seed, and cut into shards. Every
process that lists the same corpus gets the same plan, so no coordinator is needed.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np

from data_prep.corpus import Item, Media, TextSpan
from data_prep.options import OVERLAPS, Filters, Preprocessing
from data_prep.sharding.same_names import separate_same_names
from data_prep.sharding.samples import collect
from data_prep.sharding.splits import SPLIT_MOVED, Assignment, assign_splits
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
    overlap: str = "refuse"
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
        if self.overlap not in OVERLAPS:
            raise ConfigError(
                f"--overlap must be one of {', '.join(OVERLAPS)}, got {self.overlap!r}"
            )
        if self.overlap != "refuse" and self.split_from != "source":
            raise ConfigError(
                f"--overlap {self.overlap} needs --split-from source; splits by hash do not overlap"
            )
        if not 0 <= self.max_bad_fraction <= 1:
            raise ConfigError(f"--max-bad-fraction must be in [0, 1], got {self.max_bad_fraction}")
        parse_shard_size(self.shard_size)

    @property
    def roots(self) -> list[Path]:
        """The folders that paths of items are relative to."""
        base = self.source if self.source.is_dir() else self.source.parent
        return [base] if self.media_root is None else [base, self.media_root]

    @property
    def split_rule(self) -> str:
        """How the split of a sample follows from its group, for the manifest."""
        by_hash = (
            "u = hash64(group) / 2^64; "
            f"test where u < {self.test_fraction}, val where u < "
            f"{round(self.test_fraction + self.val_fraction, 9)}, else train; "
            "an empty split gets the group of the lowest u"
        )
        if self.split_from == "hash":
            return by_hash
        overlap = "" if self.overlap == "refuse" else f"; groups in several splits: {self.overlap}"
        return f"declared by the source, else {by_hash}{overlap}"


@dataclass(frozen=True, slots=True)
class PlannedShard:
    """A planned shard: path relative to the dataset, split, and ordered items."""

    path: str
    split: str
    items: tuple[Item, ...]


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """All shards of a dataset; `digest` covers items and options.

    `changed` counts samples that were changed, by reason, and `notes` are warnings. `overlap` is how groups in
    several splits were treated, if there are any.
    """

    options: ShardingOptions
    shards: tuple[PlannedShard, ...]
    digest: str
    changed: dict[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    overlap: str = ""

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
    """Make keys unique, assign splits, shuffle by seed, and cut into shards.

    Raises `DataError` for an empty corpus, and as `assign_splits` does.
    """
    samples, changed = collect(separate_same_names(items, options.roots), options.task)
    if not samples:
        raise DataError(f"{options.source} contains no sample for {options.task}; check --src")
    assigned = assign_splits(samples, options)
    if assigned.num_moved:
        changed[SPLIT_MOVED] = assigned.num_moved
    order = sorted(range(len(samples)), key=lambda each: _order(samples[each], options.seed))
    ordered = [assigned.items[each] for each in order]
    return ShardPlan(
        options,
        split_into_shards(ordered, assigned.splits[order], options),
        _digest(ordered, options, assigned),
        changed,
        assigned.notes,
        assigned.overlap,
    )


def order_items(items: Iterable[Item], seed: int) -> list[Item]:
    """Items in shard order."""
    return sorted(items, key=lambda item: _order(item, seed))


def split_into_shards(
    ordered: list[Item], splits: np.ndarray, options: ShardingOptions, infix: str = ""
) -> tuple[PlannedShard, ...]:
    """Shards `split/NAME-split-infixNNNNNN.tar` of each split.

    `splits` are the numbers of the items' splits in `SPLIT_NAMES`.
    """
    per_shard = _samples_per_shard(ordered, options)
    shards = []
    for split_number, split in enumerate(SPLIT_NAMES):
        members = [ordered[each] for each in np.flatnonzero(splits == split_number).tolist()]
        for number, start in enumerate(range(0, len(members), per_shard)):
            path = f"{split}/{options.name}-{split}-{infix}{number:06d}.tar"
            shards.append(PlannedShard(path, split, tuple(members[start : start + per_shard])))
    return tuple(shards)


def _order(item: Item, seed: int) -> tuple[int, str, int, str]:
    """Sort key: blocks in seeded order, then the items of a block; an item without block is its own block."""
    in_block = hash64(f"{seed}:{item.key}")
    position = hash64(f"{seed}:{item.block}") if item.block else in_block
    return position, item.block, in_block, item.key


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


def _digest(ordered: list[Item], options: ShardingOptions, assigned: Assignment) -> str:
    """SHA-256 over options and items; paths are relative to the source, so data may be moved."""
    settings = asdict(options)
    unused = ("source", "media_root", "max_bad_fraction", "filters", "preprocessing", "overlap")
    for name in unused:
        del settings[name]
    # The digest stays that of earlier versions: their spelling, and no keys for unused options.
    settings["licence"] = settings.pop("license")  # codespell:ignore
    if filters := options.filters.as_text():
        settings["filters"] = filters
    if preprocessing := options.preprocessing.as_text():
        settings["preprocessing"] = preprocessing
    if assigned.filled:
        settings["filled"] = assigned.filled
    if assigned.overlap:
        settings["overlap"] = assigned.overlap
    settings["schema_version"] = SCHEMA_VERSION
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    prefixes = [repr(f"{root}{os.sep}")[1:-1] for root in options.roots]
    for item in ordered:
        text = repr(item)
        for prefix in prefixes:
            text = text.replace(prefix, "")
        digest.update(text.encode())
    return digest.hexdigest()
