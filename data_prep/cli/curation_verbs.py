"""The verbs `retry-bad`, `dedup`, and `exclude`, which change the samples of a finished dataset."""

import argparse
import json
from typing import TYPE_CHECKING

from data_prep.cli.dataset_verbs import print_tables
from data_prep.cli.parser import add_verb, add_workers, any_integer, any_number
from data_prep.options import Comparison
from muomni.command_line import path
from muomni.io.count_progress import open_progress

if TYPE_CHECKING:
    from data_prep.cli.parser import Verbs

# Findings per dataset that a dry run prints.
_NUM_SHOWN = 20


def add_curation_verbs(verbs: "Verbs") -> None:
    """Add the verbs to the command line."""
    _add_retry(verbs)
    _add_dedup(verbs)
    _add_exclude(verbs)


def _add_retry(verbs: "Verbs") -> None:
    verb = add_verb(
        verbs,
        "retry-bad",
        "retry quarantined samples and add the valid ones as new shards",
        "data/coco\ndata/coco --src /new/COCO",
    )
    verb.add_argument("dir", type=path, metavar="DATASET", help="dataset")
    source = verb.add_argument_group("input")
    source.add_argument("--src", type=path, help="location of the corpus if it was moved")
    source.add_argument(
        "--media", type=path, metavar="DIR", help="location of its media if they were moved"
    )
    add_workers(verb.add_argument_group("workers"))
    verb.set_defaults(run=_run_retry)


def _add_dedup(verbs: "Verbs") -> None:
    verb = add_verb(
        verbs,
        "dedup",
        "mask duplicates, and training samples that occur in val or test",
        "data/coco data/cc3m --dry-run\ndata --near --max-distance 6",
    )
    verb.add_argument(
        "dirs", nargs="+", type=path, metavar="DATASET", help="datasets or data roots"
    )
    default = Comparison()
    comparison = verb.add_argument_group("comparison")
    comparison.add_argument(
        "--content-only",
        action="store_true",
        help="compare only the bytes of samples, by their hash; reads no tar",
    )
    comparison.add_argument(
        "--near", action="store_true", help="also find near-duplicate images and texts"
    )
    comparison.add_argument(
        "--max-distance",
        type=any_integer,
        default=default.max_distance,
        metavar="BITS",
        help="maximum distance of image hashes, of 64 bits",
    )
    comparison.add_argument(
        "--min-similarity",
        type=any_number,
        default=default.min_similarity,
        metavar="F",
        help="minimum Jaccard similarity of texts",
    )
    output = verb.add_argument_group("output")
    output.add_argument("--dry-run", action="store_true", help="print findings, write no mask")
    output.add_argument("--json", type=path, metavar="FILE", help="write all findings to this file")
    add_workers(verb.add_argument_group("workers"))
    verb.set_defaults(run=_run_dedup)


def _add_exclude(verbs: "Verbs") -> None:
    verb = add_verb(
        verbs,
        "exclude",
        "write a mask of listed samples that training skips",
        "data/coco --from bad.jsonl\ndata/coco --from bad.jsonl --name reviewed --reason blurry",
    )
    verb.add_argument("dir", type=path, metavar="DATASET", help="dataset")
    verb.add_argument(
        "--from",
        dest="listing",
        type=path,
        required=True,
        metavar="FILE",
        help='JSON lines with "key", or with "id" and "split"',
    )
    verb.add_argument("--name", default="", help="name of the mask (default: name of FILE)")
    verb.add_argument("--reason", default="listed", help="reason stored in the mask")
    verb.set_defaults(run=_run_exclude)


def _run_retry(arguments: argparse.Namespace) -> None:
    from data_prep.sharding.retry import retry_bad

    with open_progress(None, f"{arguments.dir.name} (retry)") as progress:
        outcome = retry_bad(
            arguments.dir, arguments.src, arguments.media, arguments.workers, progress
        )
    print(f"{arguments.dir}: {outcome.num_good} of {outcome.num_tried} samples are valid now")
    if outcome.gone:
        print(f"{len(outcome.gone)} are no longer in the corpus, such as {outcome.gone[0]}")
    print_tables([outcome.manifest])


def _run_dedup(arguments: argparse.Namespace) -> None:
    from data_prep.curation.dedup import find_duplicates, write_masks
    from data_prep.datasets import find_manifests
    from muomni.io.atomic_write import write_atomic

    comparison = Comparison(
        reads_text=not arguments.content_only,
        is_near=arguments.near,
        max_distance=arguments.max_distance,
        min_similarity=arguments.min_similarity,
    )
    outcomes = find_duplicates(find_manifests(arguments.dirs), comparison, arguments.workers)
    for outcome in outcomes:
        print(
            f"{outcome.manifest.root}: {outcome.num_train} training samples, "
            f"{len(outcome.repeats)} duplicates, {len(outcome.leakage)} in val or test"
        )
        if arguments.dry_run:
            for line in outcome.lines[:_NUM_SHOWN]:
                print(f"  {json.dumps(line, ensure_ascii=False)}")
            continue
        for mask in write_masks(outcome):
            print(f"  {mask.path}: {len(mask.ids)} samples")
    if arguments.json:
        report = {str(outcome.manifest.root): outcome.lines for outcome in outcomes}
        write_atomic(arguments.json, (json.dumps(report, indent=1) + "\n").encode())


def _run_exclude(arguments: argparse.Namespace) -> None:
    from data_prep.curation.exclude import exclude_listed
    from muomni.data.shards.manifest import Manifest

    manifest = Manifest.load(arguments.dir)
    name = arguments.name or arguments.listing.stem
    for mask in exclude_listed(manifest, arguments.listing, name, arguments.reason):
        print(f"{mask.path}: {len(mask.ids)} samples of {mask.split}")
