"""Groups are in one split, no split is empty, and overlaps that a corpus declares are reported."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.cli.main import main
from data_prep.corpus import Item, Problem
from data_prep.sharding.shard_plan import ShardingOptions, build_plan
from data_prep.sharding.splits import assign_splits, split_of
from muomni.data.shards.manifest import SPLIT_NAMES, Manifest, hash64
from muomni.data.shards.reader import SplitReader
from muomni.errors import ConfigError, DataError
from tests.data_prep.commands import Capture

RANK: dict[str, int] = {"train": 0, "val": 1, "test": 2}
GROUPS = st.lists(st.integers(0, 40), min_size=1, max_size=60)


def options(**more: object) -> ShardingOptions:
    return ShardingOptions("n", "text", "txt", {}, Path(), **more)  # type: ignore[arg-type]


def items(groups: list[int], declared: list[str] | None = None) -> list[Item]:
    splits = declared or [None] * len(groups)
    return [
        Item(f"k{n}", f"group {group}", f"row {n}", split, texts=(f"text {n}",))
        for n, (group, split) in enumerate(zip(groups, splits, strict=True))
    ]


def split_of_groups(found: list[Item], **more: object) -> dict[str, str]:
    """The split of each group; fails if a group is in two."""
    assigned = assign_splits(found, options(**more))
    splits: dict[str, str] = {}
    for item, number in zip(assigned.items, assigned.splits.tolist(), strict=True):
        assert splits.setdefault(item.group, SPLIT_NAMES[number]) == SPLIT_NAMES[number]
    return splits


@given(GROUPS)
def test_default_fractions_fill_every_split(groups: list[int]) -> None:
    splits = split_of_groups(items(groups))
    in_train = sum(split_of(group, 0.01, 0.01) == "train" for group in splits)
    if in_train >= 3:
        assert set(splits.values()) == set(SPLIT_NAMES)
    for group, split in splits.items():
        if (by_hash := split_of(group, 0.01, 0.01)) != "train":
            # Only an empty split takes a group from another one.
            assert split == by_hash or list(splits.values()).count(split) == 1


@given(GROUPS, GROUPS, st.floats(0, 0.3), st.floats(0, 0.3))
def test_a_growing_corpus_moves_no_training_sample_to_a_held_out_split(
    groups: list[int], more: list[int], val: float, test: float
) -> None:
    fractions = {"val_fraction": val, "test_fraction": test}
    small = split_of_groups(items(groups), **fractions)
    large = split_of_groups(items(groups + more), **fractions)
    # With fewer groups than this, a split cannot be filled.
    in_train = sum(split_of(group, val, test) == "train" for group in small)
    if in_train >= 3:
        assert all(RANK[large[group]] <= RANK[split] for group, split in small.items())


def test_filling_takes_the_group_of_the_lowest_hash() -> None:
    splits = split_of_groups(items(list(range(20))))
    lowest = sorted(splits, key=hash64)[:2]
    assert {group: split for group, split in splits.items() if split != "train"} == {
        lowest[0]: "test",
        lowest[1]: "val",
    }


def test_bad_samples_do_not_fill_a_split() -> None:
    found = items(list(range(20)))
    lowest = min(found, key=lambda item: hash64(item.group))
    position = found.index(lowest)
    found[position] = Item(lowest.key, lowest.group, "row", problem=Problem("bad-record", "no"))
    splits = assign_splits(found, options()).splits
    valid = [number for at, number in enumerate(splits.tolist()) if at != position]
    assert np.bincount(valid).tolist() == [17, 1, 1]


def test_two_groups_fill_nothing_and_no_fraction_is_respected() -> None:
    assert set(split_of_groups(items([1, 1, 2])).values()) == {"train"}
    splits = split_of_groups(items(list(range(9))), val_fraction=0.0)
    assert set(splits.values()) == {"train", "test"}


def test_filled_splits_are_another_plan() -> None:
    """Shards of a version that did not fill them must not be continued."""
    found = items(list(range(9)))
    plain = build_plan(found, options(val_fraction=0.0, test_fraction=0.0))
    assert {shard.split for shard in plain.shards} == {"train"}
    filled = build_plan(found, options())
    assert {shard.split for shard in filled.shards} == set(SPLIT_NAMES)
    more = [Item("k", "y", "row", texts=("t",)), *found]
    assert build_plan(more, options()).digest != filled.digest


DECLARED = st.lists(
    st.tuples(st.integers(0, 6), st.sampled_from(SPLIT_NAMES)), min_size=1, max_size=30
)


@given(DECLARED)
def test_declared_overlap_is_dropped_or_moved(rows: list[tuple[int, str]]) -> None:
    groups, declared = [group for group, _ in rows], [split for _, split in rows]
    found = items(groups, declared)
    zero = {"split_from": "source", "val_fraction": 0.0, "test_fraction": 0.0}
    of_group = {group: {s for g, s in rows if g == group} for group in groups}

    moved = assign_splits(found, options(overlap="move", **zero))
    first = [min(RANK[split] for split in of_group[group]) for group in groups]
    assert moved.splits.tolist() == first
    assert moved.num_moved == sum(RANK[d] != f for d, f in zip(declared, first, strict=True))

    dropped = assign_splits(found, options(overlap="drop", **zero))
    for item, (group, split) in zip(dropped.items, rows, strict=True):
        is_kept = RANK[split] == max(RANK[other] for other in of_group[group])
        assert (item.problem is None) == is_kept

    allowed = assign_splits(found, options(overlap="allow", **zero))
    assert [SPLIT_NAMES[number] for number in allowed.splits] == declared
    if any(len(splits) > 1 for splits in of_group.values()):
        assert allowed.overlap == "allow"
        with pytest.raises(DataError, match="--overlap drop"):
            assign_splits(found, options(**zero))
    else:
        assert assign_splits(found, options(**zero)).overlap == allowed.overlap == ""


def test_bad_rows_of_one_group_do_not_overlap() -> None:
    bad = Problem("bad-record", "the row has 3 fields, the header 4")
    found = [
        Item(f"k{n}", "speech:", f"row {n}", split, problem=bad)
        for n, split in enumerate(("train", "test"))
    ]
    assert assign_splits([*found, *items([1, 2], ["train", "test"])], options(split_from="source"))


def test_overlap_needs_declared_splits() -> None:
    with pytest.raises(ConfigError, match="--overlap drop needs --split-from source"):
        options(overlap="drop")


def test_a_large_group_is_a_warning() -> None:
    ten = list(range(1, 11))
    fractions = options(val_fraction=0.4, test_fraction=0.3)
    (note,) = build_plan(items([0, 0, 0, *ten]), fractions).notes
    assert "'group 0' has 3 of 13 samples (23%)" in note and "--group" in note
    assert build_plan(items([0, *ten]), fractions).notes == ()
    assert build_plan(items([0, 0, *ten, *range(11, 30)]), fractions).notes == ()


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Documents of three authors, one of whom is in train and test."""
    rows = [
        {"id": f"{author}{n}", "text": f"{author} writes {n}", "group": author, "split": split}
        for author, splits in (("a", "train"), ("b", "test"), ("c", "train test"), ("d", "val"))
        for split in splits.split()
        for n in range(3 if split == "train" else 2)
    ]
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def shard(table: Path, *more: str) -> Path:
    out = table.parent / "out"
    main(
        [
            *("text", "--format", "jsonl", "--src", str(table), "--out", str(out)),
            *("--split-from", "source", "--workers", "1", *more),
        ]
    )
    return out


def keys(out: Path) -> dict[str, list[str]]:
    manifest = Manifest.load(out)
    readers = {split: SplitReader(manifest, split) for split in manifest.splits}
    return {
        split: sorted(str(reader.read(index)["__key__"]) for index in range(len(reader)))
        for split, reader in readers.items()
    }


def test_overlap_is_refused_with_its_remedies(table: Path, capsys: Capture) -> None:
    with pytest.raises(SystemExit) as stop:
        shard(table)
    assert stop.value.code == 3
    error = capsys.readouterr().err
    assert (
        "1 group is in several splits, with 3 of 6 samples of train, 2 of 4 samples of test"
        in error
    )
    assert "the first is 'c' ('t.jsonl row 6' in train, 't.jsonl row 9' in test)" in error
    assert all(f"--overlap {name}" in error for name in ("drop", "move", "allow"))
    assert not (table.parent / "out").exists()


def test_overlap_is_dropped_moved_or_allowed(table: Path, capsys: Capture) -> None:
    out = shard(table, "--overlap", "drop")
    assert keys(out) == {
        "train": ["a0", "a1", "a2"],
        "val": ["d0", "d1"],
        "test": ["b0", "b1", "c0-2", "c1-2"],
    }
    assert Manifest.load(out).dropped == {"split-overlap": 3}
    listed = [json.loads(line) for path in (out / "filtered").iterdir() for line in path.open()]
    assert {entry["message"] for entry in listed} == {"its group is also in test, which keeps it"}
    assert "filtered: split-overlap 3" in capsys.readouterr().out

    out = shard(table, "--overlap", "move", "--overwrite")
    assert keys(out)["test"] == ["b0", "b1"] and len(keys(out)["train"]) == 8
    assert Manifest.load(out).changed == {"key-renamed": 2, "split-moved": 2}
    assert "changed: key-renamed 2, split-moved 2" in capsys.readouterr().out

    out = shard(table, "--overlap", "allow", "--overwrite")
    assert {name: len(found) for name, found in keys(out).items()} == {
        "train": 6,
        "val": 2,
        "test": 4,
    }
    assert Manifest.load(out).overlap == {"test": 2}
    assert "groups also in train: test 2 samples" in capsys.readouterr().out
    assert "the groups of 2 samples of test are also in train" in (out / "README.md").read_text()


def test_retried_samples_stay_with_their_group(table: Path, capsys: Capture) -> None:
    rows = table.read_text().splitlines()
    broken = [row if '"a1"' not in row else row.replace('"a writes 1"', '""') for row in rows]
    table.write_text("\n".join(broken))
    out = shard(table, "--overlap", "move", "--max-bad-fraction", "0.5")
    # Now its author is that of a group in val.
    table.write_text("\n".join(rows).replace('"id": "a1", "text": "a writes 1", "group": "a"',
                                             '"id": "a1", "text": "d writes 7", "group": "d"'))  # fmt: skip
    main(["retry-bad", str(out), "--workers", "1"])
    assert keys(out)["val"] == ["a1", "d0", "d1"]


def test_empty_and_tiny_splits_are_warnings(tmp_path: Path, capsys: Capture) -> None:
    src = tmp_path / "t.txt"
    command = ["text", "--format", "txt", "--src", str(src), "--workers", "1", "--overwrite"]
    src.write_text("one\ntwo\ntwo\n")
    main([*command, "--out", str(tmp_path / "two")])
    out = capsys.readouterr().out
    assert "warning: val is empty; raise --val-fraction 0.01, or add data with other groups" in out
    assert "warning: test is empty" in out
    assert "warning: 1 of 3 samples repeat another one, byte for byte" in out
    assert "dedup" in out

    src.write_text("".join(f"line {n}\n" for n in range(26)))
    main([*command, "--out", str(tmp_path / "some")])
    warning = "warning: val gets a single group, since --val-fraction 0.01 of 26 groups gave none"
    # Before the work starts, and below the table.
    assert capsys.readouterr().out.count(warning) == 2
    assert {name: len(each) for name, each in Manifest.load(tmp_path / "some").splits.items()} == {
        "train": 24,
        "val": 1,
        "test": 1,
    }

    main([*command, "--out", str(tmp_path / "none"), "--val-fraction", "0", "--test-fraction", "0"])
    assert "warning" not in capsys.readouterr().out
