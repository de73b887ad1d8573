"""A small data root for the tests of launch commands."""

from pathlib import Path

import pytest

from tests.corpora import write_text_dataset, write_tokenizer


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write_text_dataset(root / "text")
    write_tokenizer(root / "tokenizer.model")
    return root
