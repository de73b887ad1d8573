"""verify finds damage, index adopts existing tars, and stats and inspect show the content."""

import io
import json
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.cli.main import main
from data_prep.curation.exclude import write_mask
from muomni.data.shards.manifest import Manifest, find_datasets
from muomni.data.shards.reader import SplitReader
from tests.corpora import write_tokenizer
from tests.data_prep.raw_corpora import image, write_coco, write_librispeech


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
    """The error line of verify, or None without problems."""
    capsys.readouterr()
    try:
        main(["verify", "--workers", "1", *arguments])
    except SystemExit as stop:
        assert stop.code == 3
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error
    return None


def test_valid_dataset(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _verify(capsys, str(dataset)) is None
    report = dataset.parent / "report.json"
    command = ["verify", "--full", "--decode", "100", "--workers", "2", str(dataset.parent)]
    main([*command, "--json", str(report)])
    assert "20 samples" in capsys.readouterr().out
    assert json.loads(report.read_text())[str(dataset)]["num_decoded"] == 20


def test_damage_is_detected(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
def test_damaged_sidecars_are_detected(
    dataset: Path, capsys: pytest.CaptureFixture[str], suffix: str
) -> None:
    path = dataset / f"train/c-train-000000.{suffix}"
    content = bytearray(path.read_bytes())
    content[-9 if suffix != "json" else 5] ^= 1
    path.write_bytes(content)
    assert "c-train-000000" in str(_verify(capsys, "--full", str(dataset)))
    path.unlink()
    assert "c-train-000000" in str(_verify(capsys, "--quick", str(dataset)))


def test_verify_reports_unlisted_tars(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stray = dataset / "train/c-train-000009.tar"
    stray.write_bytes((dataset / "train/c-train-000000.tar").read_bytes())
    assert "c-train-000009.tar is not in the manifest" in str(_verify(capsys, str(dataset)))
    stray.unlink()
    index = dataset / "train/c-train-000001.tar.idx"
    offsets = np.fromfile(index, "<u8")
    (offsets - np.uint64(512) * (offsets == offsets[-1])).tofile(index)
    assert "continues" in str(_verify(capsys, str(dataset)))


def test_all_problems_are_reported(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in (0, 1):
        tar = dataset / f"train/c-train-00000{number}.tar"
        content = bytearray(tar.read_bytes())
        content[5] ^= 1
        tar.write_bytes(content)
    report = dataset.parent / "reports/verify.json"
    _verify(capsys, "--full", "--json", str(report), str(dataset))
    problems = json.loads(report.read_text())[str(dataset)]["problems"]
    for number in (0, 1):
        own = [text for text in problems if f"c-train-00000{number}.tar" in text]
        assert [sum(word in text for text in own) for word in ("SHA-256", "checksum")] == [1, 1]
    with pytest.raises(SystemExit) as stop:
        main(["verify", "--decode", "101", str(dataset)])
    assert stop.value.code == 2


def _flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def test_quarantine_masks_changed_samples(
    dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tar = dataset / "train/c-train-000001.tar"
    offsets = np.fromfile(f"{tar}.idx", "<u8")
    first = Manifest.load(dataset).split("train").shards[0].num_samples
    _flip(tar, int(offsets[2]) + 530)  # in the image
    _flip(tar, int(offsets[4]) + 5)  # in a header
    arguments = ("--full", "--decode", "100", "--quarantine", str(dataset))
    # The changed file stays a problem.
    assert "SHA-256" in str(_verify(capsys, *arguments))
    mask = np.load(dataset / "exclude/verify-train.npy")
    assert mask.tolist() == [first + 2, first + 4]
    report = dataset.parent / "report.json"
    _verify(capsys, *arguments, "--json", str(report))
    written = json.loads(report.read_text())[str(dataset)]
    assert written["bad_samples"] == {"train": [first + 2, first + 4]}
    assert len(written["excluded"]) == 2 and "has changed" in written["excluded"][0]
    assert all("has changed" not in text for text in written["problems"])


def test_quarantine_masks_what_does_not_decode(
    dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (dataset / "train").glob("*.cols.npy"):  # sizes of another image
        columns = np.load(path)
        columns["num_pixels"][:1] += 1
        np.save(path, columns)
    counts = [shard.num_samples for shard in Manifest.load(dataset).split("train").shards]
    expected = [0, counts[0], counts[0] + counts[1]]
    # A check of one percent adds to the mask, and a complete one replaces it.
    assert "num_pixels" in str(_verify(capsys, "--decode", "100", str(dataset)))
    assert _verify(capsys, "--decode", "100", "--quarantine", str(dataset)) is None
    assert "ok, 3 problems of samples under a mask" in capsys.readouterr().out
    assert _verify(capsys, "--decode", "100", str(dataset)) is None
    mask = dataset / "exclude/verify-train.npy"
    assert np.load(mask).tolist() == expected
    assert _verify(capsys, "--decode", "0.001", "--quarantine", str(dataset)) is None
    assert np.load(mask).tolist() == expected
    assert not (dataset / "exclude/verify-val.npy").exists()
    assert "SHA-256" in str(_verify(capsys, "--full", str(dataset)))


def test_quarantine_without_bad_samples(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_mask(Manifest.load(dataset), "verify-train", "train", np.array([3]), "earlier")
    assert _verify(capsys, "--full", "--decode", "1", "--quarantine", str(dataset)) is None
    assert (dataset / "exclude/verify-train.npy").exists()
    assert _verify(capsys, "--full", "--decode", "100", "--quarantine", str(dataset)) is None
    assert not (dataset / "exclude/verify-train.npy").exists()


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
    return f"{number:09d}", {"jpg": image(number), "txt": b"a thing", "json": b'{"key": 1}'}


def test_index_does_not_change_tars(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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


def test_index_rejects(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def error(*arguments: str) -> str:
        with pytest.raises(SystemExit) as stop:
            main(["index", *arguments])
        assert stop.value.code == 3
        return capsys.readouterr().err

    root = tmp_path / "set"
    assert "does not exist" in error(str(root), "--task", "text")
    root.mkdir()
    assert "contains no *.tar" in error(str(root), "--task", "text")
    _foreign(root / "a.tar", [_pair(1), ("x", {"txt": b"alone"})])
    text = error(str(root), "--task", "image-caption")
    assert "1 of 2 samples" in text and "'x' in" in text and "no image" in text
    assert not (root / "manifest.json").exists()
    (root / "a.json").write_text('{"img2dataset": 1}')
    assert "written by another tool" in error(str(root), "--task", "image-caption")
    (root / "a.json").unlink()
    (root / "a.tar").write_bytes((root / "a.tar").read_bytes()[:1500])
    assert "truncated" in error(str(root), "--task", "image-caption")


def test_stats(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    main(["stats", "--json", str(dataset)])
    metrics = json.loads(capsys.readouterr().out)[str(dataset)]
    assert sum(split["num_samples"] for split in metrics.values()) == 20
    assert metrics["train"]["num_repeated"] == 0
    main(["stats", str(dataset)])
    assert "bad: none" in capsys.readouterr().out


def test_inspect_images(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    main(["inspect", str(dataset), "--count", "5", "--png", str(tmp_path / "sheet.png")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["id", "key", "members", "seconds", "pixels", "text"]
    assert sum("thing number" in line for line in lines) == 5
    assert len({line.index("thing") for line in lines[1:6]}) == 1
    shown = Image.open(tmp_path / "sheet.png")
    # Two rows of four; the center of a tile has the color of its image.
    key = str(SplitReader(Manifest.load(dataset), "train").read(4)["__key__"])
    height = shown.height // 2
    color = Image.open(io.BytesIO(image(int(key)))).convert("RGB").getpixel((0, 0))
    assert shown.getpixel((78, height + 78)) == color


def test_inspect_audio_clips(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    src = write_librispeech(tmp_path / "speech-src")
    command = ["speech", "--format", "librispeech", "--src", str(src), "--workers", "1"]
    main([*command, "--out", str(tmp_path / "speech"), "--val-fraction", "0"])
    main(["inspect", str(tmp_path / "speech"), "--count", "2", "--png", str(tmp_path / "s.png")])
    assert "hello chapter" in capsys.readouterr().out
    image = np.asarray(Image.open(tmp_path / "s.png").convert("RGB")).astype(int)
    height = len(image) // 2
    # A tone of about 200 Hz is in the lowest rows of the spectrogram.
    mel = image[13 + 64 : 13 + 64 + 96, 100:500].sum(axis=2)
    assert mel[80:].mean() > mel[:20].mean() + 200
    # The waveform covers the middle 30 % of its height.
    wave = (image[13 : 13 + 64, 100:500] == (40, 90, 160)).all(axis=2).mean(axis=1)
    assert wave[25:39].min() > 0.15 and wave[:18].max() == wave[46:].max() == 0
    assert height > 13 + 64 + 96


def test_broken_media_are_shown_as_error_message(tmp_path: Path) -> None:
    _foreign(tmp_path / "set/a.tar", [_pair(1), ("b", {"jpg": b"no", "txt": b"\xff"})])
    main(["index", str(tmp_path / "set"), "--task", "image-caption", "--max-bad-fraction", "1"])
    main(["inspect", str(tmp_path / "set"), "--png", str(tmp_path / "sheet.png")])
    pixels = np.asarray(Image.open(tmp_path / "sheet.png").convert("RGB"))
    assert ((pixels[..., 0] > 200) & (pixels[..., 1:] < 120).all(axis=2)).sum() > 20


def test_inspect_data_root(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "t.txt").write_text("".join(f"some words {n}\n" for n in range(60)))
    for name in ("one", "two"):
        command = ["text", "--format", "txt", "--src", str(tmp_path / "t.txt"), "--workers", "1"]
        command += ["--val-fraction", "0", "--test-fraction", "0"]
        main([*command, "--out", str(tmp_path / name)])
    main(["inspect", str(tmp_path)])
    out = capsys.readouterr().out
    assert "no tokenizer.model" in out
    rows = [line.split() for line in out.splitlines()]
    assert ["text", "(all)", "120"] in [row[:3] for row in rows]
    assert [row[3] for row in rows if row[:2] == ["text", "two"]] == ["50.0%"]
    write_tokenizer(tmp_path / "tokenizer.model")
    main(["inspect", str(tmp_path)])
    row = next(line for line in capsys.readouterr().out.splitlines() if "(all)" in line)
    assert 100 < int(row.split()[-1].replace(",", "")) < 2000
    with pytest.raises(SystemExit) as stop:
        main(["inspect", str(tmp_path), "--png", "x.png"])
    assert stop.value.code == 2
    with pytest.raises(SystemExit) as stop:
        main(["inspect", str(dataset), "--png", str(tmp_path / "sheet.gif")])
    assert stop.value.code == 2
    assert "sheet.gif must end in .png" in capsys.readouterr().err
