"""verify finds damage, index adopts foreign tars, stats and inspect show what there is."""

import io
import json
import subprocess
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from data_prep.cli import main
from muomni.data.manifest import Manifest, find_datasets
from muomni.data.shard_reader import SplitReader
from tests.data_prep.raw_corpora import picture, write_coco, write_librispeech


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    out = tmp_path / "out"
    src = write_coco(tmp_path / "src", 20)
    main(
        [
            *("image-caption", "--format", "coco", "--src", str(src), "--out", str(out)),
            *("--shard-size", "8", "--val-fraction", "0.2", "--workers", "1", "--name", "c"),
        ]
    )
    return out


def _verify(capsys: pytest.CaptureFixture[str], *arguments: str) -> str | None:
    """The error line of verify, None when all is sound."""
    capsys.readouterr()
    try:
        main(["verify", "--workers", "1", *arguments])
    except SystemExit as stop:
        assert stop.code == 3
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error
    return None


def test_a_sound_dataset(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _verify(capsys, str(dataset)) is None
    report = dataset.parent / "report.json"
    command = ["verify", "--full", "--decode", "100", "--workers", "2", str(dataset.parent)]
    main([*command, "--json", str(report)])
    assert "20 samples" in capsys.readouterr().out
    assert json.loads(report.read_text())[str(dataset)]["num_decoded"] == 20


def test_damage_is_found(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tar = dataset / "train/c-train-000000.tar"
    whole = tar.read_bytes()

    def with_byte(position: int) -> bytes:
        return whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :]

    tar.write_bytes(whole[:-700])
    assert "c-train-000000.tar has" in str(_verify(capsys, "--quick", str(dataset)))
    for position in (5, 600):
        tar.write_bytes(with_byte(position))
        assert _verify(capsys, "--quick", str(dataset)) is None
        assert "c-train-000000.tar" in str(_verify(capsys, "--full", str(dataset)))
    tar.write_bytes(whole)
    assert _verify(capsys, "--full", str(dataset)) is None


@pytest.mark.parametrize("suffix", ["tar.idx", "cols.npy", "json"])
def test_damaged_sidecars_are_found(
    dataset: Path, capsys: pytest.CaptureFixture[str], suffix: str
) -> None:
    path = dataset / f"train/c-train-000000.{suffix}"
    content = bytearray(path.read_bytes())
    content[-9 if suffix != "json" else 5] ^= 1
    path.write_bytes(content)
    assert "c-train-000000" in str(_verify(capsys, "--full", str(dataset)))
    path.unlink()
    assert "c-train-000000" in str(_verify(capsys, "--quick", str(dataset)))


def _foreign(path: Path, samples: list[tuple[str, dict[str, bytes]]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for key, members in samples:
            for extension, data in members.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size, info.mtime = len(data), 1_700_000_000
                tar.addfile(info, io.BytesIO(data))
    return path


def _pair(number: int) -> tuple[str, dict[str, bytes]]:
    return f"{number:09d}", {"jpg": picture(number), "txt": b"a thing", "json": b'{"key": 1}'}


def test_index_adopts_without_touching_the_tars(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "laion"
    tar = _foreign(root / "00000.tar", [_pair(n) for n in range(5)])
    held_out = _foreign(root / "val/00001.tar", [_pair(n) for n in range(5, 8)])
    before = tar.read_bytes(), tar.stat().st_mtime_ns
    main(["index", str(root), "--task", "image-caption"])
    assert (tar.read_bytes(), tar.stat().st_mtime_ns) == before
    (manifest,) = find_datasets(tmp_path, "image-caption")
    assert {name: split.num_samples for name, split in manifest.splits.items()} == {
        "train": 5,
        "val": 3,
    }
    reader = SplitReader(manifest, "val")
    assert reader.read(1)["__key__"] == "000000006"
    assert reader.columns["num_pixels"].tolist() == [24 * 18] * 3
    assert (held_out.parent / "00001.tar.idx").exists()
    main(["verify", "--full", "--decode", "100", "--workers", "1", str(root)])


def test_index_of_gnu_tar(tmp_path: Path) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    for number in range(3):
        (folder / f"d{number}.txt").write_text(f"document {number}")
    (tmp_path / "set").mkdir()
    tar = tmp_path / "set/a.tar"
    subprocess.run(["tar", "--sort=name", "-cf", tar, "."], cwd=folder, check=True)
    main(["index", str(tmp_path / "set"), "--task", "text"])
    reader = SplitReader(Manifest.load(tmp_path / "set"), "train")
    assert [reader.read(index)["txt"] for index in range(3)] == [
        f"document {number}".encode() for number in range(3)
    ]


def test_index_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def error(*arguments: str) -> str:
        with pytest.raises(SystemExit) as stop:
            main(["index", *arguments])
        assert stop.value.code == 3
        return capsys.readouterr().err

    root = tmp_path / "set"
    assert "does not exist" in error(str(root), "--task", "text")
    root.mkdir()
    assert "holds no *.tar" in error(str(root), "--task", "text")
    _foreign(root / "a.tar", [_pair(1), ("x", {"txt": b"alone"})])
    text = error(str(root), "--task", "image-caption")
    assert "1 of 2 samples" in text and "'x' in" in text and "no picture" in text
    assert not (root / "manifest.json").exists()
    (root / "a.json").write_text('{"img2dataset": 1}')
    assert "written by another tool" in error(str(root), "--task", "image-caption")
    (root / "a.json").unlink()
    (root / "a.tar").write_bytes((root / "a.tar").read_bytes()[:1500])
    assert "truncated" in error(str(root), "--task", "image-caption")


def test_stats(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    main(["stats", "--json", str(dataset)])
    figures = json.loads(capsys.readouterr().out)[str(dataset)]
    assert sum(split["num_samples"] for split in figures.values()) == 20
    assert figures["train"]["num_repeated"] == 0
    main(["stats", str(dataset)])
    assert "left out: nothing" in capsys.readouterr().out


def test_inspect(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    main(["inspect", str(dataset), "--count", "4", "--png", str(tmp_path / "sheet.png")])
    assert capsys.readouterr().out.count("thing number") == 4
    assert Image.open(tmp_path / "sheet.png").size == (256, 256)
    src = write_librispeech(tmp_path / "speech-src")
    command = ["speech", "--format", "librispeech", "--src", str(src), "--workers", "1"]
    main([*command, "--out", str(tmp_path / "speech"), "--val-fraction", "0"])
    main(["inspect", str(tmp_path / "speech"), "--png", str(tmp_path / "speech.png")])
    assert "hello chapter" in capsys.readouterr().out
    assert len(set(Image.open(tmp_path / "speech.png").convert("L").tobytes())) > 50
    with pytest.raises(SystemExit) as stop:
        main(["inspect", str(dataset), "--png", str(tmp_path / "sheet.gif")])
    assert stop.value.code == 2
    assert "sheet.gif must end in .png" in capsys.readouterr().err
