"""Convert the corpora in `samples/` to a data root with datasets and a tokenizer.

The corpora declare their splits, and an image or audio clip is in the same split of each dataset, so test
data of a later stage never occurs in the training data of an earlier one.
"""

import shutil
import tarfile
from dataclasses import dataclass
from pathlib import Path

from data_prep.options import ReaderOptions
from data_prep.sharding.prepare import OpenProgress, prepare, remove_dataset
from data_prep.sharding.shard_plan import ShardingOptions
from data_prep.train_tokenizer import train_tokenizer
from muomni.data.shards.manifest import Manifest, Task
from muomni.data.text.tokenizer import Tokenizer
from muomni.errors import DataError
from muomni.io.atomic_write import write_atomic
from muomni.io.hashing import sha256_bytes

SAMPLES = Path(__file__).resolve().parent.parent / "samples"
ARCHIVES = ("images", "speech", "conversations", "text")
# Folder of the unpacked archives in the data root.
CORPORA_FOLDER = "corpora"
_DIGEST_FILE = "archives.sha256"
# Of texts, which have no declared split.
_VAL_FRACTION, _TEST_FRACTION = 0.05, 0.10
_IMAGES = (
    "MIT (Fashion-MNIST, Fluent), CC-BY-4.0 (digits, Twemoji), Apache-2.0 (Noto), "
    "CC-BY-SA-4.0 (OpenMoji)"
)
_SPEECH = (
    "synthetic (flite, festival, espeak-ng); CC-BY-SA-3.0 (Allison Smith, for Asterisk / Digium)"
)


@dataclass(frozen=True, slots=True)
class BundledCorpus:
    """A corpus of the samples folder, and the options of its dataset."""

    folder: str
    task: Task
    reader: str
    source: str
    shard_size: str
    license: str
    annotations: str = ""


CORPORA = (
    BundledCorpus("text", "text", "txt", "text/vocabulary.txt", "10000", "Apache-2.0"),
    BundledCorpus(
        "text_wordnet", "text", "txt", "text/wordnet_examples.txt", "10000", "WordNet 3.0 license"
    ),
    BundledCorpus(
        "image_caption",
        "image-caption",
        "coco",
        "images",
        "2000",
        "MIT (Fashion-MNIST), CC-BY-4.0 (digits)",
        "captions_*2017.json",
    ),
    BundledCorpus(
        "image_emoji",
        "image-caption",
        "coco",
        "images",
        "2000",
        "Apache-2.0 (Noto), CC-BY-SA-4.0 (OpenMoji), CC-BY-4.0 (Twemoji), MIT (Fluent)",
        "captions_*2017_emoji.json",
    ),
    BundledCorpus("speech", "speech", "tsv", "speech/speech.tsv", "1000", _SPEECH),
    BundledCorpus("tts", "tts", "tsv", "speech/talker.tsv", "500", "synthetic (flite)"),
    BundledCorpus(
        "sft",
        "sft",
        "llava",
        "conversations/conversations.json",
        "5000",
        f"Apache-2.0 (texts); {_IMAGES}; {_SPEECH}",
    ),
)


def make_sample(
    out: Path, vocab_size: int, num_workers: int, open_progress: OpenProgress
) -> tuple[list[Manifest], Tokenizer]:
    """Shard all bundled corpora into `out` and train their tokenizer.

    Raises `DataError` without the samples folder, which installed wheels lack.
    """
    if not (SAMPLES / "README.md").is_file():
        raise DataError(
            f"the bundled corpora are not in {SAMPLES}, since an installed muomni does not include them; "
            "clone the muomni repository and run this command there"
        )
    corpora = unpack(out)
    manifests = []
    for corpus in CORPORA:
        media_root = corpora if corpus.task == "sft" else None
        reader_options = ReaderOptions(
            media_root=media_root, annotations=corpus.annotations, language="en"
        )
        options = ShardingOptions(
            name=corpus.folder,
            task=corpus.task,
            reader=corpus.reader,
            reader_options=reader_options.as_text(),
            source=corpora / corpus.source,
            media_root=media_root,
            val_fraction=_VAL_FRACTION,
            test_fraction=_TEST_FRACTION,
            split_from="source",
            shard_size=corpus.shard_size,
            max_bad_fraction=0.0,
            license=corpus.license,
        )
        folder = out / corpus.folder
        manifest = prepare(options, reader_options, folder, num_workers, (0, 1), open_progress)
        assert manifest is not None, "a single task finishes its dataset"
        manifests.append(manifest)
    tokenizer = train_tokenizer([out], vocab_size, out / "tokenizer.model")
    write_atomic(out / "README.md", _card(manifests, tokenizer).encode())
    return manifests, tokenizer


def unpack(out: Path) -> Path:
    """Unpack the archives in `out`, unless that was done before; returns the folder of the corpora.

    Raises `DataError` if the folder was not created here.
    """
    corpora = out / CORPORA_FOLDER
    contents = b"".join((SAMPLES / f"{name}.tar.xz").read_bytes() for name in ARCHIVES)
    digest = sha256_bytes(contents)
    if _unpacked(corpora) == digest:
        return corpora
    _remove_unpacked(corpora)
    partial = out / f"{CORPORA_FOLDER}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    for name in ARCHIVES:
        with tarfile.open(SAMPLES / f"{name}.tar.xz") as archive:
            # Python releases before mid-2023 have no filters; these archives are our own.
            if hasattr(tarfile, "data_filter"):
                archive.extraction_filter = tarfile.data_filter
            archive.extractall(partial)
    (partial / _DIGEST_FILE).write_text(digest, encoding="utf-8")
    partial.rename(corpora)
    return corpora


def _unpacked(corpora: Path) -> str | None:
    """The digest of the archives that a folder was unpacked from; None for other folders."""
    marker = corpora / _DIGEST_FILE
    return marker.read_text(encoding="utf-8") if marker.is_file() else None


def _remove_unpacked(corpora: Path) -> None:
    if corpora.exists() and _unpacked(corpora) is None:
        raise DataError(f"{corpora} was not created by data_prep; choose another --out")
    if corpora.exists():
        shutil.rmtree(corpora)


def remove_sample(out: Path) -> None:
    """Delete what `make_sample` creates in `out` except the tokenizer, and nothing else."""
    _remove_unpacked(out / CORPORA_FOLDER)
    for corpus in CORPORA:
        remove_dataset(out / corpus.folder)


def _card(manifests: list[Manifest], tokenizer: Tokenizer) -> str:
    lines = [
        "# Sample data",
        "",
        "Created by `python -m data_prep sample` from the corpora in `samples/`; the README there lists",
        f"origins and licenses. Tokenizer: {tokenizer.vocab_size} pieces.",
        "",
    ]
    lines += [f"- [{m.name}]({m.root.name}/README.md): {m.task}" for m in manifests]
    return "\n".join(lines) + "\n"
