"""Data that the tests of evaluation share."""

from pathlib import Path

import pytest

from tests.corpora import write_tokenizer
from tests.evaluation.runs import three_splits, untrained_export, write_texts
from tests.training.runs import thinker_config


@pytest.fixture(scope="session")
def three_way_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root with a text dataset of splits train, val and test, and a tokenizer."""
    root = tmp_path_factory.mktemp("three-way")
    write_texts(root / "text", three_splits())
    write_tokenizer(root / "tokenizer.model")
    return root


@pytest.fixture(scope="session")
def thinker_run(three_way_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with the export of an untrained thinker."""
    run = tmp_path_factory.mktemp("run")
    untrained_export(thinker_config(three_way_text), run)
    return run
