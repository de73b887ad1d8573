"""Media are found under the paths that other people and systems write, and under no other."""

import unicodedata
from pathlib import Path

import pytest

from data_prep.corpus import BadSampleError
from data_prep.media.located import located
from data_prep.readers.media_paths import find_media
from tests.data_prep.corpus_files import write_file

_FILES = (
    "clips/one.wav",
    "clips/two words.wav",
    "clips/TALL.FLAC",
    "clips/50%20.wav",
    "clips/deep/dü.wav",
    "clips/both.wav",
    "clips/both.flac",
    "clips/Case.wav",
    "clips/case.wav",
    "0001.wav",
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("corpus")
    for name in _FILES:
        write_file(root / name, name)
    return root


def _nfd(text: str) -> str:
    return unicodedata.normalize("NFD", text)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("clips/one.wav", "clips/one.wav"),
        ("./clips//one.wav", "clips/one.wav"),
        ("clips/deep/../one.wav", "clips/one.wav"),
        ("clips\\one.wav", "clips/one.wav"),
        ("file://clips/two%20words.wav", "clips/two words.wav"),
        ("clips/two%20words.wav", "clips/two words.wav"),
        ("clips/50%20.wav", "clips/50%20.wav"),
        (" clips/one.wav ", "clips/one.wav"),
        ("Clips/ONE.WAV", "clips/one.wav"),
        ("clips/tall.flac", "clips/TALL.FLAC"),
        ("clips/one", "clips/one.wav"),
        ("clips/tall", "clips/TALL.FLAC"),
        (_nfd("clips/deep/dü.wav"), "clips/deep/dü.wav"),
        ("/home/someone/corpus/clips/one.wav", "clips/one.wav"),
        ("D:\\corpora\\corpus\\clips\\one.wav", "clips/one.wav"),
        ("file:///D:/corpora/clips/one.wav", "clips/one.wav"),
        ("clips/case.wav", "clips/case.wav"),
    ],
)
def test_a_file_is_found_as_others_write_it(root: Path, name: str, file: str) -> None:
    assert Path(located(find_media(root, name))).read_text() == file


def test_a_local_file_url_and_a_path_from_the_root_are_kept(root: Path, tmp_path: Path) -> None:
    for name in (f"{root}/0001.wav", f"file://{root}/0001.wav", f"file://localhost{root}/0001.wav"):
        assert find_media(tmp_path, name) == str(root / "0001.wav")


def test_a_folder_that_the_name_repeats(root: Path) -> None:
    assert located(find_media(root / "clips", "clips/one.wav")) == str(root / "clips/one.wav")


@pytest.mark.parametrize(
    "name",
    [
        "clips/both",
        "clips/CASE.wav",
        "clips/none.wav",
        "/other/voice/0001.wav",
        "one.wav",
        "a\0b.wav",
    ],
)
def test_a_file_that_might_be_another_one_is_not_taken(root: Path, name: str) -> None:
    with pytest.raises(BadSampleError) as error:
        located(find_media(root, name))
    assert error.value.problem.reason == "missing-media"


def test_the_message_lists_the_places_that_were_tried(root: Path) -> None:
    with pytest.raises(BadSampleError) as error:
        located(find_media(root, "/data/corpus/clips/none.wav"))
    message = str(error.value)
    assert f"{root}/data/corpus/clips/none.wav" in message
    assert f"{root}/clips/none.wav" in message
    with pytest.raises(BadSampleError) as error:
        located(str(root / ("deep/" * 500 + "none.wav")))
    assert len(str(error.value)) < 420 and "none.wav" in str(error.value)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("https://example.org/a.jpg", "'image' is an address"),
        ("s3://bucket/a.jpg", "'image' is an address"),
        ("data:image/png;base64," + "A" * 10_000, "'image' is data"),
        ("iVBORw0KGgoAAAANSUhEUg" + "A" * 10_000, "'image' is data"),
        ("/9j/4AAQSkZJRgABAQAAAQABAAD" + "/" * 100, "'image' is data"),
        ("x" * 10_000, "'image' is not the path of a file"),
    ],
)
def test_what_is_not_a_path_is_refused_in_a_short_sentence(name: str, words: str) -> None:
    with pytest.raises(BadSampleError) as error:
        find_media(Path("/corpus"), name, "image")
    assert words in str(error.value) and len(str(error.value)) < 200
