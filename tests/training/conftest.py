"""Data that the tests of training share."""

from pathlib import Path

import pytest

from tests.corpora import write_tokenizer
from tests.media_corpora import write_image_dataset, write_speech_dataset


@pytest.fixture(scope="session")
def media_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root with small speech, tts, and image datasets and a tokenizer."""
    root = tmp_path_factory.mktemp("media")
    write_speech_dataset(root / "speech")
    write_speech_dataset(root / "tts", num_train=12, num_val=2, task="tts")
    write_image_dataset(root / "images")
    write_tokenizer(root / "tokenizer.model")
    return root
