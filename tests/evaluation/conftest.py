"""Runs and datasets shared by the tests of evaluation."""

from pathlib import Path

import pytest

from tests.corpora import write_tokenizer
from tests.evaluation.runs import three_splits, untrained_export, write_texts
from tests.media_corpora import write_image_dataset, write_speech_dataset
from tests.training.runs import thinker_config
from tests.training.stages.curves import stage_config
from tests.training.stages.sft.omni_runs import omni_run, write_root


@pytest.fixture(scope="session")
def three_way_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root with a tokenizer and a text dataset with splits train, val, and test."""
    root = tmp_path_factory.mktemp("three-way")
    write_texts(root / "text", three_splits())
    write_tokenizer(root / "tokenizer.model")
    return root


@pytest.fixture(scope="session")
def thinker_run(three_way_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with the export of an untrained thinker."""
    run = tmp_path_factory.mktemp("run")
    untrained_export(thinker_config(three_way_text), run)
    return run


@pytest.fixture(scope="session")
def perception_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with an untrained audio encoder, vision encoder, and codec; its data has train and val."""
    root = tmp_path_factory.mktemp("perception")
    write_speech_dataset(root / "speech", num_train=8, num_val=5)
    write_speech_dataset(root / "tts", num_train=4, num_val=2, task="tts")
    write_image_dataset(root / "images", num_train=8, num_val=7)
    write_tokenizer(root / "tokenizer.model")
    for stage in ("audio_encoder", "vision_encoder", "codec"):
        untrained_export(stage_config(stage, root), root / "run")
    return root / "run"


@pytest.fixture(scope="session")
def omni_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root with toy conversations and two runs: `run` with random exports of all stages before
    sft, and `tuned` with an untrained Talker and omni model built from them."""
    root = write_root(tmp_path_factory.mktemp("omni"))
    untrained_export(omni_run("talker", root), root / "tuned", root / "run")
    # Several conversations per sequence, so that there are images and audio clips to swap.
    untrained_export(
        omni_run("sft", root, {"batch": {"seq_len": 80}}), root / "tuned", root / "run"
    )
    return root
