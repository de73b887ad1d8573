"""The sharder writes the same bytes for any number of workers and tasks, also after a kill."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from webdataset.compat import WebDataset

from data_prep.cli.main import main
from muomni.data.shards.manifest import Manifest
from muomni.data.shards.reader import SplitReader
from muomni.errors import DataError
from tests.data_prep.raw_corpora import (
    audio,
    image,
    read_annotations,
    write_annotations,
    write_coco,
    write_librispeech,
    write_ljspeech,
)


def coco(src: Path, out: Path, *options: str) -> None:
    main(
        [
            *("image-caption", "--format", "coco", "--src", str(src), "--out", str(out)),
            *("--name", "c", "--shard-size", "5", "--val-fraction", "0.2", "--test-fraction", "0"),
            *("--workers", "1", *options),
        ]
    )


def tree(root: Path) -> dict[str, bytes]:
    """All files of a dataset except records, which contain time stamps."""
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.suffix != ".json"
    }


def fails(capsys: pytest.CaptureFixture[str], code: int, arguments: list[str]) -> str:
    """Run a command that must exit with `code`; returns its error line."""
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == code
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert error.count("\n") == 1, error
    return error


def test_dataset_round_trip(tmp_path: Path) -> None:
    coco(write_coco(tmp_path / "src", 40), tmp_path / "out")
    manifest = Manifest.load(tmp_path / "out")
    keys = []
    for split in manifest.splits:
        reader = SplitReader(manifest, split)
        for index in range(len(reader)):
            sample = reader.read(index)
            number = int(sample["__key__"])
            keys.append(number)
            assert sample["png"] == image(number)
            assert json.loads(sample["json"])["captions"] == [f"thing number {number}"]
            assert sample["txt"] == f"thing number {number}".encode()
            row = reader.columns[index]
            assert (row["num_pixels"], row["num_images"]) == (24 * 18, 1)
            assert row["num_chars"] == len(sample["txt"])
    assert sorted(keys) == list(range(1, 41))
    assert set(manifest.splits) == {"train", "val"}
    assert "| train |" in (tmp_path / "out/README.md").read_text()


def test_webdataset_reads_all_shards(tmp_path: Path) -> None:
    coco(write_coco(tmp_path / "src", 20), tmp_path / "out")
    tars = [str(path) for path in sorted((tmp_path / "out").rglob("*.tar"))]
    dataset: Any = WebDataset(tars, shardshuffle=False)
    samples = list(dataset.decode("pil"))
    assert {int(sample["__key__"]) for sample in samples} == set(range(1, 21))
    assert all(sample["png"].size == (24, 18) for sample in samples)
    assert all(sample["json"]["captions"] == [sample["txt"]] for sample in samples)


def test_shards_do_not_depend_on_workers_and_tasks(tmp_path: Path) -> None:
    src = write_coco(tmp_path / "src", 40)
    coco(src, tmp_path / "one")
    coco(src, tmp_path / "pool", "--workers", "2")
    for task in (2, 0, 1):
        assert not (tmp_path / "array/manifest.json").exists()
        coco(src, tmp_path / "array", "--array-task", f"{task}/3")
    expected = tree(tmp_path / "one")
    assert tree(tmp_path / "pool") == expected
    assert tree(tmp_path / "array") == expected
    prints = {Manifest.load(tmp_path / d).fingerprint for d in ("one", "pool", "array")}
    assert len(prints) == 1


def test_slurm_variables_select_the_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    src = write_coco(tmp_path / "src", 40)
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "2")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "0")
    coco(src, tmp_path / "out")
    assert "task 0 of 2 is done" in capsys.readouterr().out
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    coco(src, tmp_path / "out")
    assert (tmp_path / "out/manifest.json").exists()


def test_rerun_keeps_finished_shards(tmp_path: Path) -> None:
    src = write_coco(tmp_path / "src", 20)
    coco(src, tmp_path / "out")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.tar")}
    victim = sorted(times)[0]
    victim.with_suffix(".json").unlink()
    coco(src, tmp_path / "out")
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.tar")}
    assert [path for path in times if times[path] != after[path]] == [victim]


@pytest.mark.parametrize("delay_s", [0.0, 0.05])
def test_kill_then_rerun_with_other_workers(tmp_path: Path, delay_s: float) -> None:
    src = tmp_path / "text.txt"
    src.write_text("".join(f"line number {n}\n" for n in range(12_000)))
    arguments = ["text", "--format", "txt", "--src", str(src), "--shard-size", "500"]
    arguments += ["--name", "t", "--val-fraction", "0.1"]
    main([*arguments, "--out", str(tmp_path / "whole"), "--workers", "1"])
    killed = tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, "-m", "data_prep", *arguments, "--out", str(killed), "--workers", "2"],
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    while not list(killed.rglob("*.tar")) and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(delay_s)
    process.send_signal(signal.SIGKILL)
    process.wait()
    # Workers exit when their parent does.
    while _members(process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _members(process.pid)
    with pytest.raises(DataError):
        Manifest.load(killed)
    for task in range(3):
        main([*arguments, "--out", str(killed), "--workers", "1", "--array-task", f"{task}/3"])
    assert tree(killed) == tree(tmp_path / "whole")


def _members(session: int) -> list[int]:
    """Living processes of a session."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(fields[3]) == session and fields[0] != "Z":
                found.append(int(entry.name))
    return found


def test_added_data_do_not_move_samples(tmp_path: Path) -> None:
    def splits(out: Path) -> dict[str, str]:
        manifest = Manifest.load(out)
        readers = {split: SplitReader(manifest, split) for split in manifest.splits}
        return {
            str(reader.read(index)["__key__"]): split
            for split, reader in readers.items()
            for index in range(len(reader))
        }

    coco(write_coco(tmp_path / "a", 30), tmp_path / "out-a")
    coco(write_coco(tmp_path / "b", 60), tmp_path / "out-b", "--seed", "5")
    small, large = splits(tmp_path / "out-a"), splits(tmp_path / "out-b")
    assert small == {key: large[key] for key in small}


def test_repeated_prompts_stay_in_one_split(tmp_path: Path) -> None:
    texts = [f"Prompt {n // 3}" + "!."[n % 2] for n in range(90)]
    src = write_ljspeech(tmp_path / "src", texts)
    main(
        [
            *("tts", "--format", "ljspeech", "--src", str(src), "--out", str(tmp_path / "out")),
            *("--val-fraction", "0.3", "--test-fraction", "0.3", "--workers", "1"),
        ]
    )
    manifest = Manifest.load(tmp_path / "out")
    seen: dict[int, str] = {}
    for split in ("train", "val", "test"):
        groups = SplitReader(manifest, split).columns["group_hash"].tolist()
        assert len(groups) % 3 == 0
        for group in groups:
            assert seen.setdefault(group, split) == split
    assert len(seen) == 30


def test_declared_splits(tmp_path: Path) -> None:
    src = write_librispeech(tmp_path / "src", "train-clean-100", 4)
    write_librispeech(tmp_path / "src", "dev-clean", 2, speaker=20)
    arguments = ["speech", "--format", "librispeech", "--src", str(src), "--workers", "1"]
    arguments += ["--out", str(tmp_path / "out"), "--split-from", "source"]
    main(arguments)
    splits = Manifest.load(tmp_path / "out").splits
    # The corpus has no test split, so that is a chapter of train.
    assert {name: split.num_samples for name, split in splits.items()} == {
        "train": 6,
        "val": 4,
        "test": 2,
    }
    assert splits["train"].totals.duration_ms == 6 * 300


def test_speech_keeps_original_bytes(tmp_path: Path) -> None:
    src = write_librispeech(tmp_path / "src")
    main(
        [
            *("speech", "--format", "librispeech", "--src", str(src), "--workers", "1"),
            *("--out", str(tmp_path / "out"), "--val-fraction", "0", "--test-fraction", "0"),
            *("--language", "en"),
        ]
    )
    sample = SplitReader(Manifest.load(tmp_path / "out"), "train").read(0)
    number = int(str(sample["__key__"])[-1])
    assert sample["flac"] == audio(number, rate=11_025, fmt="FLAC")
    body = json.loads(sample["json"])
    assert body["text"].encode() == sample["txt"]
    assert (body["duration_s"], body["sample_rate_hz"]) == (0.3, 11_025)
    assert (body["speaker"], body["language"]) == ("19", "en")


def test_sft_members(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(image(1))
    (tmp_path / "q.wav").write_bytes(audio(1))
    conversation = [
        {"from": "human", "value": "<image>\n<audio>"},
        {"from": "gpt", "value": "Yes.", "audio": "q.wav"},
    ]
    record = {"id": "x", "image": "a.png", "audio": "q.wav", "conversations": conversation}
    (tmp_path / "c.json").write_text(json.dumps([record]))
    main(
        [
            *("sft", "--format", "llava", "--src", str(tmp_path / "c.json"), "--workers", "1"),
            *("--out", str(tmp_path / "out"), "--val-fraction", "0", "--test-fraction", "0"),
        ]
    )
    reader = SplitReader(Manifest.load(tmp_path / "out"), "train")
    sample = reader.read(0)
    assert sample["0.png"] == image(1)
    assert sample["1.wav"] == sample["2.wav"] == audio(1)
    assert json.loads(sample["json"])["turns"] == [
        {
            "role": "user",
            "content": [{"type": "image", "name": "0.png"}, {"type": "audio", "name": "1.wav"}],
        },
        {
            "role": "assistant",
            "content": [{"type": "text", "text": "Yes."}, {"type": "audio", "name": "2.wav"}],
        },
    ]
    row = reader.columns[0]
    assert (row["duration_ms"], row["num_images"], row["num_audios"]) == (600, 1, 2)


def test_bad_samples_are_counted_and_listed(tmp_path: Path) -> None:
    src = write_coco(tmp_path / "src", 60)
    images, captions = read_annotations(src)
    (src / "train2017" / images[0]["file_name"]).unlink()
    broken = src / "train2017" / images[1]["file_name"]
    broken.write_bytes(broken.read_bytes()[:60])
    captions[2]["caption"] = ""
    captions[3]["image_id"] = 999
    write_annotations(src, images, captions)
    coco(src, tmp_path / "out", "--max-bad-fraction", "0.2", "--workers", "2")
    manifest = Manifest.load(tmp_path / "out")
    assert manifest.dropped == {
        "broken-image": 1,
        "caption-without-image": 1,
        "empty-text": 2,
        "missing-media": 1,
    }
    assert sum(split.num_samples for split in manifest.splits.values()) == 56
    listed = [
        json.loads(line)
        for path in (tmp_path / "out/quarantine").iterdir()
        for line in path.read_text().splitlines()
    ]
    assert sorted(entry["reason"] for entry in listed) == sorted(
        ["broken-image", "caption-without-image", "empty-text", "empty-text", "missing-media"]
    )
    assert all(entry["key"] and entry["source"] and entry["message"] for entry in listed)


def test_too_many_bad_samples_then_repair(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    src = write_coco(tmp_path / "src", 20)
    victim = src / "train2017/000000000007.png"
    whole = victim.read_bytes()
    victim.write_bytes(b"")
    with pytest.raises(SystemExit) as stop:
        coco(src, tmp_path / "out")
    assert stop.value.code == 3
    error = capsys.readouterr().err
    assert "1 of 20 samples are bad (5.00%), more than --max-bad-fraction 0.01" in error
    assert "000000000007 (captions_train2017.json image 7)" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out/manifest.json").exists()
    victim.write_bytes(whole)
    coco(src, tmp_path / "out")
    assert Manifest.load(tmp_path / "out").dropped == {}
    assert not list((tmp_path / "out/quarantine").glob("*"))


def test_other_options_need_overwrite(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    src = write_coco(tmp_path / "src", 20)
    coco(src, tmp_path / "out")
    before = tree(tmp_path / "out")
    with pytest.raises(SystemExit):
        coco(src, tmp_path / "out", "--seed", "1")
    assert "--overwrite" in capsys.readouterr().err
    assert tree(tmp_path / "out") == before
    (tmp_path / "out/mine.txt").write_text("keep")
    coco(src, tmp_path / "out", "--seed", "1", "--overwrite")
    assert tree(tmp_path / "out") != before
    assert (tmp_path / "out/mine.txt").read_text() == "keep"


def test_overwrite_rejects_foreign_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    src = write_coco(tmp_path / "src", 3)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/precious").write_text("x")
    with pytest.raises(SystemExit):
        coco(src, tmp_path / "out", "--overwrite")
    assert "was not created by data_prep" in capsys.readouterr().err
    assert (tmp_path / "out/precious").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--format", "txt", "--src", "{d}/none.txt"], 3, "none.txt does not exist"),
        (["--format", "txt", "--src", "{d}/empty.txt"], 3, "empty.txt contains no sample for text"),
        (["--format", "csv", "--src", "{d}/empty.txt"], 3, "empty.txt is empty"),
        (
            ["--format", "txt", "--src", "{d}/a.txt", "--val-fraction", "2"],
            2,
            "argument --val-fraction: '2' is not a number of at least 0",
        ),
        (
            ["--format", "txt", "--src", "{d}/a.txt", "--max-bad-fraction", "2"],
            2,
            "argument --max-bad-fraction: '2' is not a number of at least 0",
        ),
        (
            ["--format", "txt", "--src", "{d}/a.txt", "--shard-size", "big"],
            2,
            "'big' is not a number",
        ),
        (["--format", "txt", "--src", "{d}/a.txt", "--array-task", "3/2"], 2, "'3/2' is not I/N"),
        (["--format", "txt", "--src", "{d}/a.txt", "--name", "a/b"], 2, "--name 'a/b'"),
        (["--format", "txt", "--src", "{d}/a.txt", "--out", "{d}/a.txt"], 3, "is a file"),
    ],
)
def test_user_mistakes(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "a.txt").write_text("hello\n")
    before = sorted(tmp_path.iterdir())
    filled = [argument.format(d=tmp_path) for argument in arguments]
    assert message in fails(capsys, code, ["text", "--out", str(tmp_path / "out"), *filled])
    assert sorted(tmp_path.iterdir()) == before


def test_finalize_needs_all_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    src = write_coco(tmp_path / "src", 20)
    coco(src, tmp_path / "out", "--array-task", "0/2")
    capsys.readouterr()
    error = fails(capsys, 3, ["finalize", str(tmp_path / "out")])
    assert "shards of" in error and "not finished" in error
    coco(src, tmp_path / "out", "--array-task", "1/2")
    (tmp_path / "out/manifest.json").unlink()
    main(["finalize", str(tmp_path / "out")])
    assert (tmp_path / "out/manifest.json").exists()


def test_full_disk_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    src = write_coco(tmp_path / "src", 3)

    def fsync(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(SystemExit) as stop:
        coco(src, tmp_path / "out")
    assert stop.value.code == 3
    assert "No space left on device" in capsys.readouterr().err
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


def test_moved_source_is_the_same_source(tmp_path: Path) -> None:
    src = write_coco(tmp_path / "src", 20)
    coco(src, tmp_path / "out")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.tar")}
    src.rename(tmp_path / "elsewhere")
    coco(tmp_path / "elsewhere", tmp_path / "out")
    assert {path: path.stat().st_mtime_ns for path in times} == times
