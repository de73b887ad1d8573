"""Data that the tests of training share."""

from pathlib import Path

import pytest

from tests.corpora import write_text_dataset, write_tokenizer


@pytest.fixture(scope="session")
def text_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root with a small text dataset and a tokenizer."""
    root = tmp_path_factory.mktemp("data")
    write_text_dataset(root / "text")
    write_tokenizer(root / "tokenizer.model")
    return root
