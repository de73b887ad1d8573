"""The verbs `tokenize` and `measure`, which do ahead of training what its first start would do."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.cli.parser import add_verb, add_workers, positive
from muomni.command_line import path
from muomni.errors import DataError
from muomni.io.count_progress import working

if TYPE_CHECKING:
    from data_prep.cli.parser import Verbs
    from muomni.config.models import OmniConfig
    from muomni.data.text.tokenizer import Tokenizer


def add_cache_verbs(verbs: "Verbs") -> None:
    """Add the verbs to the command line."""
    _add_tokenize(verbs)
    _add_measure(verbs)


def _add_tokenize(verbs: "Verbs") -> None:
    verb = add_verb(
        verbs,
        "tokenize",
        "cache the token ids of text datasets for the stage thinker",
        "data --workers 16\n/scratch/data/books --tokenizer data/tokenizer.model",
        "Training uses the cache if it has the same tokenizer; else it tokenizes at its start, in one process.",
    )
    verb.add_argument("dirs", nargs="+", type=path, metavar="DIR", help="datasets or data roots")
    _add_tokenizer(verb)
    add_workers(verb.add_argument_group("workers"))
    verb.set_defaults(run=_run_tokenize)


def _add_measure(verbs: "Verbs") -> None:
    verb = add_verb(
        verbs,
        "measure",
        "measure the conversations of a data root for the stage sft",
        "data --preset small --workers 16\ndata --preset small --seq-len 4096",
        "Lengths depend on the tokenizer, on model sizes, and on batch.seq_len; with others, training measures "
        "again, in one process.",
    )
    verb.add_argument("dir", type=path, metavar="DIR", help="data root of the run, or one dataset")
    _add_tokenizer(verb)
    sizes = verb.add_argument_group("sizes")
    sizes.add_argument("--preset", required=True, help="model sizes of the run")
    sizes.add_argument(
        "--seq-len", type=positive, metavar="N", help="batch.seq_len (default: that of the preset)"
    )
    add_workers(verb.add_argument_group("workers"))
    verb.set_defaults(run=_run_measure)


def _add_tokenizer(verb: argparse.ArgumentParser) -> None:
    verb.add_argument_group("input").add_argument(
        "--tokenizer", type=path, metavar="FILE", help="default: tokenizer.model in or above DIR"
    )


def _run_tokenize(arguments: argparse.Namespace) -> None:
    import numpy as np

    from data_prep.datasets import find_manifests
    from muomni.data.shards.source import Source
    from muomni.data.text.token_cache import TokenCache
    from muomni.data.views.text import TextView

    num_cached = 0
    for manifest in find_manifests(arguments.dirs):
        if manifest.task != "text":
            continue
        tokenizer = _load_tokenizer(arguments.tokenizer, manifest.root)
        view = TextView(tokenizer, seq_len=1)
        for split in manifest.splits:
            source = Source([manifest], split)
            what = f"{manifest.root}/{split}: tokenizing {len(source):,} texts"
            with working(lambda what=what: what):
                missing = view.cache_tokens(source, arguments.workers)
            if missing:
                raise DataError(f"{missing[0]} cannot be written; make it writable, and rerun")
            (reader,) = source.readers
            num_ids = int(TokenCache(reader, tokenizer).num_ids(np.arange(len(reader))).sum())
            print(f"{manifest.root}/{split}: {len(source):,} texts, {num_ids:,} tokens")
            num_cached += 1
    if not num_cached:
        folders = ", ".join(map(str, arguments.dirs))
        raise DataError(f"{folders}: no text dataset; name the folder of one, or a data root")


def _run_measure(arguments: argparse.Namespace) -> None:
    from muomni.config.loading import resolve
    from muomni.config.run import DataSection
    from muomni.data.shards.datasets import open_datasets
    from muomni.data.shards.source import Source
    from muomni.data.views.conversation import ConversationView

    datasets = open_datasets(DataSection(root=str(arguments.dir)), ("sft",))
    tokenizer = _load_tokenizer(arguments.tokenizer, arguments.dir)
    batch: Any = resolve("sft", arguments.preset).batch
    seq_len = arguments.seq_len or batch.seq_len
    view = ConversationView(tokenizer, _sizes(arguments.preset, tokenizer), seq_len)
    for split in sorted({name for dataset in datasets for name in dataset.splits}):
        source = Source(datasets, split)
        what = f"{arguments.dir} {split}: measuring {len(source):,} conversations"
        with working(lambda what=what: what):
            lengths = view.lengths(source, arguments.workers).all()
        print(
            f"{arguments.dir} {split}: {len(source):,} conversations, {lengths.sum():,} positions of at most "
            f"{seq_len}"
        )


def _sizes(preset: str, tokenizer: "Tokenizer") -> "OmniConfig":
    """The model sizes that determine the length of a conversation, and others to complete the config."""
    from muomni.config.loading import load_preset, validate
    from muomni.config.models import OmniConfig

    sizes = load_preset(preset)["models"]
    vocab = {"vocab_size": tokenizer.vocab_size}
    content = {
        **sizes["sft"],
        "thinker": {**sizes["thinker"], **vocab},
        "audio_encoder": {**sizes["audio_encoder"], **vocab},
        "vision_encoder": sizes["vision_encoder"]["vision"],
    }
    return validate(OmniConfig, content, f"preset {preset}")


def _load_tokenizer(given: Path | None, folder: Path) -> "Tokenizer":
    """The tokenizer of the command line, or that of a dataset's data root; raises DataError."""
    from muomni.data.shards.datasets import TOKENIZER_NAME
    from muomni.data.text.tokenizer import Tokenizer

    if given is not None:
        return Tokenizer.load(given)
    found = [parent / TOKENIZER_NAME for parent in (folder, folder.resolve().parent)]
    existing = [path for path in found if path.is_file()]
    if not existing:
        raise DataError(f"{found[0]} does not exist; add --tokenizer FILE")
    return Tokenizer.load(existing[0])
