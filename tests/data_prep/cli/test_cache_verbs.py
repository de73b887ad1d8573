"""`tokenize` and `measure` write what training would, so that training only reads it."""

from pathlib import Path

import numpy as np
import pytest

from data_prep.cli.main import main
from muomni.config.loading import resolve
from muomni.data.sampling import lengths as measuring
from muomni.data.shards import parallel
from muomni.data.shards.manifest import Manifest
from muomni.data.shards.source import Source
from muomni.data.text.token_cache import TokenCache
from muomni.data.text.tokenizer import Tokenizer
from muomni.data.views.conversation import ConversationView
from muomni.data.views.text import TextView
from tests.conversations import write_sft_dataset
from tests.corpora import write_text_dataset, write_tokenizer
from tests.data_prep.commands import Capture, fails


def caches(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(root.rglob(".*")) if path.is_file()}


def test_tokenizing_by_workers_gives_the_cache_of_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr(parallel, "_RANGE", 7)  # several ranges for each worker
    write_tokenizer(tmp_path / "tokenizer.model")
    dataset = write_text_dataset(tmp_path / "text")
    main(["tokenize", str(tmp_path), "--workers", "2"])
    source = Source([Manifest.load(dataset.root)], "train")
    tokenizer = Tokenizer.load(tmp_path / "tokenizer.model")
    (reader,) = source.readers
    assert TokenCache(reader, tokenizer).is_complete()
    assert f"train: {len(source):,} texts" in capsys.readouterr().out
    written = caches(tmp_path)
    for path in tmp_path.rglob(".tokens-*"):
        path.unlink()
    for split in dataset.splits:
        TextView(tokenizer, 64).lengths(Source([dataset], split))
    assert caches(tmp_path) == written and len(written) == 2 * len(dataset.splits)


def test_measured_conversations_are_not_measured_by_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    write_tokenizer(tmp_path / "tokenizer.model")
    write_sft_dataset(tmp_path / "sft")
    main(["measure", str(tmp_path), "--preset", "nano", "--seq-len", "96", "--workers", "1"])
    assert "positions of at most 96" in capsys.readouterr().out
    from data_prep.cli.cache_verbs import _sizes

    tokenizer = Tokenizer.load(tmp_path / "tokenizer.model")
    view = ConversationView(tokenizer, _sizes("nano", tokenizer), 96)
    source = Source([Manifest.load(tmp_path / "sft")], "train")
    expected = np.array([view._measure(source.read(i)) for i in range(len(source))])
    monkeypatch.setattr(measuring, "_length", None)  # would fail
    assert np.array_equal(view.lengths(source).all(), expected.clip(1, 96))


def test_a_recipe_has_the_default_length() -> None:
    assert resolve("sft", "nano").batch.seq_len > 0  # pyright: ignore[reportAttributeAccessIssue]


def test_mistakes_are_named(tmp_path: Path, capsys: Capture) -> None:
    write_sft_dataset(tmp_path / "sft")
    assert "no text dataset" in fails(capsys, "tokenize", str(tmp_path))
    message = fails(capsys, "measure", str(tmp_path), "--preset", "nano")
    assert "tokenizer.model does not exist; add --tokenizer FILE" in message
