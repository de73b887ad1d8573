"""Batches for GPUs have few different shapes, and the same losses."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from muomni.config.models import AudioEncoderConfig
from muomni.data.loading.loader import PlannedDataset
from muomni.data.media.audio import pad_waveforms
from muomni.data.views.base import COARSE, EXACT, Batch, Padding
from muomni.distributed.discovery import discover
from muomni.models.speech.audio_encoder import AudioEncoder
from muomni.training.session import Request, Session, prepare
from muomni.training.stage import Stage
from tests.training.stages.curves import stage_config
from tests.training.stages.sft.omni_runs import omni_run, write_root

WAVEFORMS, TEXTS = ("waveform", "audios", "speech"), ("text_ids", "speech_text_ids")


@pytest.fixture(scope="module")
def omni_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_root(tmp_path_factory.mktemp("omni"))


def open_session(stage: str, media_data: Path, omni_root: Path) -> Session:
    is_perception = stage in ("audio_encoder", "vision_encoder")
    config = stage_config(stage, media_data) if is_perception else omni_run(stage, omni_root)
    return prepare(Request(config, Path("none"), omni_root / "run", {}, "never"), discover({}))


def first_batch(session: Session) -> Batch:
    dataset = PlannedDataset(session.planned.source, session.stage.view(), 0)
    return dataset[session.planned.plan.rank_step(0, 0, 1)[0]].tensors


@pytest.mark.parametrize("stage", ["audio_encoder", "vision_encoder", "talker", "sft"])
def test_wider_padding_keeps_losses(
    stage: str, media_data: Path, omni_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = open_session(stage, media_data, omni_root)
    steps: Any = session.stage
    torch.manual_seed(0)
    task = steps.build().train()
    losses, shapes = [], []
    for padding in (EXACT, COARSE):
        monkeypatch.setattr(Stage, "padding", padding)
        batch = first_batch(session)
        losses.append(task(steps.prepare(batch)).losses)
        shapes.append({name: tensor.shape for name, tensor in batch.items()})
    assert shapes[0] != shapes[1]
    for name, shape in shapes[1].items():
        if name in WAVEFORMS:
            assert shape[1] % 10_240 == 0
        elif name in TEXTS:
            assert shape[1] % 32 == 0
    for name, loss in losses[0].items():
        torch.testing.assert_close(losses[1][name], loss, atol=1e-4, rtol=1e-5)


def test_gpus_get_wide_padding(media_data: Path, omni_root: Path) -> None:
    stage = open_session("audio_encoder", media_data, omni_root).stage
    assert stage.padding == EXACT
    stage.context.device = torch.device("cuda")
    assert stage.padding == COARSE


@pytest.mark.parametrize(("padding", "most"), [(EXACT, 300), (COARSE, 32)])
def test_clips_of_any_length_have_few_shapes(padding: Padding, most: int) -> None:
    """Of 300 batches of clips up to 20 s, whose frames are multiples of 16, too."""
    random, widths = np.random.default_rng(0), set()
    for _ in range(300):
        clips = [np.zeros(random.integers(1, 20 * 16_000), dtype=np.float32) for _ in range(2)]
        waveform, lengths = pad_waveforms(clips, multiple=padding.samples)
        assert waveform.shape[1] - int(lengths.max()) < padding.samples
        widths.add(waveform.shape[1])
    assert len(widths) <= most and (most == 32 or len(widths) > 250)
    if padding == COARSE:
        config = AudioEncoderConfig(
            hidden_size=16, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=16, intermediate_size=16,
            vocab_size=8, conv_channels=2,
        )  # fmt: skip
        states, _ = AudioEncoder(config)(waveform, lengths)
        assert states.shape[1] % 16 == 0
