"""Each stage writes its sample outputs from its export, and the run's recorders get them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from PIL import Image

from muomni.config.run import RunConfig
from muomni.data.media.audio import read_audio
from muomni.data.shards.source import Source
from muomni.distributed.discovery import discover
from muomni.errors import DataError
from muomni.inference.samples import record_samples, write_samples
from muomni.observe.recorder import Kind, RunInfo, Status
from muomni.run_folder import RunFolder
from muomni.training.session import Request, prepare
from tests.corpora import write_text_dataset, write_tokenizer
from tests.evaluation.runs import untrained_export
from tests.media_corpora import WORDS, write_image_dataset, write_speech_dataset
from tests.training.runs import thinker_config
from tests.training.stages.curves import stage_config
from tests.training.stages.sft.omni_runs import omni_run, write_root


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("media")
    write_speech_dataset(root / "speech", num_train=8, num_val=5)
    write_speech_dataset(root / "tts", num_train=4, num_val=2, task="tts")
    write_image_dataset(root / "images")
    write_tokenizer(root / "tokenizer.model")
    return root


@pytest.fixture(scope="module")
def omni(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_root(tmp_path_factory.mktemp("omni"))


def _samples(config: RunConfig, run: Path, upstream: Path) -> tuple[Path, Source, list[str]]:
    """Write samples of an untrained export; returns their folder, the split, and the kinds of files."""
    untrained_export(config, run, upstream)
    session = prepare(Request(config, run, upstream, {}, "never"), discover({}))
    assert session.val is not None
    folder = RunFolder(run, config.stage)
    artifacts = write_samples(session.stage, session.val, folder)
    outputs = [artifact for artifact in artifacts if artifact.path.parent == folder.samples]
    inputs = folder.samples / "inputs"
    assert all(artifact.path.parent == inputs for artifact in artifacts if artifact not in outputs)
    return folder.samples, session.val, [artifact.kind for artifact in outputs]


def _rows(folder: Path, stage: str) -> list[dict[str, Any]]:
    table = json.loads((folder / f"{stage}.json").read_text())
    return [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]


def _image(folder: Path, cell: dict[str, str]) -> np.ndarray:
    """The pixels of a cell of a table, whose file MLflow has in a folder of its kind."""
    assert cell["type"] == "image" and cell["filepath"] == cell["compressed_filepath"]
    assert cell["filepath"].startswith("samples/inputs/image/")
    return np.asarray(Image.open(folder / "inputs" / Path(cell["filepath"]).name))


def test_thinker_continues_the_first_half_of_texts(tmp_path: Path) -> None:
    write_text_dataset(tmp_path / "data" / "text")
    write_tokenizer(tmp_path / "data" / "tokenizer.model")
    folder, source, kinds = _samples(thinker_config(tmp_path / "data"), tmp_path, tmp_path)
    assert kinds == ["text", "table"]
    rows = _rows(folder, "thinker")
    text = source.read(0)["txt"].decode()
    assert len(rows) == 8 and rows[0]["generated"]
    # Both parts are cut between tokens, and the beginning of a long text only.
    assert text.startswith(rows[0]["text"]) and rows[0]["continues"] in text
    assert (
        len(rows[0]["text"]) > 10 and abs(len(rows[0]["text"]) / len(rows[0]["continues"]) - 1) < 1
    )


def test_audio_encoder_writes_transcripts_and_their_audio(media: Path, tmp_path: Path) -> None:
    folder, source, kinds = _samples(stage_config("audio_encoder", media), tmp_path, tmp_path)
    assert kinds == ["text", "table"]
    rows = _rows(folder, "audio_encoder")
    assert len(rows) == 5
    assert {word for row in rows for word in row["reference"].split()} <= set(WORDS)
    heard, rate_hz = soundfile.read(folder / rows[1]["audio"])
    original = read_audio(source.read(1))
    assert rate_hz == 16_000 and np.abs(heard - np.clip(original, -1, 1)).max() < 1e-4


def test_vision_encoder_writes_nearest_captions_and_images(media: Path, tmp_path: Path) -> None:
    folder, _, kinds = _samples(stage_config("vision_encoder", media), tmp_path, tmp_path)
    assert kinds == ["text", "table"]
    row = _rows(folder, "vision_encoder")[0]
    assert list(row) == ["image", "caption", "nearest captions", "image 1", "image 2", "image 3"]
    assert " | " in row["nearest captions"] and "circle" in row["caption"] + row["nearest captions"]
    assert _image(folder, row["image"]).shape == _image(folder, row["image 3"]).shape == (32, 32, 3)
    assert "image 2:          inputs/vision_encoder_" in (folder / "vision_encoder.txt").read_text()


def test_codec_writes_spectrograms_and_sounds_of_the_right_length(
    media: Path, tmp_path: Path
) -> None:
    folder, source, kinds = _samples(stage_config("codec", media), tmp_path, tmp_path)
    assert kinds == ["image", "audio"] * 2 + ["text", "table"]
    rows = _rows(folder, "codec")
    original = read_audio(source.read(0))
    sound, rate_hz = soundfile.read(folder / rows[0]["reconstruction"])
    assert rate_hz == 16_000 and 0 <= len(sound) - len(original) < 160
    assert len(soundfile.read(folder / rows[0]["original"])[0]) == len(original)
    assert np.asarray(Image.open(folder / "codec_0.png")).std() > 10


def test_talker_writes_speech_of_full_code_frames(omni: Path, tmp_path: Path) -> None:
    folder, source, kinds = _samples(omni_run("talker", omni), tmp_path, omni / "run")
    assert kinds == ["image", "audio"] * 2 + ["text", "table"]
    waveform, rate_hz = soundfile.read(folder / "talker_0.wav")
    assert rate_hz == 16_000 and len(waveform) and len(waveform) % 640 == 0
    assert Image.open(folder / "talker_0.png").size[1] > 100
    row = _rows(folder, "talker")[0]
    assert row["text"] == source.read(0)["txt"].decode() and row["spoken"] == "talker_0.wav"
    assert float(row["seconds"]) == pytest.approx(len(waveform) / 16_000, abs=0.05)
    assert row["ended"] in ("yes", "no") and (folder / row["original"]).is_file()


def test_sft_writes_answers_with_their_images_and_speech(omni: Path, tmp_path: Path) -> None:
    folder, _, kinds = _samples(omni_run("sft", omni), tmp_path, omni / "run")
    assert kinds == ["text", "table", "image", "audio"]
    rows = _rows(folder, "sft")
    assert list(rows[0]) == ["images", "audio", "asked", "expected", "answered"] and len(rows) == 8
    with_image = next(row for row in rows if row["asked"].startswith("<image>"))
    assert _image(folder, with_image["images"]).mean() > 10
    text_only = [row for row in rows if "<image>" not in row["asked"]]
    assert all(not _image(folder, row["images"]).any() for row in text_only)
    for row in rows:
        assert len(row["audio"].split()) == row["asked"].count("<audio>")
        assert all((folder / name).is_file() for name in row["audio"].split())
    assert any(row["expected"] == "red" for row in rows)
    assert (folder / "sft_speech.wav").is_file() and (folder / "sft_speech.png").is_file()


def test_a_sample_that_cannot_be_read_is_skipped(
    media: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Source.read

    def damaged(source: Source, index: int) -> dict[str, Any]:
        if index == 0:
            raise DataError("damaged")
        return read(source, index)

    monkeypatch.setattr(Source, "read", damaged)
    folder, _, _ = _samples(stage_config("audio_encoder", media), tmp_path, tmp_path)
    assert len(_rows(folder, "audio_encoder")) == 4


class Recorded:
    """Remembers the calls of a recorder."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def open(self, info: RunInfo) -> None:
        self.calls.append(("open", info.step))

    def log(self, step: int, kind: Kind, metrics: dict[str, float]) -> None:
        raise AssertionError("samples have no metrics")

    def artifact(self, path: Path, folder: str) -> None:
        self.calls.append((path.name, folder))

    def close(self, status: Status) -> None:
        self.calls.append(("close", status))


def test_recorders_get_the_files_under_the_run_of_the_training(media: Path, tmp_path: Path) -> None:
    config = stage_config("audio_encoder", media)
    run = tmp_path / "run"
    untrained_export(config, run)
    session = prepare(Request(config, run, run, {}, "never"), discover({}))
    assert session.val is not None
    folder, recorder = RunFolder(run, config.stage), Recorded()
    info = RunInfo(config.stage, "audio_s", run, folder.root, {}, 8, 8)
    record_samples(session.stage, session.val, folder, [recorder], info)
    assert recorder.calls == [
        ("open", 8),
        *((f"audio_encoder_{index}.wav", "samples/inputs/audio") for index in range(5)),
        ("audio_encoder.txt", "samples/text"),
        ("audio_encoder.json", "samples/table"),
        ("close", "FINISHED"),
    ]
    recorder.calls.clear()  # the audio of the samples is written and sent once
    record_samples(session.stage, session.val, folder, [recorder], info)
    assert [name for name, _ in recorder.calls[1:-1]] == ["audio_encoder.txt", "audio_encoder.json"]
