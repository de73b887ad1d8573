"""Convert the corpora in `samples/` to a data root with datasets and a tokenizer.

All datasets share the split rule, and an image or audio clip has the same group in each of them, so test
data of a later stage never occurs in the training data of an earlier one.
"""

from dataclasses import dataclass, field
from pathlib import Path

from data_prep.options import ReaderOptions
from data_prep.sharding.prepare import OpenProgress, prepare, remove_dataset
from data_prep.sharding.shard_plan import ShardingOptions
from data_prep.train_tokenizer import train_tokenizer
from muomni.data.shards.manifest import Manifest, Task
from muomni.data.text.tokenizer import Tokenizer
from muomni.errors import DataError
from muomni.io.atomic_write import write_atomic

SAMPLES = Path(__file__).resolve().parent.parent / "samples"
# A fifth for the test, since error rates on smaller sets would be too noisy.
_VAL_FRACTION, _TEST_FRACTION = 0.08, 0.20


@dataclass(frozen=True, slots=True)
class BundledCorpus:
    """A corpus of the samples folder, and the options of its dataset."""

    folder: str
    task: Task
    reader: str
    source: str
    shard_size: str
    license: str
    options: ReaderOptions = field(default_factory=ReaderOptions)


CORPORA = (
    BundledCorpus(
        "text", "text", "txt", "text/wordnet_examples.txt", "10000", "WordNet 3.0 license"
    ),
    BundledCorpus(
        "image_caption",
        "image-caption",
        "coco",
        "coco_emoji",
        "500",
        "Apache-2.0 (images), Unicode-DFS-2016 (captions)",
    ),
    BundledCorpus(
        "speech",
        "speech",
        "librispeech",
        "librispeech_allison/LibriSpeech",
        "100",
        "CC-BY-SA-3.0 (Allison Smith, for Asterisk / Digium)",
        ReaderOptions(group_by="transcript", language="en", speaker="allison"),
    ),
    BundledCorpus(
        "speech_synthetic",
        "speech",
        "jsonl",
        "trimodal/synthetic_speech.jsonl",
        "100",
        "made with flite (BSD-like)",
        ReaderOptions(language="en"),
    ),
    BundledCorpus(
        "tts",
        "tts",
        "ljspeech",
        "ljspeech_allison",
        "50",
        "CC-BY-SA-3.0 (Allison Smith, for Asterisk / Digium)",
        ReaderOptions(language="en", speaker="allison"),
    ),
    BundledCorpus(
        "tts_librispeech",
        "tts",
        "librispeech",
        "librispeech_allison/LibriSpeech",
        "100",
        "CC-BY-SA-3.0 (Allison Smith, for Asterisk / Digium)",
        # The other subset repeats the clips of the LJSpeech folder.
        ReaderOptions(
            group_by="transcript", language="en", speaker="allison", subsets=("train-clean-360",)
        ),
    ),
    BundledCorpus(
        "sft",
        "sft",
        "llava",
        "llava/conversations.json",
        "1000",
        "Apache-2.0, Unicode-DFS-2016, CC-BY-SA-3.0 (see samples/README.md)",
        ReaderOptions(media_root=SAMPLES),
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
    manifests = []
    for corpus in CORPORA:
        options = ShardingOptions(
            name=corpus.folder,
            task=corpus.task,
            reader=corpus.reader,
            reader_options=corpus.options.as_text(),
            source=SAMPLES / corpus.source,
            media_root=corpus.options.media_root,
            val_fraction=_VAL_FRACTION,
            test_fraction=_TEST_FRACTION,
            shard_size=corpus.shard_size,
            max_bad_fraction=0.0,
            license=corpus.license,
        )
        folder = out / corpus.folder
        manifest = prepare(options, corpus.options, folder, num_workers, (0, 1), open_progress)
        assert manifest is not None, "a single task finishes its dataset"
        manifests.append(manifest)
    tokenizer = train_tokenizer([out], vocab_size, out / "tokenizer.model")
    write_atomic(out / "README.md", _card(manifests, tokenizer).encode())
    return manifests, tokenizer


def remove_sample(out: Path) -> None:
    """Delete the datasets that `make_sample` creates in `out`, and nothing else."""
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
