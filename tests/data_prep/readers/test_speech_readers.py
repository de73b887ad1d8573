"""Readers of audio clips with texts: segments, groups, splits, and bad records."""

import json
from pathlib import Path

import pytest

from data_prep.corpus import Cell, Clip, Item, transcript_group
from data_prep.options import ReaderOptions
from data_prep.readers.arctic import read_arctic
from data_prep.readers.commonvoice import read_commonvoice
from data_prep.readers.gigaspeech import read_gigaspeech
from data_prep.readers.lhotse import read_lhotse
from data_prep.readers.libritts import read_libritts
from data_prep.readers.nemo import read_nemo
from data_prep.readers.parquet import read_speech_parquet
from data_prep.readers.vctk import read_vctk
from muomni.errors import DataError
from tests.data_prep.corpus_files import TEXTS, write_file, write_jsonl, write_parquet
from tests.data_prep.raw_corpora import audio
from tests.data_prep.speech_layouts import (
    gigaspeech_segment,
    lhotse_recording,
    lhotse_supervision,
    write_arctic,
    write_commonvoice,
    write_gigaspeech,
    write_lhotse,
    write_libritts,
    write_nemo,
    write_vctk,
)

OPTIONS = ReaderOptions()


def _reasons(items: list[Item]) -> dict[str, str]:
    return {item.key: item.problem.reason for item in items if item.problem}


def test_commonvoice(tmp_path: Path) -> None:
    src = write_commonvoice(tmp_path)
    items = list(read_commonvoice(src, OPTIONS))
    assert [item.key for item in items] == [f"clip_{n}" for n in range(6)]
    assert [item.declared_split for item in items] == ["train"] * 2 + ["val"] * 2 + ["test"] * 2
    assert items[0].media == (str(src / "clips/clip_0.mp3"),)
    assert items[0].metadata["speaker"] == "speaker0"
    assert items[0].metadata["language"] == "en"
    assert items[0].metadata["gender"] == "female"
    assert items[0].group == transcript_group(TEXTS[0])
    by_speaker = read_commonvoice(src, ReaderOptions(group_by="speaker"))
    assert next(by_speaker).group == "speaker:speaker0"


def test_commonvoice_validated_and_bad_records(tmp_path: Path) -> None:
    src = write_commonvoice(tmp_path)
    lines = 'client_id\tpath\tsentence\na\tclip_0\t"One quote\nb\tclip_9.mp3\t\nc\t\tx\nd\n'
    write_file(src / "validated.tsv", lines)
    items = list(read_commonvoice(src, ReaderOptions(subsets=("validated",))))
    assert items[0].texts == ('"One quote',)
    assert items[0].media == (str(src / "clips/clip_0.mp3"),)
    assert (items[0].declared_split, items[0].metadata["language"]) == (None, "en")
    assert list(_reasons(items).values()) == ["empty-text", "bad-record", "bad-record"]
    both = list(read_commonvoice(src, ReaderOptions(subsets=("test", "train", "test"))))
    assert len(both) == 4
    with pytest.raises(DataError, match=r"other\.tsv does not exist"):
        list(read_commonvoice(src, ReaderOptions(subsets=("other",))))
    with pytest.raises(DataError, match="must be the folder of one language"):
        list(read_commonvoice(tmp_path, OPTIONS))


def test_nemo_segments_and_whole_files(tmp_path: Path) -> None:
    items = list(read_nemo(write_nemo(tmp_path), OPTIONS))
    assert items[1].media == (Clip(str(tmp_path / "long.wav"), 0.5, 0.5),)
    assert {item.group for item in items[:6]} == {"recording:long"}
    assert items[6].media == (Clip(str(tmp_path / "short.wav"), 0.0, 0.3),), "as NeMo reads it"
    assert items[6].group == transcript_group("whole file")
    assert items[6].metadata["language"] == "en"
    assert {item.declared_split for item in items} == {"train"}
    by_words = list(
        read_nemo(tmp_path / "train_manifest.json", ReaderOptions(group_by="transcript"))
    )
    assert by_words[1].group == transcript_group(TEXTS[1])


def test_nemo_bad_records(tmp_path: Path) -> None:
    records = [
        {"audio_filepath": "a.wav", "text": "x", "offset": 1.0},
        {"audio_filepath": "a.wav", "text": " "},
        {"text": "x", "offset": 0, "duration": 1},
        "no object",
    ]
    items = list(read_nemo(write_jsonl(tmp_path / "m.json", records), OPTIONS))
    assert list(_reasons(items).values()) == [
        "bad-record",
        "empty-text",
        "bad-record",
        "bad-record",
    ]


def test_lhotse_supervisions(tmp_path: Path) -> None:
    items = list(read_lhotse(write_lhotse(tmp_path), OPTIONS))
    assert [item.key for item in items] == [f"sup-{n}" for n in range(6)]
    assert items[2].media == (Clip(str(tmp_path / "long.wav"), 1.0, 0.5),)
    assert items[2].group == "recording:long"
    assert items[2].declared_split == "train"
    assert items[2].metadata == {"speaker": "s1", "language": "English"}


def test_lhotse_whole_files_and_channels(tmp_path: Path) -> None:
    telephone = lhotse_recording("long", "call.wav", 3.0)
    telephone["sources"][0]["channels"] = [0, 1]
    write_jsonl(tmp_path / "recordings.jsonl", [telephone])
    supervisions = [
        {**lhotse_supervision(0, 0.0, 3.0), "channel": channel} for channel in (0, 1, 2)
    ]
    for number, supervision in enumerate(supervisions):
        supervision["id"] = f"s{number}"
    write_jsonl(tmp_path / "supervisions.jsonl", supervisions)
    items = list(read_lhotse(tmp_path, OPTIONS))
    assert [item.media for item in items[:2]] == [
        (Clip(str(tmp_path / "call.wav"), 0.0, 3.0, channel),) for channel in (0, 1)
    ]
    assert list(_reasons(items).values()) == ["bad-record"]
    write_jsonl(tmp_path / "recordings.jsonl", [lhotse_recording("long", "mono.wav", 3.0)])
    whole = next(read_lhotse(tmp_path / "supervisions.jsonl", OPTIONS))
    assert whole.media == (str(tmp_path / "mono.wav"),)


def test_lhotse_cuts(tmp_path: Path) -> None:
    cut = {
        **{"id": "c", "type": "MonoCut", "start": 1.0, "duration": 1.5, "channel": 0},
        "recording": lhotse_recording("long", "long.wav", 3.0),
        "supervisions": [lhotse_supervision(0, 0.0), lhotse_supervision(1, 0.75)],
    }
    changed = {**cut, "recording": {**cut["recording"], "transforms": [{"name": "Speed"}]}}
    remote = {**cut, "recording": {"id": "r", "duration": 3.0, "sources": [{"type": "url"}]}}
    cuts = [
        *(cut, {**cut, "supervisions": []}, {"id": "m", "type": "MixedCut", "tracks": []}),
        *(changed, remote, {**cut, "start": None}, {**cut, "supervisions": ["x"]}),
    ]
    items = list(read_lhotse(write_jsonl(tmp_path / "cuts_dev.jsonl", cuts), OPTIONS))
    # The times of a supervision are relative to its cut.
    assert [item.media[0] for item in items[:2]] == [
        Clip(str(tmp_path / "long.wav"), start_s, 0.5) for start_s in (1.0, 1.75)
    ]
    assert items[0].declared_split == "val"
    reasons = [item.problem.reason for item in items[2:] if item.problem]
    assert reasons == ["missing-transcript"] + ["bad-record"] * 8


def test_lhotse_needs_both_manifests(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"contains no \*supervisions\*"):
        list(read_lhotse(tmp_path, OPTIONS))
    write_lhotse(tmp_path)
    (tmp_path / "corpus_recordings_train.jsonl.gz").unlink()
    with pytest.raises(DataError, match=r"corpus_recordings_train\.jsonl\.gz does not exist"):
        list(read_lhotse(tmp_path, OPTIONS))
    path = tmp_path / "corpus_supervisions_train.jsonl.gz"
    write_jsonl(tmp_path / "corpus_recordings_train.jsonl.gz", [lhotse_recording("l", "l.wav", 3)])
    assert set(_reasons(list(read_lhotse(path, OPTIONS))).values()) == {"bad-record"}
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"supervisions_train\.jsonl\.gz: .*unpack or download"):
        list(read_lhotse(path, OPTIONS))


def test_gigaspeech(tmp_path: Path) -> None:
    texts = ["AS I SAID <COMMA> IT'S GONE <QUESTIONMARK>", "<MUSIC>", "HELLO <PERIOD>", "BYE"]
    subsets = (("XL", "M"), ("DEV",), ("DEV",), ("TEST",))
    segments = [
        gigaspeech_segment(n, text, *names)
        for n, (text, names) in enumerate(zip(texts, subsets, strict=True))
    ]
    src = write_gigaspeech(tmp_path, [*segments, {**segments[0], "sid": "x", "end_time": None}])
    items = list(read_gigaspeech(src, OPTIONS))
    assert items[0].key == "POD1_S0000000"
    assert items[0].texts == ("as i said, it's gone?",)
    assert items[2].media == (Clip(str(tmp_path / "audio/podcast/POD1.opus"), 1.0, 0.5),)
    assert [item.declared_split for item in items[:4]] == ["train", "val", "val", "test"]
    assert items[0].metadata == {"speaker": "", "language": "en"}
    assert {item.group for item in items[:4] if not item.problem} == {"recording:POD1"}
    assert _reasons(items) == {"POD1_S0000001": "no-speech", "x": "bad-record"}
    some = list(read_gigaspeech(src, ReaderOptions(subsets=("M", "TEST"), keep_case=True)))
    assert [item.texts for item in some if not item.problem] == [
        ("AS I SAID, IT'S GONE?",),
        ("BYE",),
    ]


def test_gigaspeech_invalid_description(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"GigaSpeech\.json does not exist"):
        list(read_gigaspeech(tmp_path, OPTIONS))
    write_file(tmp_path / "GigaSpeech.json", json.dumps({"audios": {}}))
    with pytest.raises(DataError, match="no list 'audios'"):
        list(read_gigaspeech(tmp_path, OPTIONS))
    write_file(tmp_path / "GigaSpeech.json", json.dumps({"audios": [{"aid": "a"}]}))
    assert len(_reasons(list(read_gigaspeech(tmp_path, OPTIONS)))) == 1


def test_gigaspeech_values_of_other_types(tmp_path: Path) -> None:
    segments = [
        {**gigaspeech_segment(n, "HI", "XL"), name: value}
        for n, (name, value) in enumerate([("text_tn", ["HI"]), ("speaker", 0), ("text_tn", None)])
    ]
    items = list(read_gigaspeech(write_gigaspeech(tmp_path, segments), OPTIONS))
    problems = [item.problem.message if item.problem else "" for item in items]
    assert problems == ["'text_tn' is a list, not a text: ['HI']", "", "the transcript is empty"]
    assert items[1].metadata["speaker"] == "0"


def test_libritts(tmp_path: Path) -> None:
    write_libritts(tmp_path)
    chapter = tmp_path / "LibriTTS/dev-clean/84/121"
    (chapter / "84_121_000002_000000.normalized.txt").unlink()
    (chapter / "84_121_000004_000000.wav").unlink()
    items = list(read_libritts(tmp_path, OPTIONS))
    assert items[0].key == "dev-clean-84_121_000000_000000"
    assert items[0].texts == (TEXTS[0],)
    assert items[0].group == "chapter:84-121", "as in LibriSpeech"
    assert (items[0].declared_split, items[0].metadata["speaker"]) == ("val", "84")
    assert list(_reasons(items).values()) == ["missing-transcript"]
    assert len(items) == 6, "a text without audio clip is listed; its file is then missing"
    original = read_libritts(tmp_path, ReaderOptions(text_form="original", group_by="speaker"))
    first = next(original)
    assert (first.texts, first.group) == (("Sentence No. 0.",), "speaker:84")
    with pytest.raises(DataError, match=r"subset .*train-clean-100 does not exist"):
        list(read_libritts(tmp_path, ReaderOptions(subsets=("train-clean-100",))))


def test_arctic(tmp_path: Path) -> None:
    src = write_arctic(tmp_path)
    prompts = src / "etc/txt.done.data"
    write_file(prompts, prompts.read_text() + '( arctic_b0001 "A \\"quote\\" in it." )\nbroken\n')
    for folder in (src, tmp_path):
        items = list(read_arctic(folder, OPTIONS))
        assert items[0].key == "bdl-arctic_a0000"
        assert items[0].media == (str(src / "wav/arctic_a0000.wav"),)
        assert items[0].metadata == {"speaker": "bdl", "language": "en"}
        assert items[0].group == transcript_group(TEXTS[0])
        assert items[6].texts == ('A "quote" in it.',)
        assert list(_reasons(items).values()) == ["bad-record"]


def test_vctk(tmp_path: Path) -> None:
    src = write_vctk(tmp_path)
    (src / "txt/p225/p225_003.txt").unlink()
    items = list(read_vctk(src, OPTIONS))
    assert items[0].key == "p225_000"
    assert items[0].media == (str(src / "wav48_silence_trimmed/p225/p225_000_mic1.flac"),)
    assert items[0].texts == (TEXTS[0],)
    assert items[0].group == transcript_group(TEXTS[0])
    facts = {"age": "23", "gender": "F", "accent": "English"}
    assert items[0].metadata == {"speaker": "p225", "language": "en", **facts}
    assert _reasons(items) == {"p225_003": "missing-transcript"}


def test_vctk_earlier_version(tmp_path: Path) -> None:
    write_file(tmp_path / "wav48/p226/p226_001.wav", audio(1))
    write_file(tmp_path / "txt/p226/p226_001.txt", "Hello")
    write_file(
        tmp_path / "speaker-info.txt", "ID  AGE  GENDER  ACCENTS  REGION\n226  22  M  English\n"
    )
    (item,) = read_vctk(tmp_path, ReaderOptions(group_by="speaker"))
    assert item.media == (str(tmp_path / "wav48/p226/p226_001.wav"),)
    assert (item.group, item.metadata["age"]) == ("speaker:p226", "22")
    (tmp_path / "wav48").rename(tmp_path / "other")
    with pytest.raises(DataError, match="has neither wav48_silence_trimmed nor wav48"):
        list(read_vctk(tmp_path, OPTIONS))


def test_speech_parquet(tmp_path: Path) -> None:
    rows = [
        {"audio": {"bytes": audio(0), "path": "a.wav"}, "sentence": "Hello", "speaker": "7"},
        {"audio": {"bytes": audio(1), "path": "b.wav"}, "sentence": None, "speaker": "7"},
    ]
    write_parquet(tmp_path / "test-00000-of-00001.parquet", rows)
    items = list(read_speech_parquet(tmp_path, ReaderOptions(columns={"text": "sentence"})))
    assert items[0].texts == ("Hello",)
    assert isinstance(items[0].media[0], Cell)
    assert items[0].metadata["speaker"] == "7"
    assert items[0].declared_split == "test"
    assert items[0].group == transcript_group("hello")
    assert list(_reasons(items).values()) == ["empty-text"]
