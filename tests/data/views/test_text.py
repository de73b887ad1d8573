"""The text view: labels of packed documents, and truncation."""

import logging
from pathlib import Path

import pytest

from muomni.data.shards.source import Source
from muomni.data.shards.writer import SampleCost
from muomni.data.text.tokenizer import Tokenizer
from muomni.data.views.text import IGNORE, TextView
from tests.corpora import Sample, write_dataset


def text_sample(key: str, text: str) -> Sample:
    return key, [("txt", text.encode())], SampleCost(num_chars=len(text))


@pytest.fixture
def source(tmp_path: Path) -> Source:
    texts = ["the cat", "two characters " * 40, "the old river"]
    samples = [text_sample(f"t{i}", text) for i, text in enumerate(texts)]
    return Source([write_dataset(tmp_path / "text", "text", {"train": samples})], "train")


def test_packed_documents_have_separate_labels_with_eos(
    source: Source, tokenizer: Tokenizer
) -> None:
    view = TextView(tokenizer, seq_len=32)
    batch = view.collate([[view.example(source.read(i), None) for i in (0, 2)], []])
    first, second = (tokenizer.encode(text) for text in ("the cat", "the old river"))
    end = len(first) + len(second) + 2
    assert batch["input_ids"][0, :end].tolist() == [
        tokenizer.bos_id, *first, tokenizer.bos_id, *second,
    ]  # fmt: skip
    assert batch["labels"][0, :end].tolist() == [
        *first, tokenizer.eos_id, *second, tokenizer.eos_id,
    ]  # fmt: skip
    ids = batch["document_ids"]
    assert ids[0].tolist() == [1] * (len(first) + 1) + [2] * (len(second) + 1) + [0] * (32 - end)
    assert (batch["labels"][ids == 0] == IGNORE).all() and not ids[1].any()
    assert float(batch["num_bytes"]) == len("the catthe old river")


def test_long_document_is_truncated_with_a_warning(
    source: Source, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    view = TextView(tokenizer, seq_len=32)
    with caplog.at_level(logging.WARNING):
        lengths = view.lengths(source).all()
    assert lengths.max() == 32
    num_tokens = len(tokenizer.encode("two characters " * 40)) + 1
    assert (
        f"1 of 3 training texts are longer than batch.seq_len=32 and lose {num_tokens - 32} tokens"
        in caplog.text
    )
    document = view.example(source.read(1), None)
    assert len(document.ids) == 33
    assert document.num_bytes == len(tokenizer.decode(list(document.ids)).encode())
