"""Fixtures that the tests of the data path share."""

import pytest

from muomni.data.tokenizer import Tokenizer
from tests.corpora import write_tokenizer


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A small tokenizer with all markers."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    write_tokenizer(path)
    return Tokenizer.load(path)
