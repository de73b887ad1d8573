"""Readers of tars: WebDataset of other tools, NeMo's tarred datasets, and Lhotse Shar."""

import json
from pathlib import Path

import pytest

from data_prep.corpus import Clip, Item, Member
from data_prep.media.tar_files import read_member
from data_prep.options import ReaderOptions
from data_prep.readers.lhotse import read_lhotse
from data_prep.readers.lhotse_shar import read_lhotse_shar
from data_prep.readers.nemo import read_nemo
from data_prep.readers.webdataset import read_image_tars, read_speech_tars, read_text_tars
from muomni.errors import DataError
from tests.data_prep.commands import shard
from tests.data_prep.corpus_files import TEXTS, write_jsonl, write_tar
from tests.data_prep.public_layouts import write_image_tars
from tests.data_prep.raw_corpora import audio, image
from tests.data_prep.speech_layouts import (
    lhotse_supervision,
    shar_cut,
    write_shar,
    write_speech_tars,
)


def _messages(items: list[Item]) -> list[str]:
    return [item.problem.message if item.problem else "" for item in items]


def _member(item: Item) -> Member:
    (media,) = item.media
    assert isinstance(media, Member)
    return media


def test_text_in_json(tmp_path: Path) -> None:
    items = list(read_speech_tars(write_speech_tars(tmp_path), ReaderOptions()))
    assert [item.texts for item in items] == [(text,) for text in TEXTS]
    assert items[0].metadata == {"speaker": "EN_S1", "language": "en"}
    assert read_member(_member(items[2])) == audio(2, fmt="MP3")
    assert {item.block for item in items} == {"EN-B000000.tar"}


def test_members_that_are_apart_and_in_capitals(tmp_path: Path) -> None:
    items = list(read_image_tars(write_image_tars(tmp_path), ReaderOptions()))
    assert [item.texts for item in items] == [(text,) for text in TEXTS]
    assert read_member(_member(items[3])) == image(3)
    assert {item.declared_split for item in items} == {"train"}
    assert len({item.group for item in items}) == len(items)


def test_equal_keys_in_two_tars(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_tar(tmp_path / f"{name}.tar", [("0.jpg", image(1, kind="JPEG")), ("0.txt", name)])
    first, second = read_image_tars(tmp_path, ReaderOptions())
    assert first.key != second.key and first.group != second.group
    (only,) = read_image_tars(tmp_path / "b.tar", ReaderOptions())
    assert only.texts == ("b",)


def test_keys_with_dots(tmp_path: Path) -> None:
    names = [f"img.v1.{n}.{kind}" for n in (1, 2) for kind in ("png", "txt")]
    write_tar(tmp_path / "a.tar", [(name, image(1) if "png" in name else name) for name in names])
    items = list(read_image_tars(tmp_path, ReaderOptions()))
    assert [item.texts for item in items] == [("img.v1.1.txt",), ("img.v1.2.txt",)]


def test_side_images_are_not_the_image(tmp_path: Path) -> None:
    members = [("0.mask.png", image(1)), ("0.png", image(2)), ("0.caption", "one\ntwo")]
    write_tar(tmp_path / "a.tar", members)
    (item,) = read_image_tars(tmp_path, ReaderOptions())
    assert _member(item).name == "0.png"
    assert item.texts == ("one", "two")


def test_captions_and_fields_of_other_types(tmp_path: Path) -> None:
    records: list[object] = [
        *({"captions": ["a", None, "b"]}, {"caption": "c", "url": "http://a.example/c.png"}),
        *({"captions": [{"raw": "d"}]}, {"label": 3}, ["list"], {"caption": None}),
    ]
    members = [
        member
        for n, record in enumerate(records)
        for member in ((f"{n}.png", image(n)), (f"{n}.json", json.dumps(record)))
    ]
    write_tar(tmp_path / "a.tar", members)
    items = list(read_image_tars(tmp_path, ReaderOptions()))
    assert [item.texts for item in items[:2]] == [("a", "b"), ("c",)]
    assert items[1].group == "url:http://a.example/c.png"
    messages = _messages(items)[2:]
    assert "struct of raw" in messages[0]
    assert "no text (members: .png, .json; its .json has label)" in messages[1]
    assert "--columns caption=FIELD" in messages[1]
    assert "is not a JSON object" in messages[2]
    assert "no text" in messages[3]


def test_columns_select_a_field(tmp_path: Path) -> None:
    record = {"text": "raw", "said": "spoken", "who": 0}
    write_tar(
        tmp_path / "a.tar", [("0.wav", audio(0)), ("0.json", json.dumps(record)), ("0.txt", "t")]
    )
    (item,) = read_speech_tars(tmp_path, ReaderOptions(columns={"text": "said"}))
    assert item.texts == ("spoken",)
    (item,) = read_speech_tars(tmp_path, ReaderOptions())
    assert item.texts == ("t",), "a text member has priority"


def test_documents_and_clutter(tmp_path: Path) -> None:
    members = [("._0.json", "x"), ("0.json", '{"text": "one\\ntwo"}'), ("1.txt", "three")]
    write_tar(tmp_path / "a.tar", [*members, ("__MACOSX/1.txt", "x"), (".DS_Store", "x")])
    options = ReaderOptions()
    items = list(read_text_tars(tmp_path, options))
    assert [item.texts for item in items] == [("one\ntwo",), ("three",)]
    assert options.skipped.clutter.total() == 3


def test_no_tars(tmp_path: Path) -> None:
    (tmp_path / "a.tar.gz").write_bytes(b"x")
    with pytest.raises(DataError, match=r"contains no \*\.tar .*\.gz 1.*unpack"):
        list(read_text_tars(tmp_path, ReaderOptions()))


def _nemo_tars(root: Path) -> Path:
    for number in (0, 1):
        members = [(f"clip{number}{n}.wav", audio(n, 1.0)) for n in range(2)]
        write_tar(root / f"audio_{number}.tar", [*members, ("._x.wav", b"x")])
    rows = [
        {"audio_filepath": "clip00.wav", "duration": 1.0, "text": "zero", "shard_id": 0},
        {"audio_filepath": "clip11.wav", "duration": 0.5, "text": "one", "shard_id": 1},
        {
            "audio_filepath": "clip11.wav",
            "duration": 0.3,
            "offset": 0.5,
            "text": "two",
            "shard_id": 1,
        },
        {"audio_filepath": "clip01.wav", "duration": 1.0, "text": "three", "shard_id": 1},
    ]
    return write_jsonl(root / "tarred_audio_manifest.json", rows)


def test_nemo_tars(tmp_path: Path) -> None:
    options = ReaderOptions()
    items = list(read_nemo(_nemo_tars(tmp_path), options))
    clips = [item.media[0] for item in items[:3]]
    assert all(isinstance(clip, Clip) and clip.member for clip in clips)
    assert [clip.file_name for clip in clips if isinstance(clip, Clip)] == [
        *("clip00.wav", "clip11.wav", "clip11.wav"),
    ]
    assert items[1].group == items[2].group == "recording:clip11"
    assert "the tar of shard 1 does not contain clip01.wav" in _messages(items)[3]
    assert options.skipped.others == {"in tars, without a line in the manifest": 2}
    assert options.skipped.clutter == {"._*": 2}


def test_nemo_tars_are_sharded(tmp_path: Path) -> None:
    src = _nemo_tars(tmp_path / "in")
    manifest = shard("speech", "nemo", src, tmp_path / "out", "--max-bad-fraction", "0.5")
    totals = manifest.split("train").totals
    assert (manifest.split("train").num_samples, totals.duration_ms) == (3, 1800)


def test_nemo_manifest_of_one_shard(tmp_path: Path) -> None:
    src = _nemo_tars(tmp_path)
    sharded = tmp_path / "sharded_manifests/manifest_1.json"
    sharded.parent.mkdir()
    sharded.write_text("\n".join(src.read_text().splitlines()[1:3]))
    assert _messages(list(read_nemo(sharded, ReaderOptions()))) == ["", ""]
    for tar in tmp_path.glob("*.tar"):
        tar.unlink()
    with pytest.raises(DataError, match=r"contains no \*\.tar; pass their folder with --media"):
        list(read_nemo(sharded, ReaderOptions()))


def test_shar(tmp_path: Path) -> None:
    items = list(read_lhotse_shar(write_shar(tmp_path), ReaderOptions()))
    assert [item.key for item in items] == [f"sup-{n}" for n in range(6)]
    assert [item.texts for item in items] == [(text,) for text in TEXTS]
    assert {item.group for item in items} == {"recording:long"}
    assert {item.declared_split for item in items} == {"train"}
    assert _member(items[0]).name == "cut-0.0.flac"
    with pytest.raises(DataError, match="use --format shar"):
        list(read_lhotse(tmp_path / "train", ReaderOptions()))


def test_shar_with_parts_and_gaps(tmp_path: Path) -> None:
    cuts = [
        shar_cut(0, [lhotse_supervision(0, 0.0, 0.2), lhotse_supervision(1, 0.2, 0.3)]),
        shar_cut(1, [lhotse_supervision(2, 0.0)]),
        shar_cut(2, []),
    ]
    write_jsonl(tmp_path / "cuts.000000.jsonl.gz", cuts)
    write_tar(tmp_path / "recording.000000.tar", [("cut-0.0.flac", audio(1, 0.5, fmt="FLAC"))])
    items = list(read_lhotse_shar(tmp_path, ReaderOptions()))
    starts = [media.start_s for item in items for media in item.media if isinstance(media, Clip)]
    assert starts == [0.0, 0.2]
    assert "does not contain the audio of cut 'cut-0.1'" in _messages(items)[2]
    assert _messages(items)[3] == "the cut has no supervision"
    (tmp_path / "recording.000000.tar").unlink()
    with pytest.raises(DataError, match=r"has no recording\.000000\.tar beside it"):
        list(read_lhotse_shar(tmp_path, ReaderOptions()))
