"""Keys are unique, captions of an image are one sample, and long messages are cut."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.cli.main import main
from data_prep.corpus import MAX_KEY_LENGTH, Item, Problem
from data_prep.sharding.listings import printable
from data_prep.sharding.samples import collect, join_captions, unique_keys
from muomni.data.shards.manifest import Manifest
from muomni.data.shards.reader import SplitReader
from tests.data_prep.commands import Capture, fails
from tests.data_prep.raw_corpora import image

KEYS = st.lists(st.sampled_from(["a", "a-2", "a-2-2", "a-3", "b", "x" * 90, "x" * 88 + "-2"]))


def named(keys: list[str]) -> list[Item]:
    return [Item(key, "group", f"row {n}") for n, key in enumerate(keys)]


@given(KEYS)
def test_keys_become_unique(keys: list[str]) -> None:
    items, renamed = unique_keys(named(keys))
    unique = [item.key for item in items]
    assert len(set(unique)) == len(keys)
    assert all(0 < len(key) <= MAX_KEY_LENGTH for key in unique)
    assert [item.source for item in items] == [f"row {n}" for n in range(len(keys))]
    # The first item of each key keeps it, and only the others have new ones.
    for key in set(keys):
        assert unique[keys.index(key)] == key
    assert renamed == set(unique) - set(keys) and len(renamed) == len(keys) - len(set(keys))


def test_repeated_keys_are_numbered_in_the_order_of_the_corpus() -> None:
    items, _ = unique_keys(named(["7", "7", "8", "7", "7-3"]))
    assert [item.key for item in items] == ["7", "7-2", "8", "7-4", "7-3"]


def caption(path: str, text: str, **more: object) -> Item:
    return Item("k", path, text, texts=(text,), media=(path,), **more)  # type: ignore[arg-type]


def test_adjacent_captions_of_an_image_are_joined() -> None:
    rows = [caption("a.png", "one"), caption("a.png", "two"), caption("b.png", "three")]
    bad = Item("k", "a.png", "row", media=("a.png",), problem=Problem("empty-text", "empty"))
    again = caption("a.png", "four")
    joined = [item for item in join_captions([rows[0], bad, *rows[1:], again]) if not item.problem]
    assert [item.texts for item in joined] == [("one", "two"), ("three",), ("four",)]
    others = [
        caption("a.png", "y", metadata={"type": "t"}),
        caption("a.png", "x", declared_split="test"),
    ]
    assert list(join_captions([rows[0], *others])) == [rows[0], *others]


def test_only_captions_are_joined() -> None:
    rows = [caption("a.wav", "one"), caption("a.wav", "two")]
    assert len(collect(rows, "speech")[0]) == 2
    samples, changed = collect(rows, "image-caption")
    assert (len(samples), changed) == (1, {"caption-joined": 1})


@pytest.mark.parametrize("has_ids", [True, False])
def test_rows_of_an_image_are_one_sample(tmp_path: Path, has_ids: bool) -> None:
    rows = ["id,image,caption" if has_ids else "image,caption"]
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(image(number))
        start = f"{number}," if has_ids else ""
        rows += [f"{start}{number}.png,{text} {number}" for text in ("some", "a", "any")]
    (tmp_path / "t.csv").write_text("\n".join(rows) + "\n")
    manifest = shard("image-caption", "csv", tmp_path / "t.csv")
    samples = read(manifest)
    captions = sorted(json.loads(sample["json"])["captions"] for sample in samples)
    assert captions == [
        [f"{text} {number}" for text in ("some", "a", "any")] for number in range(3)
    ]
    assert manifest.changed == {"caption-joined": 6}
    keys = {sample["__key__"] for sample in samples}
    assert keys == ({"0", "1", "2"} if has_ids else {"t-00000001", "t-00000004", "t-00000007"})


def test_conversations_about_one_image_keep_its_id(tmp_path: Path) -> None:
    (tmp_path / "p.png").write_bytes(image(1))
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "That."}]
    records = [{"id": "7", "image": "p.png", "conversations": turns}] * 3
    (tmp_path / "c.json").write_text(json.dumps(records))
    manifest = shard("sft", "llava", tmp_path / "c.json")
    assert {sample["__key__"] for sample in read(manifest)} == {"7", "7-2", "7-3"}
    groups = SplitReader(manifest, "train").columns["group_hash"]
    assert len(set(groups.tolist())) == 1
    main(["verify", "--full", "--decode", "100", "--workers", "1", str(manifest.root)])


def shard(task: str, format: str, src: Path) -> Manifest:
    out = src.parent / "out"
    command = [task, "--format", format, "--src", str(src), "--out", str(out), "--workers", "1"]
    main([*command, "--val-fraction", "0", "--test-fraction", "0"])
    return Manifest.load(out)


def read(manifest: Manifest) -> list[dict[str, bytes | str]]:
    reader = SplitReader(manifest, "train")
    return [reader.read(index) for index in range(len(reader))]


def test_dropped_turns_are_counted(tmp_path: Path, capsys: Capture) -> None:
    answered = [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "One."}]
    rows = [answered, [*answered, {"role": "user", "content": "More?"}]]
    src = tmp_path / "chats.jsonl"
    src.write_text("".join(json.dumps({"messages": turns}) + "\n" for turns in rows))
    main(
        [
            "sft",
            "--format",
            "jsonl",
            "--src",
            str(src),
            "--out",
            str(tmp_path / "out"),
            "--workers",
            "1",
        ]
    )
    assert Manifest.load(tmp_path / "out").changed == {"turns-dropped": 1}
    assert "changed: turns-dropped 1" in capsys.readouterr().out


def test_a_renamed_sample_is_retried_under_its_name(tmp_path: Path) -> None:
    def write(second: str) -> None:
        rows = [{"id": "same", "text": text} for text in ("first", second, "third")]
        (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    write("")
    out = tmp_path / "out"
    command = ["text", "--format", "jsonl", "--src", str(tmp_path / "t.jsonl"), "--out", str(out)]
    main(
        [
            *command,
            "--workers",
            "1",
            "--max-bad-fraction",
            "0.5",
            "--test-fraction",
            "0",
            "--val-fraction",
            "0",
        ]
    )
    write("second")
    main(["retry-bad", str(out), "--workers", "1"])
    found = {str(sample["__key__"]): sample["txt"] for sample in read(Manifest.load(out))}
    assert found == {"same": b"first", "same-2": b"second", "same-3": b"third"}


def test_listed_messages_are_cut() -> None:
    assert printable("short") == "short"
    assert len(printable("x" * 160_000)) == 400
    assert printable("x" * 160_000 + " row 7").endswith("x row 7")
    assert len(printable("\udcff" * 160_000)) == 400


def test_long_errors_keep_their_start_and_end(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "t.csv").write_text(
        ",".join(f"column{n}" for n in range(9_000)) + "\n" + "," * 8_999 + "\n"
    )
    command = ["text", "--format", "csv", "--src", str(tmp_path / "t.csv")]
    error = fails(capsys, *command, "--out", str(tmp_path / "out"))
    assert len(error) < 1200
    assert "has no column 'text' (it has column0, column1" in error
    assert "map one with --columns text=NAME" in error
