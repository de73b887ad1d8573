"""COCO files as other tools write them, and Karpathy's files."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from data_prep.corpus import Item
from data_prep.options import ReaderOptions
from data_prep.readers.coco import read_coco
from muomni.errors import DataError
from tests.data_prep.corpus_files import write_file
from tests.data_prep.raw_corpora import image

OPTIONS = ReaderOptions()
IMAGES = [{"id": n, "file_name": f"p{n}.png"} for n in (1, 2)]
CAPTIONS = [{"id": 7 * n, "image_id": n, "caption": f"view {n}"} for n in (1, 2)]


def _write(root: Path, content: object, name: str = "captions_train.json") -> Path:
    for number in (1, 2):
        write_file(root / f"train/p{number}.png", image(number))
    write_file(root / "annotations" / name, json.dumps(content))
    return root


def _texts(items: list[Item]) -> dict[str, tuple[str, ...]]:
    return {item.key: item.texts for item in items}


def _problems(items: list[Item]) -> list[str]:
    return [item.problem.message for item in items if item.problem]


@pytest.mark.parametrize("of_image", [int, str, float])
@pytest.mark.parametrize("of_caption", [int, str, float])
def test_ids_of_any_type(tmp_path: Path, of_image: Callable, of_caption: Callable) -> None:
    images = [{**each, "id": of_image(each["id"])} for each in IMAGES]
    captions = [{**each, "image_id": of_caption(each["image_id"])} for each in CAPTIONS]
    items = list(read_coco(_write(tmp_path, {"images": images, "annotations": captions}), OPTIONS))
    assert _texts(items) == {"p1": ("view 1",), "p2": ("view 2",)}
    assert [item.metadata["image_id"] for item in items] == ["1", "2"]
    assert items[0].media == (str(tmp_path / "train/p1.png"),)


def test_an_image_that_is_listed_twice(tmp_path: Path) -> None:
    images = [*IMAGES, IMAGES[0], {"id": 2, "file_name": "other.png"}]
    items = list(read_coco(_write(tmp_path, {"images": images, "annotations": CAPTIONS}), OPTIONS))
    assert [item.key for item in items if not item.problem] == ["p1", "p2"]
    (message,) = _problems(items)
    assert "is listed as 'p2.png' and as 'other.png'" in message


def test_captions_of_other_types(tmp_path: Path) -> None:
    values = [None, "", {"raw": "x"}, float("nan"), ["one", None, "two"]]
    images = [{"id": n, "file_name": f"p{n}.png"} for n in range(5)]
    captions = [{"image_id": n, "caption": value} for n, value in enumerate(values)]
    items = list(read_coco(_write(tmp_path, {"images": images, "annotations": captions}), OPTIONS))
    assert _problems(items) == [
        "the image has no caption",
        "the image has no caption",
        "'caption' is a struct of raw, not a text: {'raw': 'x'}",
        "the image has no caption",
        "'caption' is a list, not a text: ['one', None, 'two']",
    ]


def test_files_without_captions_are_refused(tmp_path: Path) -> None:
    boxes = [{"id": 1, "image_id": 1, "category_id": 3, "bbox": [0, 0, 2, 2]}]
    _write(tmp_path, {"images": IMAGES, "annotations": boxes}, "instances_train.json")
    with pytest.raises(DataError, match=r"has no captions .*image_id, category_id, bbox.*--annot"):
        list(read_coco(tmp_path, ReaderOptions(annotations="instances_*.json")))


@pytest.mark.parametrize(
    "name", ["p{}.png", "train/p{}.png", "./p{}.PNG", "/data/coco/train/p{}.png"]
)
def test_a_file_of_any_name(tmp_path: Path, name: str) -> None:
    images = [{"id": n, "file_name": name.format(n)} for n in (1, 2)]
    _write(tmp_path, {"images": images, "annotations": CAPTIONS}, "mine.json")
    by_pattern = list(read_coco(tmp_path, ReaderOptions(annotations="mine.json")))
    by_path = list(read_coco(tmp_path / "annotations/mine.json", OPTIONS))
    assert [item.media for item in by_pattern] == [item.media for item in by_path]
    assert by_path[1].media == (str(tmp_path / "train/p2.png"),)
    (tmp_path / "train/p2.png").unlink()
    items = list(read_coco(tmp_path / "annotations/mine.json", OPTIONS))
    assert "tried" in _problems(items)[0] and "--media" in _problems(items)[0]


def test_equal_names_in_two_subsets(tmp_path: Path) -> None:
    content = {"images": IMAGES, "annotations": CAPTIONS}
    _write(tmp_path, content)
    write_file(tmp_path / "val/p1.png", image(5))
    val = {"images": IMAGES[:1], "annotations": [{"image_id": 1, "caption": "held out"}]}
    write_file(tmp_path / "annotations/captions_val.json", json.dumps(val))
    items = list(read_coco(tmp_path, OPTIONS))
    assert len({item.key for item in items}) == 3
    assert [item.declared_split for item in items] == ["train", "train", "val"]


@pytest.mark.parametrize(
    ("split", "expected"),
    [("train", "train"), ("restval", "train"), ("val", "val"), ("test", "test")],
)
def test_karpathy(tmp_path: Path, split: str, expected: str) -> None:
    images = [
        {
            **{"filepath": "train", "filename": f"p{n}.png", "cocoid": 100 + n, "split": split},
            "sentences": [{"raw": f"One {n}.", "tokens": ["one"]}, {"raw": f"Two {n}."}],
        }
        for n in (1, 2)
    ]
    _write(
        tmp_path, {"dataset": "coco", "images": [*images, {"filename": "x"}]}, "dataset_coco.json"
    )
    items = list(read_coco(tmp_path / "annotations/dataset_coco.json", OPTIONS))
    assert _texts(items[:2]) == {"p1": ("One 1.", "Two 1."), "p2": ("One 2.", "Two 2.")}
    assert [item.declared_split for item in items[:2]] == [expected] * 2
    assert items[0].metadata == {"image_id": "101"}
    assert items[1].media == (str(tmp_path / "train/p2.png"),)
    assert "has no filename and sentences" in _problems(items)[0]


def test_karpathy_of_flickr(tmp_path: Path) -> None:
    images = [{"filename": "p1.png", "imgid": 0, "split": "test", "sentences": [{"raw": "One."}]}]
    _write(tmp_path, {"images": images}, "unused.json")
    path = write_file(tmp_path / "dataset_flickr8k.json", json.dumps({"images": images}))
    (item,) = read_coco(path, OPTIONS)
    assert (item.texts, item.metadata["image_id"]) == (("One.",), "0")
