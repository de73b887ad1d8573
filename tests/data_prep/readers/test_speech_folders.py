"""Readers of MLS, Kaldi data folders, and AISHELL; segments that begin before the file."""

from pathlib import Path

import pytest

from data_prep.corpus import BadSampleError, Clip, Item, transcript_group
from data_prep.media.convert import read_media
from data_prep.options import ReaderOptions
from data_prep.readers.aishell import read_aishell
from data_prep.readers.kaldi import read_kaldi
from data_prep.readers.librispeech import read_librispeech
from data_prep.readers.libritts import read_libritts
from data_prep.readers.mls import read_mls
from data_prep.readers.nemo import read_nemo
from muomni.data.media.decode import AudioFacts, read_audio
from muomni.errors import DataError
from tests.data_prep.corpus_files import TEXTS, write_file, write_jsonl
from tests.data_prep.raw_corpora import audio, write_librispeech
from tests.data_prep.speech_layouts import write_aishell, write_kaldi, write_libritts, write_mls

OPTIONS = ReaderOptions()


def _messages(items: list[Item]) -> list[str]:
    return [item.problem.message if item.problem else "" for item in items]


def test_mls(tmp_path: Path) -> None:
    src = write_mls(tmp_path)
    items = list(read_mls(src, OPTIONS))
    assert items[1].media == (str(src / "train/audio/12/35/12_35_000001.flac"),)
    assert (items[1].key, items[1].texts) == ("train-12_35_000001", (TEXTS[1],))
    assert (items[1].group, items[1].metadata["speaker"]) == ("chapter:12_35", "12")
    assert {item.declared_split for item in items} == {"train"}
    assert [item.key for item in read_mls(src / "train", OPTIONS)] == [item.key for item in items]


def test_mls_with_opus_and_bad_lines(tmp_path: Path) -> None:
    write_file(tmp_path / "dev/audio/1/2/1_2_0.opus", b"x")
    write_file(tmp_path / "dev/transcripts.txt", "1_2_0\thi there\n1_2_1 no tab\nx\ty\n")
    items = list(read_mls(tmp_path, OPTIONS))
    assert items[0].media == (str(tmp_path / "dev/audio/1/2/1_2_0.opus"),)
    assert items[0].declared_split == "val"
    assert ["not SPEAKER_BOOK_NUMBER" in message for message in _messages(items)] == [
        False,
        True,
        True,
    ]
    with pytest.raises(DataError, match=r"MLS subset .*test does not exist"):
        list(read_mls(tmp_path, ReaderOptions(subsets=("test",))))
    (tmp_path / "dev/audio/1/2/1_2_0.opus").unlink()
    with pytest.raises(DataError, match="contains no audio file of MLS"):
        list(read_mls(tmp_path, OPTIONS))


def test_kaldi_segments(tmp_path: Path) -> None:
    src = write_kaldi(tmp_path)
    items = list(read_kaldi(src, OPTIONS))
    assert items[2].media == (Clip(str(tmp_path / "audio/long.wav"), 1.0, 0.5),)
    assert (items[2].key, items[2].texts) == ("train-anna-2", (TEXTS[2],))
    assert items[2].metadata["speaker"] == "anna"
    assert items[2].group == "recording:long"
    assert {item.declared_split for item in items} == {"train"}
    assert len(list(read_kaldi(src / "train", OPTIONS))) == 6


def test_kaldi_whole_files_commands_and_archives(tmp_path: Path) -> None:
    paths = {
        "a": "clips/a.wav",
        "b": f"flac -c -d -s {tmp_path}/clips/b.flac |",
        "c": "sph2pipe -f wav -p -c 1 /ldc/c.sph |",
        "d": "/data/wav.ark:1234",
        "e": "clips/e.wav",
    }
    write_file(tmp_path / "clips/a.wav", audio(1))
    write_file(tmp_path / "wav.scp", "".join(f"{name} {path}\n" for name, path in paths.items()))
    write_file(tmp_path / "text", "a  one  two\nb three\nc four\nd five\nf six\n")
    items = list(read_kaldi(tmp_path, OPTIONS))
    assert [item.media for item in items[:2]] == [
        (str(tmp_path / f"clips/{name}"),) for name in ("a.wav", "b.flac")
    ]
    assert (items[0].texts, items[0].group) == (("one two",), transcript_group("one two"))
    messages = _messages(items)[2:]
    assert "the audio of c is the output of a command, which is not run: 'sph2pipe" in messages[0]
    assert "is in a Kaldi archive" in messages[1]
    assert messages[2:] == ["e has no line in text", "f has no line in wav.scp"]


def test_kaldi_bad_segments_and_missing_files(tmp_path: Path) -> None:
    write_file(tmp_path / "wav.scp", "r /x/r.wav\n")
    with pytest.raises(DataError, match="text is not a file"):
        list(read_kaldi(tmp_path, OPTIONS))
    write_file(tmp_path / "text", "a one\nb two\n")
    write_file(tmp_path / "segments", "a r 0.0\n")
    messages = _messages(list(read_kaldi(tmp_path, OPTIONS)))
    start = "the line in segments is not RECORDING START END"
    assert messages == [f"{start}: 'r 0.0'", f"{start}: ''"]


def test_aishell(tmp_path: Path) -> None:
    src = write_aishell(tmp_path)
    write_file(src / "data_aishell/wav/dev/S0724/BAC009S0724W0001.wav", audio(9))
    write_file(src / "data_aishell/wav/S0002.tar.gz", b"x")
    options = ReaderOptions()
    by_key = {item.key: item for item in read_aishell(src, options)}
    item = by_key["BAC009S0002W0001"]
    assert (item.texts, item.metadata["speaker"]) == (("而对楼市一",), "S0002")
    assert item.declared_split == "train"
    held_out = by_key["BAC009S0724W0001"]
    assert held_out.problem and "has no line in the transcript" in held_out.problem.message
    assert options.skipped.others == {".gz": 1}
    assert len(list(read_aishell(src, ReaderOptions(subsets=("dev",))))) == 1
    with pytest.raises(DataError, match="contains no audio file; unpack"):
        list(read_aishell(src, ReaderOptions(subsets=("test",))))


def test_librispeech_of_others(tmp_path: Path) -> None:
    """Links, FLAC in capitals, WAV, tabs, clutter, and audio files without any transcript file."""
    write_librispeech(tmp_path / "store", chapters=1)
    root = tmp_path / "LibriSpeech"
    root.mkdir()
    (root / "train-clean-100").symlink_to(tmp_path / "store/train-clean-100")
    chapter = tmp_path / "store/train-clean-100/19/100"
    (chapter / "19-100-0000.flac").rename(chapter / "19-100-0000.FLAC")
    write_file(chapter / "19-100-0007.wav", audio(1))
    table = (chapter / "19-100.trans.txt").read_text()
    write_file(chapter / "19-100.trans.txt", f"{table}19-100-0007\tWITH A TAB\n")
    write_file(chapter / "._19-100.trans.txt", b"\0\x05\x16\x07 x")
    write_file(chapter / "._19-100-0000.flac", b"\0\x05\x16\x07")
    write_file(tmp_path / "store/train-clean-100/19/101/19-101-0000.flac", b"x")
    options = ReaderOptions()
    by_key = {item.key: item for item in read_librispeech(root, options)}
    assert len(by_key) == 4
    upper = by_key["train-clean-100-19-100-0000"]
    assert upper.media == (str(root / "train-clean-100/19/100/19-100-0000.FLAC"),)
    assert by_key["train-clean-100-19-100-0007"].texts == ("with a tab",)
    alone = by_key["train-clean-100-19-101-0000"].problem
    assert alone and alone.reason == "missing-transcript"
    assert options.skipped.clutter == {"._*": 2}


def test_libritts_of_others(tmp_path: Path) -> None:
    write_libritts(tmp_path)
    chapter = tmp_path / "LibriTTS/dev-clean/84/121"
    (chapter / "84_121_000000_000000.wav").rename(chapter / "84_121_000000_000000.WAV")
    write_file(chapter / "84_121.trans.tsv", "x")
    write_file(tmp_path / "LibriTTS/dev-clean/84/900/84_900_000000_000000.normalized.txt", "alone")
    options = ReaderOptions()
    items = list(read_libritts(tmp_path, options))
    assert items[0].media == (str(chapter / "84_121_000000_000000.WAV"),)
    assert items[-1].texts == ("alone",), "its audio file is reported as missing when it is read"
    assert options.skipped.others == {".tsv": 1}


def test_nemo_fields(tmp_path: Path) -> None:
    rows = [
        {"audio_filepath": "a.wav", "duration": "1.5", "offset": "0", "text": "numbers as text"},
        {"audio_filepath": "a.wav", "duration": None, "offset": None, "text": "nulls"},
        {"audio_filepath": "a.wav", "duration": 2, "text": "cut elsewhere"},
        {"audio_filepath": ["a.wav"], "duration": 1, "text": "list"},
        {"audio_filepath": "a.wav", "duration": "long", "text": "x"},
        {"audio_filepath": "a.wav", "duration": 1, "pred_text": "x"},
        {"audio_filepath": "b.wav", "duration": 1, "text": "whole"},
    ]
    items = list(read_nemo(write_jsonl(tmp_path / "m.json", rows), OPTIONS))
    path = str(tmp_path / "a.wav")
    expected = [(Clip(path, 0.0, 1.5),), (path,), (Clip(path, 0.0, 2.0),)]
    assert [item.media for item in items[:3]] == expected
    assert items[2].group == "recording:a", "another line has an offset in this file"
    assert items[6].group == transcript_group("whole")
    assert _messages(items)[3:6] == [
        "'audio_filepath' is a list, not a text: ['a.wav']",
        "'duration' is not a number of seconds: 'long'",
        "no field 'text' (it has audio_filepath, duration, pred_text)",
    ]
    items = list(read_nemo(tmp_path / "m.json", ReaderOptions(columns={"text": "pred_text"})))
    assert items[5].texts == ("x",)


def test_segments_that_begin_before_the_file(tmp_path: Path) -> None:
    path = write_file(tmp_path / "a.wav", audio(1, 1.0))
    name, data = read_media(Clip(str(path), -0.005, 0.5), "audio")
    assert (name, AudioFacts.of(*read_audio(data)).duration_ms) == ("flac", 495)
    with pytest.raises(BadSampleError, match="is not a valid segment"):
        read_media(Clip(str(path), -0.06, 0.5), "audio")
