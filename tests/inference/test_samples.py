"""Each stage writes its sample outputs from its export, and the run's recorders get them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from muomni.config.run import RunConfig
from muomni.data.media.audio import read_audio
from muomni.data.shards.source import Source
from muomni.distributed.discovery import discover
from muomni.inference.samples import QUICK, ValidationSamples, record_samples, write_samples
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
    assert all(artifact.path.parent == folder.samples for artifact in artifacts)
    return folder.samples, session.val, [artifact.kind for artifact in artifacts]


def test_audio_encoder_writes_transcripts(media: Path, tmp_path: Path) -> None:
    folder, _, kinds = _samples(stage_config("audio_encoder", media), tmp_path, tmp_path)
    text = (folder / "audio_encoder.txt").read_text()
    assert kinds == ["text", "table"] and any(f"reference: {word}" in text for word in WORDS)


def test_vision_encoder_writes_nearest_captions(media: Path, tmp_path: Path) -> None:
    folder, _, kinds = _samples(stage_config("vision_encoder", media), tmp_path, tmp_path)
    text = (folder / "vision_encoder.txt").read_text()
    assert kinds == ["text", "table"] and "image of: red circle" in text and "nearest: " in text


def test_codec_writes_spectrograms_and_sounds_of_the_right_length(
    media: Path, tmp_path: Path
) -> None:
    folder, source, kinds = _samples(stage_config("codec", media), tmp_path, tmp_path)
    assert kinds == ["image", "audio"] * 2
    for index in range(2):
        original = read_audio(source.read(index))
        sound, rate_hz = soundfile.read(folder / f"codec_{index}.wav")
        assert rate_hz == 16_000 and 0 <= len(sound) - len(original) < 160
        image = np.asarray(Image.open(folder / f"codec_{index}.png"))
        assert image.shape == (2 * 80 * 2 + 6, 3 * -(-len(original) // 160), 3)
        assert image.std() > 10


def test_talker_writes_speech_of_full_code_frames(omni: Path, tmp_path: Path) -> None:
    folder, _, kinds = _samples(omni_run("talker", omni), tmp_path, omni / "run")
    assert kinds == ["image", "audio"] * 2
    waveform, rate_hz = soundfile.read(folder / "talker_0.wav")
    assert rate_hz == 16_000 and len(waveform) and len(waveform) % 640 == 0
    assert Image.open(folder / "talker_0.png").size[1] > 100


def test_sft_writes_answers_and_speech(omni: Path, tmp_path: Path) -> None:
    folder, _, kinds = _samples(omni_run("sft", omni), tmp_path, omni / "run")
    text = (folder / "sft.txt").read_text()
    assert kinds == ["text", "table", "image", "audio"]
    table = json.loads((folder / "sft.json").read_text())
    assert table["columns"] == ["asked", "expected", "answered"] and len(table["data"]) == 8
    assert text.count("asked:") == 8 and "<image>" in text and "expected: red" in text
    assert (folder / "sft_speech.wav").is_file() and (folder / "sft_speech.png").is_file()


@pytest.mark.parametrize("stage", QUICK)
def test_a_model_in_training_writes_samples_of_its_step(
    stage: str, media: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = stage_config(stage, media)
    session = prepare(Request(config, tmp_path, tmp_path, {}, "never"), discover({}))
    assert session.val is not None
    folder, recorder = RunFolder(tmp_path, stage), Recorded()
    sampler = ValidationSamples(session.stage, session.val, folder, [recorder])
    task = session.stage.build().bfloat16().eval()
    model = session.stage.model(task)
    sampler(model, 20)
    where = folder.samples / "step_00000020"
    assert {name for name, _ in recorder.calls} == {path.name for path in where.iterdir()}
    assert all(place.startswith("samples/step_00000020/") for _, place in recorder.calls)
    assert recorder.calls and not caplog.records
    sampler(torch.nn.Identity(), 40)  # a model that fails
    sampler(model, 60)  # and no more samples
    assert [record.getMessage()[:20] for record in caplog.records] == ["no sample outputs at"]
    assert not (folder.samples / "step_00000060").exists()


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


@pytest.mark.parametrize("stage", ["audio_encoder", "thinker"])
def test_recorders_get_the_files_under_the_run_of_the_training(
    stage: str, media: Path, tmp_path: Path
) -> None:
    config = stage_config("audio_encoder", media)
    if stage == "thinker":
        write_text_dataset(tmp_path / "text" / "data")
        write_tokenizer(tmp_path / "text" / "tokenizer.model")
        config = thinker_config(tmp_path / "text")
    run = tmp_path / "run"
    untrained_export(config, run)
    session = prepare(Request(config, run, run, {}, "never"), discover({}))
    assert session.val is not None
    folder, recorder = RunFolder(run, stage), Recorded()
    info = RunInfo(stage, "tokens", run, folder.root, {}, 8, 8)
    record_samples(session.stage, session.val, folder, [recorder], info)
    expected: list[tuple[Any, ...]] = [
        ("open", 8),
        ("audio_encoder.txt", "samples/text"),
        ("audio_encoder.json", "samples/table"),
        ("close", "FINISHED"),
    ]
    assert recorder.calls == (expected if stage == "audio_encoder" else [])
