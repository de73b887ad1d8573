"""Tiny datasets that tests of the data path and of training share, written by the real shard writer."""

import io
from pathlib import Path

import numpy as np
import sentencepiece

from muomni.data.shards.manifest import Manifest, Split, Task, fingerprint
from muomni.data.shards.writer import SampleCost, ShardWriter
from muomni.data.text.tokenizer import MARKERS

Sample = tuple[str, list[tuple[str, bytes]], SampleCost]

_SUBJECTS = (
    "the cat",
    "a young doctor",
    "my neighbour",  # codespell:ignore
    "the old river",
    "every student",
    "the band",
)
_VERBS = ("watches", "paints", "remembers", "crosses", "sells", "hides from")
_OBJECTS = ("the green door", "a slow train", "his brother", "the empty market", "two letters")
_ENDS = ("in the morning", "again and again", "before it rains", "with great care", "")


def sentences(count: int, seed: int = 0) -> list[str]:
    """Short English sentences, equal for equal arguments."""
    random = np.random.default_rng(seed)
    parts = (_SUBJECTS, _VERBS, _OBJECTS, _ENDS)
    return [" ".join(str(random.choice(part)) for part in parts).strip() for _ in range(count)]


def write_dataset(root: Path, task: Task, splits: dict[str, list[Sample]]) -> Manifest:
    """One shard a split; the group of a sample is its key."""
    name = root.name
    shards = {}
    for split, samples in splits.items():
        with ShardWriter(root, f"{split}/{name}-{split}-000000.tar", split) as writer:
            for key, members, cost in samples:
                writer.add(key, members, key, cost)
        assert writer.record is not None
        shards[split] = Split(shards=(writer.record,))
    manifest = Manifest(
        root=root, name=name, task=task, reader="test", split_rule="given",
        fingerprint=fingerprint(shards), splits=shards,
    )  # fmt: skip
    (root / "manifest.json").write_text(manifest.to_json())
    return manifest


def write_text_dataset(root: Path, num_train: int = 400, num_val: int = 40) -> Manifest:
    """A text dataset of short sentences with splits train and val."""
    lines = {"train": sentences(num_train, 1), "val": sentences(num_val, 2)}
    return write_dataset(
        root,
        "text",
        {
            split: [
                (f"{split}{i:05d}", [("txt", line.encode())], SampleCost(num_chars=len(line)))
                for i, line in enumerate(texts)
            ]
            for split, texts in lines.items()
        },
    )


def write_tokenizer(path: Path, vocab_size: int = 330) -> None:
    """A small tokenizer with all markers, trained on the sentences above."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences(400, 1)),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        pad_id=0,
        unk_id=1,
        bos_id=2,
        eos_id=3,
        control_symbols=list(MARKERS),
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())
