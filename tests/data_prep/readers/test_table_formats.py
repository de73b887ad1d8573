"""The command converts every registered format to a valid dataset, and the docs list all formats."""

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import soundfile

from data_prep.cli.main import main
from data_prep.readers import READERS
from muomni.data.shards.manifest import TASKS, Manifest, Task
from muomni.data.shards.reader import SplitReader
from tests.data_prep.chat_layouts import write_sharegpt
from tests.data_prep.corpus_files import NUM_SAMPLES, TEXTS
from tests.data_prep.public_layouts import LAYOUTS, write_image_parquet
from tests.data_prep.speech_layouts import write_libritts, write_nemo

ROOT = Path(__file__).resolve().parents[3]
FORMATS = [(task, name) for task in TASKS for name in sorted(READERS[task])]


@pytest.mark.parametrize(("task", "name"), FORMATS)
def test_format_becomes_valid_dataset(tmp_path: Path, task: Task, name: str) -> None:
    (tmp_path / "src").mkdir()
    src = LAYOUTS[task][name](tmp_path / "src")
    out = tmp_path / "out"
    main([task, "--format", name, "--src", str(src), "--out", str(out), "--workers", "1"])
    manifest = Manifest.load(out)
    num_samples = sum(split.num_samples for split in manifest.splits.values())
    assert num_samples >= NUM_SAMPLES
    assert manifest.dropped == {}
    assert manifest.reader == name
    main(["verify", "--full", "--decode", "100", "--workers", "1", str(out)])


@pytest.mark.parametrize(("task", "name"), FORMATS)
def test_missing_corpus_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], task: str, name: str
) -> None:
    missing = tmp_path / "nothing/here"
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as stop:
        main([task, "--format", name, "--src", str(missing), "--out", str(out), "--workers", "1"])
    assert stop.value.code == 3
    error = capsys.readouterr().err
    assert str(missing) in error
    assert "--src" in error
    assert error.count("\n") == 1
    assert not out.exists()


def _samples(task: str, src: Path, name: str, *options: str) -> list[dict[str, bytes | str]]:
    """Shard everything into train, and read the samples in key order."""
    out = src.parent / f"{name}-out"
    main(
        [
            *(task, "--format", name, "--src", str(src), "--out", str(out), "--workers", "1"),
            *("--val-fraction", "0", "--test-fraction", "0", *options),
        ]
    )
    reader = SplitReader(Manifest.load(out), "train")
    samples = [reader.read(index) for index in range(len(reader))]
    return sorted(samples, key=lambda sample: str(sample["__key__"]))


def test_segments_reach_the_shards(tmp_path: Path) -> None:
    samples = _samples("speech", write_nemo(tmp_path / "src"), "nemo")
    facts = [json.loads(sample["json"]) for sample in samples]
    assert [fact["duration_s"] for fact in facts] == [0.5] * 6 + [0.3]
    assert [fact["text"] for fact in facts] == [*TEXTS, "Whole file."]
    whole, rate = soundfile.read(tmp_path / "src/long.wav", dtype="int16")
    parts = [_decode(sample["flac"]) for sample in samples[:6]]
    np.testing.assert_array_equal(np.concatenate(parts), whole[: 3 * rate])
    assert samples[6]["wav"] == (tmp_path / "src/short.wav").read_bytes()


def _decode(data: bytes | str) -> np.ndarray:
    assert isinstance(data, bytes)
    return soundfile.read(io.BytesIO(data), dtype="int16")[0]


def test_libritts_original_text(tmp_path: Path) -> None:
    src = write_libritts(tmp_path / "src")
    samples = _samples("tts", src, "libritts", "--text", "original", "--subsets", "dev-clean")
    assert samples[0]["txt"] == b"Sentence No. 0."


def test_several_media_per_turn_reach_the_shards(tmp_path: Path) -> None:
    samples = _samples("sft", write_sharegpt(tmp_path / "src"), "sharegpt")
    content = json.loads(samples[0]["json"])["turns"][0]["content"]
    assert [part.get("name", "text") for part in content] == ["0.png", "1.png", "text", "2.wav"]
    assert {"0.png", "1.png", "2.wav"} <= samples[0].keys()


def test_parquet_shards_do_not_depend_on_workers(tmp_path: Path) -> None:
    src = write_image_parquet(tmp_path / "src")
    for workers in ("1", "2"):
        out = str(tmp_path / f"out{workers}")
        arguments = ["--src", str(src), "--out", out, "--workers", workers, "--shard-size", "2"]
        main(["image-caption", "--format", "parquet", "--name", "x", *arguments])
    prints = {Manifest.load(tmp_path / f"out{workers}").fingerprint for workers in "12"}
    assert len(prints) == 1


def test_guide_shows_the_actual_reader() -> None:
    guide = (ROOT / "docs/add_a_corpus.md").read_text()
    (code,) = re.findall(r"```python\n(\"\"\"CMU.*?)```", guide, re.DOTALL)
    assert code == (ROOT / "data_prep/readers/arctic.py").read_text()


def test_docs_list_all_formats() -> None:
    lines = (ROOT / "docs/data.md").read_text().splitlines()
    for task, formats in READERS.items():
        (row,) = [
            line for line in lines if line.startswith("|") and f"`{task}`" in line.split("|")[1]
        ]
        listed = set(re.findall(r"[a-z0-9]+", row.split("|", 2)[2]))
        assert set(formats) <= listed, task
