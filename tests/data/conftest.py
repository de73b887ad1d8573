"""The shared fixture of the data tests."""

import pytest

from muomni.data.text.tokenizer import Tokenizer
from tests.corpora import write_tokenizer


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A small tokenizer with all special tokens."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    write_tokenizer(path)
    return Tokenizer.load(path)
