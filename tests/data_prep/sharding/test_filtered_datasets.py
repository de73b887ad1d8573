"""Datasets with filters: which samples remain, and what manifest, card, and listings record."""

import json
from pathlib import Path

import pytest

from data_prep.cli.main import main
from data_prep.corpus import Item
from data_prep.options import RULES, Filters
from data_prep.sharding.shard_plan import ShardingOptions, build_plan
from muomni.data.shards.manifest import Manifest
from muomni.data.shards.reader import SplitReader
from muomni.data.shards.writer import load_record
from tests.data_prep.raw_corpora import (
    audio,
    image,
    read_annotations,
    write_annotations,
    write_coco,
    write_ljspeech,
)

_ALL_FLAGS = {rule.flag for rule in RULES.values()}


def shard(task: str, form: str, src: Path, out: Path, *options: str) -> Manifest:
    main(
        [
            *(task, "--format", form, "--src", str(src), "--out", str(out), "--workers", "1"),
            *("--val-fraction", "0", "--test-fraction", "0", "--max-bad-fraction", "0"),
            *options,
        ]
    )
    return Manifest.load(out)


def listed(folder: Path) -> list[dict[str, str]]:
    lines = [line for path in sorted(folder.glob("*")) for line in path.read_text().splitlines()]
    return [json.loads(line) for line in lines]


def write_speech(root: Path) -> Path:
    """Six audio clips of 0.3 s, the last two of which are replaced by longer ones."""
    src = write_ljspeech(root, [f"Sentence number {number}." for number in range(6)])
    for number in (4, 5):
        (src / f"wavs/LJ-{number:04d}.wav").write_bytes(audio(number, duration_s=0.8))
    return src


def test_long_audio_clips_are_dropped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    command = ("speech", "ljspeech", write_speech(tmp_path / "src"), out, "--shard-size", "3")
    manifest = shard(*command, "--max-duration", "0.5")
    assert "filtered: too-long 2" in capsys.readouterr().out
    assert manifest.dropped == {"too-long": 2}
    assert manifest.filters == {"max_duration_s": "0.5"}
    assert manifest.split("train").totals.duration_ms == 4 * 300
    records = [load_record(path) for path in sorted(out.rglob("*.tar"))]
    assert sum(record.dropped.get("too-long", 0) for record in records if record) == 2
    card = (out / "README.md").read_text()
    assert "- Bad: none\n- Filters: max_duration_s=0.5\n- Filtered: too-long: 2\n" in card
    entries = listed(out / "filtered")
    assert {entry["key"] for entry in entries} == {"LJ-0004", "LJ-0005"}
    assert {entry["message"] for entry in entries} == {"0.8 seconds, more than --max-duration 0.5"}
    assert not (out / "quarantine").exists()
    main(["verify", "--full", "--decode", "100", "--workers", "1", str(out)])
    assert "4 samples in" in capsys.readouterr().out


def test_other_filters_need_another_dataset(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    src, out = write_speech(tmp_path / "src"), tmp_path / "out"
    shard("tts", "ljspeech", src, out, "--max-duration", "0.5")
    with pytest.raises(SystemExit) as stop:
        shard("tts", "ljspeech", src, out, "--max-duration", "0.6")
    assert stop.value.code == 3
    assert "--overwrite" in capsys.readouterr().err
    manifest = shard("tts", "ljspeech", src, out, "--overwrite")
    assert manifest.dropped == {}
    assert not (out / "filtered").exists()
    assert "Filter" not in (out / "README.md").read_text()


def test_filtering_does_not_depend_on_workers(tmp_path: Path) -> None:
    src = write_speech(tmp_path / "src")
    options = ("--shard-size", "2", "--min-chars-per-second", "30", "--name", "n")
    one = shard("tts", "ljspeech", src, tmp_path / "one", *options)
    two = shard("tts", "ljspeech", src, tmp_path / "two", *options, "--workers", "2")
    assert one.dropped == {"too-slow": 2}
    assert one.to_json() == two.to_json()


def test_broken_samples_are_bad_not_filtered(tmp_path: Path) -> None:
    src, out = write_speech(tmp_path / "src"), tmp_path / "out"
    (src / "wavs/LJ-0001.wav").write_bytes(b"RIFF")
    options = ("--min-chars", "1000", "--max-bad-fraction", "0.1")
    with pytest.raises(SystemExit):
        shard("tts", "ljspeech", src, out, *options)
    assert [entry["key"] for entry in listed(out / "quarantine")] == ["LJ-0001"]
    assert len(listed(out / "filtered")) == 5


def test_filters_that_drop_everything_are_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        shard(
            *("tts", "ljspeech", write_speech(tmp_path / "src"), tmp_path / "out"),
            *("--min-duration", "9"),
        )
    assert stop.value.code == 3
    error = capsys.readouterr().err
    assert "is empty; loosen the filters (too-short: 6)" in error
    assert error.count("\n") == 1


def test_image_keeps_captions_that_pass(tmp_path: Path) -> None:
    src = write_coco(tmp_path / "src", 3)
    images, captions = read_annotations(src)
    captions[0]["caption"] = "вещь"
    captions += [
        {"id": 10, "image_id": 1, "caption": "a thing"},
        {"id": 11, "image_id": 2, "caption": "странная вещь"},
    ]
    captions[2]["caption"] = "третья вещь"
    write_annotations(src, images, captions)
    out = tmp_path / "out"
    manifest = shard("image-caption", "coco", src, out, "--script", "latin")
    assert manifest.dropped == {"other-script": 1}
    reader = SplitReader(manifest, "train")
    samples = [reader.read(index) for index in range(2)]
    kept = {int(str(each["__key__"])): json.loads(each["json"])["captions"] for each in samples}
    assert kept == {1: ["a thing"], 2: ["thing number 2"]}
    assert {each["txt"] for each in samples} == {b"a thing", b"thing number 2"}
    main(["verify", "--full", "--decode", "100", "--workers", "1", str(out)])


def test_small_images_are_dropped(tmp_path: Path) -> None:
    """All images have 24 x 18 pixels."""
    src = write_coco(tmp_path / "src", 3)
    kept = shard("image-caption", "coco", src, tmp_path / "kept", "--min-side", "18")
    assert kept.dropped == {}
    with pytest.raises(SystemExit):
        shard("image-caption", "coco", src, tmp_path / "none", "--min-side", "19")
    assert {entry["reason"] for entry in listed(tmp_path / "none/filtered")} == {"too-small"}


def test_conversations_with_filtered_image_are_dropped(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(image(1))
    answer = {"from": "gpt", "value": "Yes."}
    records = [
        {"id": "x", "image": "a.png", "conversations": [{"from": "human", "value": "<image>"}]},
        {"id": "y", "conversations": [{"from": "human", "value": "Is it?"}]},
    ]
    for record in records:
        record["conversations"].append(answer)
    (tmp_path / "c.json").write_text(json.dumps(records))
    out = tmp_path / "out"
    manifest = shard("sft", "llava", tmp_path / "c.json", out, "--max-aspect", "1.2")
    assert manifest.dropped == {"too-narrow": 1}
    assert SplitReader(manifest, "train").read(0)["__key__"] == "y"


def test_short_documents_are_dropped(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\nfour\nthirteen\n")
    manifest = shard(
        *("text", "txt", tmp_path / "a.txt", tmp_path / "out"),
        *("--min-chars", "4", "--max-chars", "7"),
    )
    assert manifest.dropped == {"too-few-chars": 1, "too-many-chars": 1}
    assert SplitReader(manifest, "train").read(0)["txt"] == b"four"


@pytest.mark.parametrize(
    ("task", "flags"),
    [
        ("text", {"--min-chars", "--max-chars", "--script"}),
        ("sft", {"--min-side", "--max-pixels", "--max-aspect"}),
        ("speech", _ALL_FLAGS - {"--min-side", "--max-pixels", "--max-aspect"}),
    ],
)
def test_help_lists_filters_of_task(
    capsys: pytest.CaptureFixture[str], task: str, flags: set[str]
) -> None:
    with pytest.raises(SystemExit):
        main([task, "--help"])
    offered = set(capsys.readouterr().out.split())
    assert _ALL_FLAGS & offered == flags


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--min-duration", "-1"), "--min-duration must be at least 0, got -1.0"),
        (("--min-duration", "2", "--max-duration", "1"), "--min-duration 2.0 exceeds"),
        (("--script", "Elvish"), "--script 'elvish' is not a Unicode script"),
    ],
)
def test_invalid_values_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], message: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        shard("tts", "ljspeech", tmp_path / "src", tmp_path / "out", *options)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_digest_without_filters_is_stable(tmp_path: Path) -> None:
    """Changing this digest would force users to shard their corpora again."""
    items = [Item("a", "g", "somewhere", texts=("hello",)), Item("b", "h", "there", texts=("x",))]
    options = ShardingOptions("n", "text", "txt", {}, tmp_path)
    earlier = "9540c41bc7729418b209fb33e481a3bc9c9f138d5161ab1aae1a40473496a4c6"
    assert build_plan(items, options).digest == earlier
    bounded = ShardingOptions("n", "text", "txt", {}, tmp_path, filters=Filters(min_chars=1))
    assert build_plan(items, bounded).digest != earlier


def test_manifest_without_filters_omits_the_key(tmp_path: Path) -> None:
    out = tmp_path / "out"
    shard("tts", "ljspeech", write_speech(tmp_path / "src"), out)
    for name in ("manifest.json", "shard_plan.json"):
        assert "filters" not in json.loads((out / name).read_text())
