"""dedup keeps the first of several duplicates and masks training samples that occur in val or test."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.cli.main import main
from data_prep.curation.dedup import _groups
from muomni.data.shards.manifest import Manifest
from muomni.data.shards.reader import SplitReader
from muomni.data.shards.writer import SampleCost
from tests.corpora import sentences, write_dataset
from tests.data_prep.curation.test_near_duplicates import _drawing, _encoded
from tests.data_prep.raw_corpora import image


def _texts(root: Path, **splits: list[str]) -> Path:
    write_dataset(
        root,
        "text",
        {
            split: [
                (f"{split}-{n}", [("txt", text.encode())], SampleCost(num_chars=len(text)))
                for n, text in enumerate(texts)
            ]
            for split, texts in splits.items()
        },
    )
    return root


def _images(root: Path, **splits: list[tuple[bytes, str]]) -> Path:
    write_dataset(
        root,
        "image-caption",
        {
            split: [
                (f"{split}-{n}", [("png", data), ("txt", text.encode())], SampleCost())
                for n, (data, text) in enumerate(samples)
            ]
            for split, samples in splits.items()
        },
    )
    return root


def _masks(root: Path) -> dict[str, list[int]]:
    found = {}
    for path in sorted((root / "exclude").glob("*.json")):
        mask = json.loads(path.read_text())
        assert mask["split"] == "train" and mask["reason"]
        ids = np.load(path.parent / mask["ids_file"])
        assert ids.dtype == np.uint64 and len(ids) == mask["num_ids"]
        found[path.stem] = ids.tolist()
    return found


def _dedup(*arguments: object) -> None:
    main(["dedup", "--workers", "1", *map(str, arguments)])


def test_equal_texts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = _texts(
        tmp_path / "t",
        train=["A dog.", "a  DOG", "A cat.", "!?", "seen", "!?", "?!", "Seen!"],
        val=["SEEN"],
        test=["bird", "bird"],
    )
    tars = {path: path.read_bytes() for path in root.rglob("*.tar")}
    _dedup(root, "--dry-run")
    shown = capsys.readouterr().out
    assert "8 training samples, 2 duplicates, 2 in val or test" in shown
    assert '"key": "train-7", "like": {"dataset": "t", "split": "val", "id": 0' in shown
    assert not (root / "exclude").exists()
    _dedup(root)
    assert _masks(root) == {"dedup-repeats": [1, 5], "dedup-leakage": [4, 7]}
    assert {path: path.read_bytes() for path in root.rglob("*.tar")} == tars
    _dedup(root, "--content-only")
    assert _masks(root) == {"dedup-repeats": [5]}
    main(["verify", "--workers", "1", str(root)])


def test_datasets_are_compared_in_given_order(tmp_path: Path) -> None:
    one = _texts(tmp_path / "one", train=["alpha", "beta"], val=["gamma"])
    two = _texts(tmp_path / "two", train=["beta", "gamma", "delta"], val=["alpha"])
    _dedup(two, one, "--json", tmp_path / "report.json")
    assert _masks(two) == {"dedup-leakage": [1]}
    assert _masks(one) == {"dedup-leakage": [0], "dedup-repeats": [1]}
    report = json.loads((tmp_path / "report.json").read_text())
    assert [line["like"]["dataset"] for line in report[str(one)]] == ["two", "two"]
    assert {line["by"] for lines in report.values() for line in lines} == {"content"}
    lines = (one / "exclude/dedup.report.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == [0, 1]


def test_captions_may_repeat_but_images_must_not_leak(tmp_path: Path) -> None:
    root = _images(
        tmp_path / "p",
        train=[
            (image(1), "a thing"),
            (image(2), "a thing"),
            (image(1), "another name"),
            (image(1), "A thing!"),
            (image(3), "a third"),
        ],
        test=[(image(3), "other words")],
    )
    _dedup(root)
    assert _masks(root) == {"dedup-repeats": [3], "dedup-leakage": [4]}


def test_near_duplicate_images_and_texts(tmp_path: Path) -> None:
    drawings = [_drawing(seed) for seed in range(4)]
    train = [(_encoded(drawing), f"drawing {n}") for n, drawing in enumerate(drawings)]
    train += [(_encoded(drawings[0].resize((120, 120))), "small"), (b"broken", "none")]
    root = _images(
        tmp_path / "p", train=train, test=[(_encoded(drawings[2], "PNG", compress_level=1), "x")]
    )
    long = [" ".join(sentences(20, seed)) for seed in range(5)]
    texts = _texts(tmp_path / "t", train=[*long, long[1].replace(" the ", " that ", 1)])
    _dedup(root, texts)
    assert _masks(root) == _masks(texts) == {}
    _dedup(root, texts, "--near")
    assert _masks(root) == {"dedup-repeats": [4], "dedup-leakage": [2]}
    assert _masks(texts) == {"dedup-repeats": [5]}
    report = (root / "exclude/dedup.report.jsonl").read_text()
    assert '"by": "image", "bits": 0' in report
    _dedup(texts, "--near", "--min-similarity", "1")
    assert _masks(texts) == {}


def test_several_shards_and_workers(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("".join(f"line {n % 40}\n" for n in range(100)))
    command = ["text", "--format", "txt", "--src", str(tmp_path / "t.txt"), "--shard-size", "30"]
    main([*command, "--out", str(tmp_path / "out"), "--workers", "1", "--test-fraction", "0"])
    main(["dedup", str(tmp_path / "out"), "--workers", "2"])
    reader = SplitReader(Manifest.load(tmp_path / "out"), "train")
    excluded = set(_masks(tmp_path / "out")["dedup-repeats"])
    kept = [reader.read(n)["txt"] for n in range(len(reader)) if n not in excluded]
    everything = [reader.read(n)["txt"] for n in range(len(reader))]
    assert kept == list(dict.fromkeys(everything))


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 29), st.integers(0, 29)), max_size=40))
def test_groups(pairs: list[tuple[int, int]]) -> None:
    labels = list(range(30))
    for one, other in pairs:
        low, high = sorted((labels[one], labels[other]))
        labels = [low if label == high else label for label in labels]
    assert _groups(30, np.array(pairs, int).reshape(-1, 2)).tolist() == labels


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--near", "--content-only"], 2, "cannot be used with --content-only"),
        (["--max-distance", "40"], 2, "--max-distance must be between 0 and 16 bits, got 40"),
        (["--min-similarity", "0.1"], 2, "--min-similarity must be between 0.5 and 1, got 0.1"),
        (["{root}"], 3, "listed twice"),
    ],
)
def test_invalid_options(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    root = _texts(tmp_path / "t", train=["a"])
    with pytest.raises(SystemExit) as stop:
        _dedup(root, *(text.format(root=root) for text in arguments))
    assert stop.value.code == code
    assert message in capsys.readouterr().err
