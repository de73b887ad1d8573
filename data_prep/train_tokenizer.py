"""Train the SentencePiece tokenizer on the train splits of datasets.

BPE with byte fallback can encode any text, and identity normalization makes it reversible. Training is
deterministic: a single thread reads the texts in dataset order.
"""

import io
import re
from collections.abc import Iterator
from pathlib import Path

import sentencepiece

from data_prep.members import sample_texts
from muomni.data.shards.manifest import MANIFEST_NAME, Manifest
from muomni.data.shards.reader import SplitReader
from muomni.data.text.tokenizer import MARKERS, Tokenizer
from muomni.errors import ConfigError, DataError
from muomni.io.atomic_write import write_atomic
from muomni.io.count_progress import working

# Longer texts are split: BPE learns from words, and the trainer limits the bytes per line.
_MAX_CHARS = 4096


def train_texts(manifests: list[Manifest]) -> Iterator[str]:
    """All texts of the train splits: documents, captions, transcripts, and turns."""
    for manifest in manifests:
        reader = SplitReader(manifest, "train")
        for index in range(len(reader)):
            yield from sample_texts(reader.read(index), manifest.task)


def train_tokenizer(folders: list[Path], vocab_size: int, out: Path) -> Tokenizer:
    """Train on the datasets in `folders` or in their direct subfolders, and write `out`.

    Raises `DataError` if there is no dataset or no text, and `ConfigError` if the text is too small for
    `vocab_size` or `vocab_size` too small for its characters.
    """
    manifests = _datasets(folders)
    num_texts = 0

    def texts() -> Iterator[str]:
        nonlocal num_texts
        for text in train_texts(manifests):
            num_texts += 1
            yield text

    pieces = (text[i : i + _MAX_CHARS] for text in texts() for i in range(0, len(text), _MAX_CHARS))
    lines = (line for piece in pieces for line in piece.splitlines() if line.strip())
    model = io.BytesIO()
    try:
        with working(lambda: f"tokenizer: {num_texts:,} texts read"):
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(lines),
                model_writer=model,
                model_type="bpe",
                vocab_size=vocab_size,
                byte_fallback=True,
                split_digits=True,
                normalization_rule_name="identity",
                remove_extra_whitespaces=False,
                # Rare characters are encoded as bytes and take no vocabulary.
                character_coverage=0.9995,
                pad_id=0,
                unk_id=1,
                bos_id=2,
                eos_id=3,
                pad_piece="<|pad|>",
                unk_piece="<|unk|>",
                bos_piece="<|bos|>",
                eos_piece="<|eos|>",
                control_symbols=list(MARKERS),
                max_sentence_length=4 * _MAX_CHARS + 1,
                num_threads=1,
                minloglevel=2,
            )
    except RuntimeError as error:
        raise _explain(str(error), vocab_size, folders) from error
    tokenizer = Tokenizer(model.getvalue(), str(out))
    write_atomic(out, model.getvalue())
    return tokenizer


def _datasets(folders: list[Path]) -> list[Manifest]:
    found: list[Manifest] = []
    for folder in folders:
        if not folder.is_dir():
            raise DataError(f"data folder {folder} does not exist; check --data")
        inside = [folder, *sorted(path for path in folder.iterdir() if path.is_dir())]
        complete = [Manifest.load(path) for path in inside if (path / MANIFEST_NAME).is_file()]
        if not complete:
            raise DataError(
                f"{folder} contains no finished dataset; create one with `python -m data_prep text` "
                "(or image-caption, speech, tts, sft) or `index`"
            )
        found += complete
    return found


def _explain(message: str, vocab_size: int, folders: list[Path]) -> ConfigError | DataError:
    names = ", ".join(str(folder) for folder in folders)
    if match := re.search(r"too high \(\d+\).*value <= (\d+)", message):
        return ConfigError(
            f"--vocab-size {vocab_size} is too large for the text of {names}: "
            f"it yields at most {match[1]} pieces"
        )
    if match := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return ConfigError(
            f"--vocab-size {vocab_size} is too small: bytes, markers, and the characters of {names} "
            f"need {match[1]}"
        )
    if "sentences_.empty" in message:
        return DataError(f"the train splits of {names} contain no text to train a tokenizer on")
    return DataError(f"SentencePiece failed to train on {names}: {message}")
