"""Groups of images whose file name occurs in several folders."""

from pathlib import Path

from data_prep.corpus import Cell, Item, image_group
from data_prep.sharding.same_names import separate_same_names
from muomni.data.text.turns import Part, Turn
from tests.data_prep.commands import shard
from tests.data_prep.corpus_files import write_file
from tests.data_prep.raw_corpora import image


def _item(key: str, path: str, group: str = "") -> Item:
    return Item(key, group or image_group(path), key, media=(path,))


def _groups(*items: Item) -> list[str]:
    return [item.group for item in separate_same_names(items, [Path("/src")])]


def test_frames_of_one_name_are_groups_of_their_own() -> None:
    first, second = _item("a", "/src/scene1/rgb.png"), _item("b", "/src/scene2/rgb.png")
    unique = _item("c", "/src/scene1/depth.png")
    groups = _groups(first, second, unique)
    assert groups == ["picture:scene1/rgb", "picture:scene2/rgb", "picture:depth"]  # terms: allow


def test_one_file_stays_one_group() -> None:
    items = [
        _item("a", "/src/x/1.jpg"),
        _item("b", "/src/./x/1.jpg"),
        _item("c", "/src/x/y/../1.jpg"),
    ]
    assert _groups(*items) == [image_group("1.jpg")] * 3


def test_groups_of_the_corpus_are_kept() -> None:
    items = [_item("a", "/src/1/rgb.png", "room"), _item("b", "/src/2/rgb.png", "room")]
    assert _groups(*items) == ["room", "room"]


def test_conversations_and_cells() -> None:
    turns = [
        (Turn("user", (Part("text", "What?"), Part("image", f"/other/{n}/rgb.png"))),)
        for n in (1, 2)
    ]
    chats = [Item(str(n), image_group("rgb.png"), "", turns=each) for n, each in enumerate(turns)]
    assert len(set(_groups(*chats))) == 2
    cells = [
        Item(str(n), image_group("0.png"), "", media=(Cell("t", 0, n, "image", file),))
        for n, file in enumerate(("a/0.png", "b/0.png", "b/0.png"))
    ]
    first, second, third = _groups(*cells)
    assert first != second == third


def test_renderings_are_divided_between_splits(tmp_path: Path) -> None:
    for number in range(40):
        write_file(tmp_path / f"in/scene{number}/rgb.png", image(number))
        write_file(tmp_path / f"in/scene{number}/rgb.txt", f"scene number {number}")
    options = ("--val-fraction", "0.3", "--test-fraction", "0.3")
    manifest = shard("image-caption", "folder", tmp_path / "in", tmp_path / "out", *options)
    assert all(manifest.split(split).num_samples > 4 for split in ("train", "val", "test"))
