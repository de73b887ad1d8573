"""Corpora in the style of LJSpeech: columns, names of audio files, headers, and what is not clear."""

from pathlib import Path

import pytest

from data_prep.corpus import Item
from data_prep.options import ReaderOptions
from data_prep.readers.ljspeech import read_ljspeech
from muomni.errors import DataError
from tests.data_prep.corpus_files import write_file
from tests.data_prep.raw_corpora import audio

OPTIONS = ReaderOptions()
SPOKEN = ["Good morning to you.", "Is it late?", "Stop."]


def _write(root: Path, table: str, suffix: str = "wav", folder: str = "wavs") -> Path:
    for number in range(3):
        write_file(root / folder / f"u{number}.{suffix}", audio(number, fmt=suffix.upper()))
    write_file(root / "metadata.csv", table)
    return root


def _table(line: str) -> str:
    return "".join(line.format(n=n, text=SPOKEN[n]) + "\n" for n in range(3))


def _read(src: Path, options: ReaderOptions = OPTIONS) -> list[Item]:
    items = list(read_ljspeech(src, options))
    assert [item.problem for item in items] == [None] * 3
    return items


@pytest.mark.parametrize(
    ("line", "speakers"),
    [
        ("u{n}|{text}", ["", "", ""]),
        ("u{n}|{text}|", ["", "", ""]),
        ("u{n}.wav|{text}", ["", "", ""]),
        ("wavs/u{n}.wav|{text}", ["", "", ""]),
        ("./wavs/u{n}|{text}", ["", "", ""]),
        ("D:\\tts\\wavs\\u{n}.wav|{text}", ["", "", ""]),
        ("DUMMY/u{n}.wav|{n}|{text}", ["0", "1", "2"]),
        ("wavs/u{n}.wav|anna|{text}", ["anna"] * 3),
        ("u{n}|anna|{text}", ["anna"] * 3),
        ("u{n}|{text}|anna", ["anna"] * 3),
        ("u{n}|{text}|{text}|s{n}", ["s0", "s1", "s2"]),
        ("wavs/u{n}.wav|anna|EN|{text}", ["anna"] * 3),
        ("u{n}|anna|raw {text}|{text}", ["anna"] * 3),
    ],
)
def test_columns_follow_from_all_lines(tmp_path: Path, line: str, speakers: list[str]) -> None:
    items = _read(_write(tmp_path, _table(line)))
    assert [item.texts for item in items] == [(text,) for text in SPOKEN]
    assert [item.metadata["speaker"] for item in items] == speakers
    assert [item.media for item in items] == [(str(tmp_path / f"wavs/u{n}.wav"),) for n in range(3)]


def test_normalized_text_and_original(tmp_path: Path) -> None:
    table = "u0|Dr. Who|Doctor Who\nu1|It is 5.|It is five.\nu2|Same words|Same words\n"
    items = _read(_write(tmp_path, table))
    assert [item.texts[0] for item in items] == ["Doctor Who", "It is five.", "Same words"]
    originals = [item.metadata["original_text"] for item in items]
    assert originals == ["Dr. Who", "It is 5.", ""]


@pytest.mark.parametrize(
    ("suffix", "name"), [("flac", "u{n}"), ("WAV", "u{n}"), ("Wav", "U{n}.wav")]
)
def test_files_of_other_suffixes(tmp_path: Path, suffix: str, name: str) -> None:
    items = _read(_write(tmp_path, _table(name + "|{text}"), suffix, "clips/a"))
    assert items[0].media == (str(tmp_path / f"clips/a/u0.{suffix}"),)


def test_header(tmp_path: Path) -> None:
    table = "audio_file|text|speaker_name|emotion\n" + _table("u{n}|{text}|anna|calm")
    items = _read(_write(tmp_path, table))
    assert [item.texts[0] for item in items] == SPOKEN
    assert items[0].metadata["speaker"] == "anna"


def test_columns_by_number_and_header(tmp_path: Path) -> None:
    src = _write(tmp_path, _table("x|{text}|u{n}"))
    options = ReaderOptions(columns={"audio": "3", "text": "2", "speaker": "1"})
    assert [item.metadata["speaker"] for item in _read(src, options)] == ["x"] * 3
    write_file(src / "metadata.csv", "id|text|said\n" + _table("u{n}|no|{text}"))
    items = _read(src, ReaderOptions(columns={"audio": "id", "text": "said"}))
    assert [item.texts[0] for item in items] == SPOKEN
    with pytest.raises(
        DataError, match=r"no column 'words'.*numbers from 1, or one of id, text, said"
    ):
        _read(src, ReaderOptions(columns={"audio": "id", "text": "words"}))
    with pytest.raises(DataError, match="does not name the column of 'text'"):
        _read(src, ReaderOptions(columns={"audio": "id"}))


def test_columns_that_are_not_clear(tmp_path: Path) -> None:
    src = _write(tmp_path, "u0|早上好|zao shang hao\nu1|晚了吗|wan le ma\nu2|停|ting\n")
    with pytest.raises(DataError, match=r"are not clear: .*--columns audio=1,text=2,normalized=3"):
        _read(src)
    items = _read(src, ReaderOptions(columns={"audio": "1", "text": "2"}))
    assert items[1].texts == ("晚了吗",)


def test_a_file_as_source(tmp_path: Path) -> None:
    _write(tmp_path, "")
    path = write_file(tmp_path / "filelists/val.txt", _table("u{n}|{text}"))
    items = _read(path, ReaderOptions(media_root=tmp_path))
    assert [item.declared_split for item in items] == ["val"] * 3
    assert items[0].key == "u0"


def test_bad_lines_and_files(tmp_path: Path) -> None:
    src = _write(tmp_path, "u0|a b\nu1|a|b|c|d\n|no name\nu9|not there\nu2|two of them\n")
    write_file(src / "other/u2.wav", audio(1))
    write_file(src / "more/u2.wav", audio(1))
    problems = [item.problem for item in read_ljspeech(src, OPTIONS)]
    messages = [problem.message if problem else "" for problem in problems]
    assert messages[0] == messages[4] == "", "of several files, the one in wavs"
    assert messages[1] == "the line has 5 fields, most lines have 2"
    assert messages[2] == "the line has no name of an audio file"
    assert "no file for 'u9': tried u9, wavs/u9.*, and u9.* in all folders" in messages[3]
    (src / "wavs/u2.wav").unlink()
    last = list(read_ljspeech(src, OPTIONS))[-1]
    assert last.problem and "'u2' may be more/u2.wav or other/u2.wav" in last.problem.message
