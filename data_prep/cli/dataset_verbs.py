"""The verbs `sample`, `tokenizer`, `finalize`, and `index`, which create datasets and tokenizers."""

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.cli.parser import add_verb, add_workers, fraction, positive
from data_prep.readers import READERS
from data_prep.skipped_files import SkippedFiles
from muomni.command_line import path
from muomni.errors import DataError
from muomni.io.count_progress import open_progress

if TYPE_CHECKING:
    from data_prep.cli.parser import Verbs
    from muomni.data.shards.manifest import Manifest


def add_dataset_verbs(verbs: "Verbs") -> None:
    """Add the verbs to the command line."""
    _add_sample(verbs)
    _add_tokenizer(verbs)
    _add_finalize(verbs)
    _add_index(verbs)


def _add_sample(verbs: "Verbs") -> None:
    verb = add_verb(
        verbs,
        "sample",
        "shard the bundled corpora and train their tokenizer",
        "--out data/sample\n--out data/sample --vocab-size 1024 --overwrite",
    )
    output = verb.add_argument_group("output")
    output.add_argument("--out", required=True, type=path, help="data root to create")
    output.add_argument(
        "--vocab-size", type=positive, default=512, metavar="N", help="pieces of the tokenizer"
    )
    output.add_argument("--overwrite", action="store_true", help="delete its datasets first")
    # The corpora are small, so processes take longer to start than they save.
    add_workers(verb.add_argument_group("workers"), default=1)
    verb.set_defaults(run=_run_sample)


def _add_tokenizer(verbs: "Verbs") -> None:
    verb = add_verb(
        verbs,
        "tokenizer",
        "train a tokenizer on the texts of datasets",
        "--data data --vocab-size 8192 --out data/tokenizer.model\n"
        "--data data/coco data/asr --vocab-size 4096 --out data/tokenizer.model",
    )
    verb.add_argument_group("input").add_argument(
        "--data", required=True, nargs="+", type=path, metavar="DIR", help="datasets or data roots"
    )
    output = verb.add_argument_group("output")
    output.add_argument(
        "--vocab-size", required=True, type=positive, metavar="N", help="number of pieces"
    )
    output.add_argument("--out", required=True, type=path, help="model file to write")
    verb.set_defaults(run=_run_tokenizer)


def _add_finalize(verbs: "Verbs") -> None:
    verb = add_verb(
        verbs,
        "finalize",
        "write the manifest after all array tasks have finished",
        "data/asr\n/scratch/data/coco",
    )
    verb.add_argument("dir", type=path, metavar="DIR", help="dataset")
    verb.set_defaults(run=_run_finalize)


def _add_index(verbs: "Verbs") -> None:
    verb = add_verb(
        verbs,
        "index",
        "adopt existing WebDataset tars without copying them",
        "data/cc12m --task image-caption\ndata/cc12m --task image-caption --max-bad-fraction 0.05",
        "Tars in folders train, val, and test belong to that split, all others to train.",
    )
    verb.add_argument("dir", type=path, metavar="DIR", help="folder of tars")
    verb.add_argument("--task", required=True, choices=tuple(READERS), help="task of the samples")
    verb.add_argument("--name", help="dataset name (default: name of DIR)")
    verb.add_argument("--license", default="", metavar="NAME", help="license of the corpus")
    verb.add_argument(
        "--max-bad-fraction",
        type=fraction,
        default=0.01,
        metavar="F",
        help="maximum fraction of bad samples",
    )
    verb.set_defaults(run=_run_index)


def default_name(folder: Path) -> str:
    """The folder's name with other characters than [A-Za-z0-9_-] replaced."""
    return re.sub(r"[^A-Za-z0-9_-]", "-", folder.resolve().name)[:64] or "dataset"


def print_tables(manifests: "list[Manifest]") -> None:
    """Print the statistics of datasets, and warnings about them."""
    from data_prep.inspection.stats import dataset_table
    from data_prep.sharding.remarks import remarks

    tables = []
    for manifest in manifests:
        warnings = (f"warning: {remark}" for remark in remarks(manifest))
        tables.append("\n".join([dataset_table(manifest), *warnings]))
    print("\n\n".join(tables))


def _run_sample(arguments: argparse.Namespace) -> None:
    from data_prep.bundled import make_sample, remove_sample

    if arguments.overwrite:
        remove_sample(arguments.out)
    manifests, tokenizer = make_sample(
        arguments.out, arguments.vocab_size, arguments.workers, open_progress
    )
    print_tables(manifests)
    print(f"tokenizer: {tokenizer.vocab_size} pieces, {arguments.out / 'tokenizer.model'}")


def _run_tokenizer(arguments: argparse.Namespace) -> None:
    from data_prep.train_tokenizer import train_tokenizer

    tokenizer = train_tokenizer(arguments.data, arguments.vocab_size, arguments.out)
    print(f"tokenizer: {tokenizer.vocab_size} pieces, {arguments.out}, sha256 {tokenizer.digest}")


def _run_finalize(arguments: argparse.Namespace) -> None:
    from data_prep.sharding.finalize import finalize

    print_tables([finalize(arguments.dir)])


def _run_index(arguments: argparse.Namespace) -> None:
    from data_prep.sharding.adopt import adopt

    if not arguments.dir.is_dir():
        raise DataError(f"folder {arguments.dir} does not exist; pass a folder of *.tar shards")
    name = arguments.name or default_name(arguments.dir)
    skipped = SkippedFiles()
    with open_progress(None, name) as progress:
        manifest = adopt(
            arguments.dir,
            arguments.task,
            name,
            arguments.license,
            arguments.max_bad_fraction,
            progress,
            skipped,
        )
    print_tables([manifest])
    if report := skipped.report():
        print(report)
