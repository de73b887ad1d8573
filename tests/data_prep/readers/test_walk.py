"""The search for files: links, cycles, clutter, suffixes in capitals, and the counts of skipped files."""

import os
from pathlib import Path

import pytest

from data_prep.readers.walk import find_files, walk
from data_prep.skipped_files import SkippedFiles
from muomni.errors import DataError
from tests.data_prep.corpus_files import write_file


def _found(root: Path, *suffixes: str) -> tuple[list[str], SkippedFiles]:
    skipped = SkippedFiles()
    paths = find_files(root, suffixes, skipped)
    return [path.relative_to(root).as_posix() for path in paths], skipped


def test_suffixes_in_any_case_and_counts_of_others(tmp_path: Path) -> None:
    for name in ("b.TXT", "a/c.txt", "x.bmp", "a/y.BMP", "README"):
        write_file(tmp_path / name, "x")
    found, skipped = _found(tmp_path, ".txt")
    assert found == ["a/c.txt", "b.TXT"]
    assert skipped.report() == "files not read: 3 of other types (.bmp 2, no suffix 1)"


def test_clutter_is_counted_by_kind(tmp_path: Path) -> None:
    names = (
        "a.txt",
        "._a.txt",
        "__MACOSX/d/._a.txt",
        "__MACOSX/b.txt",
        "Thumbs.db",
        ".cache/c.txt",
    )
    for name in (*names, "THUMBS.DB", ".DS_Store", "d/@eaDir/a.txt"):
        write_file(tmp_path / name, "x")
    found, skipped = _found(tmp_path, ".txt")
    assert found == ["a.txt"]
    counts = {"._*": 1, "__MACOSX": 2, "Thumbs.db": 1, "THUMBS.DB": 1, "hidden": 2, "@eaDir": 1}
    assert dict(skipped.clutter) == counts
    assert not skipped.others


def test_a_hidden_source_is_searched(tmp_path: Path) -> None:
    write_file(tmp_path / ".corpora/a.txt", "x")
    assert _found(tmp_path / ".corpora", ".txt")[0] == ["a.txt"]


def test_links_are_followed_once(tmp_path: Path) -> None:
    root, store = tmp_path / "src", tmp_path / "store"
    write_file(root / "own/a.txt", "x")
    write_file(store / "b.txt", "x")
    write_file(store / "deep/c.txt", "x")
    (root / "link").symlink_to(store)
    (root / "again").symlink_to(store)
    (root / "own/parent").symlink_to(root)
    (store / "self").symlink_to(store)
    (root / "own/file.txt").symlink_to(store / "b.txt")
    found, skipped = _found(root, ".txt")
    assert found == ["again/b.txt", "again/deep/c.txt", "own/a.txt", "own/file.txt"]
    assert skipped.num_links == 3


def test_a_real_folder_has_priority_over_a_link_to_it(tmp_path: Path) -> None:
    write_file(tmp_path / "z/a.txt", "x")
    (tmp_path / "a").symlink_to(tmp_path / "z")
    found, skipped = _found(tmp_path, ".txt")
    assert (found, skipped.num_links) == (["z/a.txt"], 1)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may list every folder")
def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o000)
    with pytest.raises(DataError, match=r"cannot list the folder .*closed: Permission denied"):
        list(walk(tmp_path, SkippedFiles()))


def test_no_file_no_report(tmp_path: Path) -> None:
    assert _found(tmp_path, ".txt")[1].report() == ""
