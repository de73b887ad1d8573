"""The split of each sample: by the hash of its group, or as the corpus declares it.

The hash makes splits independent of seed, corpus, and other samples, with one exception: a split that would be
empty gets the group with the lowest hash that no split after it has. As a corpus grows, such a group can move
from `test` to `val` and from there to `train`, but no group moves from `train` to another split.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from data_prep.corpus import Item, Problem
from data_prep.options import SPLIT_OVERLAP
from data_prep.values import shown
from muomni.data.shards.manifest import SPLIT_NAMES, hash64
from muomni.errors import DataError

if TYPE_CHECKING:
    from data_prep.sharding.shard_plan import ShardingOptions

# What `changed` of a manifest counts.
SPLIT_MOVED = "split-moved"
_TRAIN, _VAL, _TEST = range(len(SPLIT_NAMES))
_MAX_GROUP_FRACTION = 0.1


@dataclass(frozen=True, slots=True)
class Assignment:
    """Items with the number of the split of each in `SPLIT_NAMES`, int8 [num_items].

    `filled` are splits that would have been empty. `overlap` is how groups in several splits were treated, if
    there are any, which moved `num_moved` samples. `notes` are warnings.
    """

    items: list[Item]
    splits: np.ndarray
    filled: tuple[str, ...] = ()
    overlap: str = ""
    num_moved: int = 0
    notes: tuple[str, ...] = ()


def assign_splits(items: list[Item], options: "ShardingOptions") -> Assignment:
    """Assign all items of a corpus to splits.

    Raises `DataError` if the corpus declares several splits for the same group and `options.overlap` is
    "refuse".
    """
    hashes = np.fromiter((hash64(item.group) for item in items), np.uint64, len(items))
    is_good = np.fromiter((item.problem is None for item in items), bool, len(items))
    splits, is_declared, wanted = _first_splits(items, hashes, options)
    filled = _fill(splits, hashes, is_good, is_declared, wanted)
    num_groups = len(np.unique(hashes[is_good]))
    notes = tuple(_filled_note(name, options, num_groups) for name in filled)
    if wanted:
        notes += _large_group(items, hashes, is_good)
    assigned = Assignment(items, splits, filled, notes=notes)
    if options.split_from == "hash":
        return assigned
    return _resolve_overlap(assigned, hashes, is_good, options.overlap)


def split_of(group: str, val_fraction: float, test_fraction: float) -> str:
    """The split of a group by its hash, independent of the seed, the corpus, and other samples."""
    position = np.array([hash64(group) / 2**64])
    return SPLIT_NAMES[int(_by_hash(position, val_fraction, test_fraction)[0])]


def _by_hash(positions: np.ndarray, val_fraction: float, test_fraction: float) -> np.ndarray:
    """Numbers of splits for hashes divided by 2^64."""
    is_held_out = positions < test_fraction + val_fraction
    held_out = np.where(positions < test_fraction, _TEST, _VAL)
    return np.where(is_held_out, held_out, _TRAIN).astype(np.int8)


def _first_splits(
    items: list[Item], hashes: np.ndarray, options: "ShardingOptions"
) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """The splits, which items are declared as val or test, and the splits that must not be empty.

    Splits that the corpus does not declare are taken from its train split.
    """
    positions = hashes / 2**64
    val, test = options.val_fraction, options.test_fraction
    splits = _by_hash(positions, val, test)
    is_declared = np.zeros(len(items), bool)
    if options.split_from == "source":
        numbers = {name: number for number, name in enumerate(SPLIT_NAMES)}
        declared = np.fromiter(
            (numbers.get(item.declared_split or "", -1) for item in items), np.int8, len(items)
        )
        val = 0.0 if _VAL in declared else val
        test = 0.0 if _TEST in declared else test
        splits = np.where(declared == _TRAIN, _by_hash(positions, val, test), splits)
        is_declared = declared > _TRAIN
        splits[is_declared] = declared[is_declared]
    fractions = ((_TEST, test), (_VAL, val))
    return splits, is_declared, [number for number, fraction in fractions if fraction > 0]


def _fill(
    splits: np.ndarray,
    hashes: np.ndarray,
    is_good: np.ndarray,
    is_declared: np.ndarray,
    wanted: list[int],
) -> tuple[str, ...]:
    """Move a group to each wanted split without valid samples, in place; train keeps at least one.

    Nothing is moved if there are fewer groups than splits.
    """
    filled: list[str] = []
    if all((splits[is_good] == number).any() for number in wanted):
        return ()
    is_free = is_good & ~is_declared & ~np.isin(hashes, hashes[is_declared])
    if len(np.unique(hashes[is_free])) <= len(wanted):
        return ()
    for number in wanted:
        if (splits[is_good] == number).any():
            continue
        lowest = hashes[is_free & (splits < number)].min(initial=np.iinfo(np.uint64).max)
        chosen = (hashes == lowest) & is_free
        if (is_free & ~chosen & (splits == _TRAIN)).any():
            splits[chosen] = number
            filled.append(SPLIT_NAMES[number])
    return tuple(filled)


def _resolve_overlap(
    assigned: Assignment, hashes: np.ndarray, is_good: np.ndarray, overlap: str
) -> Assignment:
    """Treat the groups that are in several splits by `overlap`; raises `DataError` for "refuse"."""
    items, splits = assigned.items, assigned.splits
    groups, group_of = np.unique(hashes, return_inverse=True)
    # Bit n: the group is in split n.
    found = np.zeros(len(groups), np.int8)
    np.bitwise_or.at(found, group_of[is_good], np.int8(1) << splits[is_good])
    is_shared = is_good & (found & (found - 1) > 0)[group_of]
    if not is_shared.any():
        return assigned
    if overlap == "refuse":
        raise DataError(_overlap_message(items, splits, hashes, is_shared))
    if overlap == "allow":
        return replace(assigned, overlap=overlap)
    # The first or the last split of each group.
    order = range(len(SPLIT_NAMES)) if overlap == "drop" else reversed(range(len(SPLIT_NAMES)))
    target = np.zeros(len(groups), np.int8)
    for number in order:
        target[found & (1 << number) > 0] = number
    leaves = is_shared & (splits != target[group_of])
    if overlap == "move":
        splits = np.where(leaves, target[group_of], splits)
        return replace(assigned, splits=splits, overlap=overlap, num_moved=int(leaves.sum()))
    items = list(items)
    for position in np.flatnonzero(leaves).tolist():
        kept_in = SPLIT_NAMES[target[group_of[position]]]
        items[position] = replace(items[position], problem=overlap_problem(kept_in))
    return replace(assigned, items=items, overlap=overlap)


def overlap_problem(kept_in: str) -> Problem:
    """Why `--overlap drop` drops a sample."""
    return Problem(SPLIT_OVERLAP, f"its group is also in {kept_in}, which keeps it")


def _overlap_message(
    items: list[Item], splits: np.ndarray, hashes: np.ndarray, is_shared: np.ndarray
) -> str:
    shares = [
        f"{int((is_shared & (splits == number)).sum())} of {int((splits == number).sum())} samples of {name}"
        for number, name in enumerate(SPLIT_NAMES)
        if (is_shared & (splits == number)).any()
    ]
    first = int(np.flatnonzero(is_shared)[0])
    other = int(np.flatnonzero((hashes == hashes[first]) & (splits != splits[first]))[0])
    places = [
        f"{shown(items[each].source)} in {SPLIT_NAMES[splits[each]]}" for each in (first, other)
    ]
    num_groups = len(np.unique(hashes[is_shared]))
    return (
        f"--split-from source: {num_groups} group{'s' if num_groups > 1 else ''} "
        f"{'are' if num_groups > 1 else 'is'} in several splits, with {', '.join(shares)}; the first is "
        f"{shown(items[first].group)} ({', '.join(places)}). Add --overlap drop (held-out samples stay, the "
        "others are dropped), --overlap move (to train, else val), or --overlap allow (as declared; evaluation "
        "reports it)"
    )


def _filled_note(name: str, options: "ShardingOptions", num_groups: int) -> str:
    fraction = options.val_fraction if name == "val" else options.test_fraction
    return (
        f"{name} gets a single group, since --{name}-fraction {fraction:g} of {num_groups:,} groups gave none; "
        "raise it for more"
    )


def _large_group(items: list[Item], hashes: np.ndarray, is_good: np.ndarray) -> tuple[str, ...]:
    """A warning if the largest group has more than a tenth of the samples."""
    groups, counts = np.unique(hashes[is_good], return_counts=True)
    largest = int(counts.max(initial=0))
    if largest < 2 or largest <= _MAX_GROUP_FRACTION * int(is_good.sum()):
        return ()
    first = int(np.flatnonzero(is_good & (hashes == groups[counts.argmax()]))[0])
    total = int(is_good.sum())
    return (
        f"the group {shown(items[first].group)} has {largest:,} of {total:,} samples ({largest / total:.0%}), "
        "which all go to one split; if they are not related, give them other groups (--group, or a column "
        "or field 'group')",
    )
