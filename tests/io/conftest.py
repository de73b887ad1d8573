"""The shared fixture of the io tests."""

from pathlib import Path

import pytest

from tests.corpora import write_text_dataset, write_tokenizer


@pytest.fixture(scope="session")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root with two text datasets, `a` and `b`, and their tokenizer, to be served remotely."""
    root = tmp_path_factory.mktemp("corpora")
    for name in ("a", "b"):
        write_text_dataset(root / name, num_train=30, num_val=5)
    write_tokenizer(root / "tokenizer.model")
    return root
