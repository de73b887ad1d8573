"""retry-bad adds repaired samples as new shards, and everything else keeps its bytes."""

import json
from pathlib import Path
from typing import Any

import pytest

from data_prep.cli.main import main
from data_prep.sharding import retry
from data_prep.sharding.plan_file import load_plan_file
from muomni.data.shards.manifest import Manifest
from muomni.data.shards.reader import SplitReader
from tests.data_prep.raw_corpora import image, write_coco, write_ljspeech


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """COCO with 30 images, three of them broken and one missing."""
    src = write_coco(tmp_path / "src", 30)
    for number in (3, 11, 20):
        _path(src, number).write_bytes(image(number)[:60])
    _path(src, 25).unlink()
    return src


def _path(src: Path, number: int) -> Path:
    return src / f"train2017/{number:012d}.png"


def _shard(src: Path, out: Path) -> Path:
    arguments = ["image-caption", "--format", "coco", "--src", str(src), "--out", str(out)]
    arguments += ["--name", "c", "--shard-size", "5", "--val-fraction", "0.2", "--workers", "1"]
    main([*arguments, "--max-bad-fraction", "0.2", "--test-fraction", "0"])
    return out


def _retry(out: Path, *options: str) -> None:
    main(["retry-bad", str(out), "--workers", "1", *options])


def _verify(out: Path) -> None:
    main(["verify", "--full", "--decode", "100", "--workers", "1", str(out)])


def _tars(out: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in out.rglob("*.tar*")}


def _keys(out: Path, split: str) -> list[int]:
    reader = SplitReader(Manifest.load(out), split)
    return [int(reader.read(index)["__key__"]) for index in range(len(reader))]


def _listed(out: Path) -> list[int]:
    lines = [line for path in (out / "quarantine").glob("*") for line in path.open()]
    return sorted(int(json.loads(line)["key"]) for line in lines)


def test_repaired_samples_are_added(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = _shard(corpus, tmp_path / "out")
    before, train, val = _tars(out), _keys(out, "train"), _keys(out, "val")
    for number in (3, 25):
        _path(corpus, number).write_bytes(image(number))
    _retry(out)
    assert "2 of 4 samples are valid now" in capsys.readouterr().out
    after = _tars(out)
    assert {path: after[path] for path in before} == before
    assert _keys(out, "train")[: len(train)] == train and _keys(out, "val")[: len(val)] == val
    assert sorted(_keys(out, "train") + _keys(out, "val")) == [
        number for number in range(1, 31) if number not in (11, 20)
    ]
    manifest = Manifest.load(out)
    assert manifest.dropped == {"broken-image": 2}
    assert sum(s.num_planned for split in manifest.splits.values() for s in split.shards) == 30
    assert "Bad: broken-image: 2" in (out / "README.md").read_text()
    assert _listed(out) == [11, 20]
    _verify(out)
    # A second round retries those that failed again.
    _path(corpus, 11).write_bytes(image(11))
    _retry(out)
    assert _listed(out) == [20] and Manifest.load(out).dropped == {"broken-image": 1}
    _verify(out)


def test_splits_match_a_fresh_run(corpus: Path, tmp_path: Path) -> None:
    out = _shard(corpus, tmp_path / "out")
    for number in (3, 11, 20, 25):
        _path(corpus, number).write_bytes(image(number))
    _retry(out)
    fresh = _shard(corpus, tmp_path / "fresh")
    for split in ("train", "val"):
        assert sorted(_keys(out, split)) == sorted(_keys(fresh, split))
    assert not list((out / "quarantine").glob("*"))


def test_retry_without_repairs_changes_nothing(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = _shard(corpus, tmp_path / "out")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    _retry(out)
    assert "0 of 4 samples are valid now" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_original_command_still_continues(corpus: Path, tmp_path: Path) -> None:
    out = _shard(corpus, tmp_path / "out")
    _path(corpus, 3).write_bytes(image(3))
    _retry(out)
    before, fingerprint = _tars(out), Manifest.load(out).fingerprint
    _shard(corpus, out)
    assert (_tars(out), Manifest.load(out).fingerprint) == (before, fingerprint)
    next(iter(out.rglob("*-000000.tar"))).unlink()
    _shard(corpus, out)
    assert (_tars(out), Manifest.load(out).fingerprint) == (before, fingerprint)
    _verify(out)


@pytest.mark.parametrize("step", ["write_plan_file", "_update_listing", "finalize"])
def test_killed_retry_is_completed(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    out = _shard(corpus, tmp_path / "out")
    _path(corpus, 3).write_bytes(image(3))
    update_listing = retry._update_listing

    def stop(*arguments: Any) -> None:
        # The first update belongs to earlier retries.
        plan = load_plan_file(out)
        if step == "_update_listing" and plan is not None and not plan.retries:
            update_listing(*arguments)
            return
        raise KeyboardInterrupt

    monkeypatch.setattr(retry, step, stop)
    with pytest.raises(SystemExit):
        _retry(out)
    monkeypatch.undo()
    # Training reads either the old or the new dataset.
    assert len(_keys(out, "train")) + len(_keys(out, "val")) == 26
    _retry(out)
    assert len(_keys(out, "train")) + len(_keys(out, "val")) == 27
    assert _listed(out) == [11, 20, 25]
    _verify(out)


def test_repaired_row_is_found_by_position(tmp_path: Path) -> None:
    src = write_ljspeech(tmp_path / "src", [f"Sentence {number}." for number in range(6)])
    table = src / "metadata.csv"
    whole = table.read_text()
    table.write_text(whole.replace("LJ-0002|", "LJ-0002||||"))
    arguments = ["tts", "--format", "ljspeech", "--src", str(src), "--out", str(tmp_path / "out")]
    arguments += ["--val-fraction", "0", "--test-fraction", "0", "--max-bad-fraction", "0.5"]
    main([*arguments, "--speaker", "s", "--workers", "1"])
    table.write_text(whole)
    (tmp_path / "src").rename(tmp_path / "moved")
    _retry(tmp_path / "out", "--src", str(tmp_path / "moved"))
    reader = SplitReader(Manifest.load(tmp_path / "out"), "train")
    sample = reader.read(5)
    assert sample["__key__"] == "LJ-0002"
    assert json.loads(sample["json"])["speaker"] == "s"
    assert not list((tmp_path / "out/quarantine").glob("*"))


def test_retry_errors(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def error() -> str:
        with pytest.raises(SystemExit) as stop:
            _retry(tmp_path / "out")
        assert stop.value.code == 3
        return capsys.readouterr().err

    assert "has no shard_plan.json" in error()
    out = _shard(corpus, tmp_path / "out")
    listing = next(iter((out / "quarantine").glob("*")))
    listing.write_text('{"key": "x"}\n')
    assert "is damaged" in error()
    next(iter(out.rglob("*-000000.json"))).unlink()
    assert "are not finished" in error()
