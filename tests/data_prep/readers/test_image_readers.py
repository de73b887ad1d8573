"""Readers of images with captions: keys, texts, groups, splits, and bad records."""

import json
from pathlib import Path

import pytest

from data_prep.corpus import Cell, Item, clean_key
from data_prep.options import ReaderOptions
from data_prep.readers.cc3m import read_cc3m
from data_prep.readers.flickr30k import read_flickr30k
from data_prep.readers.image_folder import read_image_folder, read_img2dataset
from data_prep.readers.parquet import read_image_parquet
from muomni.errors import DataError
from tests.data_prep.corpus_files import TEXTS, write_file, write_parquet
from tests.data_prep.public_layouts import (
    write_cc3m,
    write_flickr30k,
    write_flickr30k_csv,
    write_image_folder,
    write_image_parquet,
    write_img2dataset,
)
from tests.data_prep.raw_corpora import image

OPTIONS = ReaderOptions()


def _reasons(items: list[Item]) -> dict[str, str]:
    return {item.key: item.problem.reason for item in items if item.problem}


def test_flickr30k_groups_captions_by_image(tmp_path: Path) -> None:
    items = list(read_flickr30k(write_flickr30k(tmp_path), OPTIONS))
    assert [item.key for item in items] == [f"{n:05d}" for n in range(6)]
    assert items[2].texts == (f"{TEXTS[2]} (0)", f"{TEXTS[2]} (1)")
    assert items[2].media == (str(tmp_path / "flickr30k-images/00002.png"),)
    assert items[2].group == "picture:00002"  # terms: allow


def test_flickr30k_csv(tmp_path: Path) -> None:
    src = write_flickr30k_csv(tmp_path)
    table = src / "flickr30k_images/results.csv"
    # The public table has a line that lacks its second bar, and captions with quotation marks.
    broken = '00001.png| 4   A dog runs\n00001.png| 5| A "big" dog\n'
    write_file(table, table.read_text() + broken)
    items = list(read_flickr30k(src, OPTIONS))
    assert _reasons(items) == {"results-00000008": "bad-record"}
    texts = {item.key: item.texts for item in items}
    assert texts["00001"] == (TEXTS[1], 'A "big" dog')
    other = list(read_flickr30k(table, ReaderOptions(media_root=tmp_path / "elsewhere")))
    assert other[-1].media == (str(tmp_path / "elsewhere/00005.png"),)


def test_flickr30k_needs_table_and_images(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"contains neither results_20130124\.token nor"):
        list(read_flickr30k(tmp_path, OPTIONS))
    write_file(tmp_path / "results_20130124.token", "a.jpg#0\tx\n")
    with pytest.raises(DataError, match=r"no image folder .*--media"):
        list(read_flickr30k(tmp_path, OPTIONS))


def test_cc3m_with_files(tmp_path: Path) -> None:
    items = list(read_cc3m(write_cc3m(tmp_path), OPTIONS))
    assert items[1].texts == (TEXTS[1],)
    assert items[1].media == (str(tmp_path / "train/00001.png"),)
    assert items[1].declared_split == "train"


@pytest.mark.parametrize("is_cc12m", [False, True])
def test_cc3m_with_urls(tmp_path: Path, is_cc12m: bool) -> None:
    fields = ['a "quoted caption', "http://x.example/a/b%20c.jpg?w=1"]
    table = write_file(tmp_path / "cc.tsv", "\t".join(fields[::-1] if is_cc12m else fields) + "\n")
    (item,) = read_cc3m(table, ReaderOptions(media_root=tmp_path / "media"))
    assert item.texts == ('a "quoted caption',)
    assert item.media == (str(tmp_path / "media/b c.jpg"),)
    assert item.group == f"url:{fields[1]}"
    assert item.metadata == {"url": fields[1]}


def test_cc3m_header_and_bad_records(tmp_path: Path) -> None:
    table = write_file(tmp_path / "t.tsv", "filepath\ttitle\na.jpg\tone\nb.jpg\nc.jpg\t \n")
    items = list(read_cc3m(table, OPTIONS))
    assert items[0].texts == ("one",)
    assert _reasons(items) == {"t-00000002": "bad-record", "t-00000003": "empty-text"}
    write_file(table, "a\tb\tc\n")
    with pytest.raises(DataError, match="not a caption and an image file or URL"):
        list(read_cc3m(table, OPTIONS))


def test_image_folder(tmp_path: Path) -> None:
    write_image_folder(tmp_path)
    write_file(tmp_path / "b.caption", "one\n\ntwo\n")
    write_file(tmp_path / "b.PNG", image(1))
    write_file(tmp_path / "lonely.txt", "x")
    write_file(tmp_path / "mute.png", image(2))
    items = list(read_image_folder(tmp_path, OPTIONS))
    by_key = {item.key: item for item in items}
    assert len(by_key) == 9
    assert by_key["b"].texts == ("one", "two")
    assert by_key["b"].media == (str(tmp_path / "b.PNG"),)
    assert by_key["b"].declared_split is None
    deep = by_key[clean_key("train/deep/er/00003")]
    assert (deep.texts, deep.declared_split) == ((TEXTS[3],), "train")
    assert deep.group == "picture:00003"  # terms: allow
    assert _reasons(items) == {"lonely": "caption-without-image", "mute": "empty-text"}
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="contains no image"):
        list(read_image_folder(tmp_path / "empty", OPTIONS))


def test_img2dataset(tmp_path: Path) -> None:
    write_img2dataset(tmp_path)
    (tmp_path / "00001/000010002.txt").unlink()
    (tmp_path / "00001/000010001.txt").unlink()
    (tmp_path / "00001/000010001.json").write_text("{")
    items = list(read_img2dataset(tmp_path, OPTIONS))
    assert items[0].key == "000000000"
    assert items[0].group == "url:http://a.example/0.jpg"
    assert items[0].metadata == {"url": "http://a.example/0.jpg"}
    assert items[5].texts == (TEXTS[5],), "the caption of the JSON"
    assert _reasons(items) == {"000010001": "empty-text"}
    assert len({item.group for item in items}) == 6


def test_img2dataset_tars_refer_to_index(tmp_path: Path) -> None:
    write_file(tmp_path / "00000.tar", b"")
    with pytest.raises(DataError, match=r"data_prep index .* --task image-caption"):
        list(read_img2dataset(tmp_path, OPTIONS))


def test_image_parquet(tmp_path: Path) -> None:
    write_image_parquet(tmp_path)
    rows = [
        {"image": {"bytes": image(9), "path": None}, "caption": "  "},
        {"image": {"bytes": image(8), "path": None}, "caption": "eight"},
    ]
    write_parquet(tmp_path / "validation/0000.parquet", rows)
    items = list(read_image_parquet(tmp_path, OPTIONS))
    assert items[3].texts == (TEXTS[3],)
    assert items[3].group == "picture:pic3"  # terms: allow
    cell = items[3].media[0]
    assert isinstance(cell, Cell)
    assert (cell.row_group, cell.row, cell.column) == (1, 1, "image.bytes")
    assert 0 < cell.num_bytes < 1000
    assert items[3].block == "data/train-00000-of-00001.parquet:1"
    assert [item.declared_split for item in items] == ["train"] * 6 + ["val"] * 2
    assert list(_reasons(items).values()) == ["empty-text"]


def test_image_parquet_with_paths_and_other_columns(tmp_path: Path) -> None:
    rows = [
        {"file": "a.png", "title": ["one", "two"], "split": "dev", "id": "x"},
        {"file": None, "title": ["three"], "split": "other", "id": "y"},
    ]
    path = write_parquet(tmp_path / "t.parquet", rows)
    options = ReaderOptions(columns={"image": "file", "caption": "title"}, media_root=Path("/m"))
    items = list(read_image_parquet(path, options))
    assert items[0].media == ("/m/a.png",)
    assert items[0].texts == ("one", "two")
    assert (items[0].key, items[0].declared_split, items[0].block) == ("x", "val", "")
    assert _reasons(items) == {"y": "bad-record"}
    with pytest.raises(DataError, match=r"no column 'image' \(it has file, title.*--columns"):
        list(read_image_parquet(path, OPTIONS))


def test_broken_parquet(tmp_path: Path) -> None:
    write_file(tmp_path / "a.parquet", b"PAR1 cut off")
    with pytest.raises(DataError, match=r"cannot read .*a\.parquet: .*; download it again"):
        list(read_image_parquet(tmp_path, OPTIONS))
    write_parquet(tmp_path / "a.parquet", [{"image": [1, 2], "caption": "x"}])
    with pytest.raises(DataError, match=r"column 'image' .* is list"):
        list(read_image_parquet(tmp_path, OPTIONS))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"contains no \*\.parquet"):
        list(read_image_parquet(tmp_path / "empty", OPTIONS))


def test_broken_metadata_file_is_ignored(tmp_path: Path) -> None:
    write_file(tmp_path / "0/1.jpg", image(1, kind="JPEG"))
    write_file(tmp_path / "0/1.json", json.dumps(["no", "object"]))
    (item,) = read_img2dataset(tmp_path, OPTIONS)
    assert item.problem and item.problem.reason == "empty-text"
