"""The verbs that change which samples of a finished dataset count: `retry-bad`, `dedup`, `exclude`."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from data_prep.cli.task_verb import num_cpus, positive
from data_prep.curation.dedup import Comparison, find_duplicates, write_masks
from data_prep.curation.exclude import exclude_listed
from data_prep.datasets import find_manifests
from data_prep.inspection import stats
from data_prep.sharding.prepare import OpenProgress
from data_prep.sharding.retry import retry_bad
from muomni.data.shards.manifest import Manifest
from muomni.io.atomic_write import write_atomic

# Findings that a dry run shows of each dataset.
_NUM_SHOWN = 20

if TYPE_CHECKING:
    Verbs: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def add_curation(verbs: "Verbs", open_progress: OpenProgress) -> None:
    """Add the verbs to the command line."""
    _add_retry(verbs, open_progress)
    _add_dedup(verbs)
    _add_exclude(verbs)


def _add_retry(verbs: "Verbs", open_progress: OpenProgress) -> None:
    verb = verbs.add_parser(
        "retry-bad", help="try quarantined samples again and add the good ones as new shards"
    )
    verb.add_argument("dir", type=Path, metavar="DATASET")
    verb.add_argument("--src", type=Path, help="where the corpus lies now, when it was moved")
    verb.add_argument("--media", type=Path, help="where its media lie now, when they were moved")
    verb.add_argument("--workers", type=positive, default=num_cpus(), help="processes")
    verb.set_defaults(run=_bind(_run_retry, open_progress))


def _add_dedup(verbs: "Verbs") -> None:
    verb = verbs.add_parser(
        "dedup",
        help="make masks of repeated samples, and of training samples that val or test hold too",
    )
    verb.add_argument("dirs", nargs="+", type=Path, metavar="DATASET", help="or data roots")
    verb.add_argument(
        "--content-only", action="store_true", help="compare whole samples only; reads no tar"
    )
    verb.add_argument(
        "--near", action="store_true", help="also images and texts that are nearly the same"
    )
    default = Comparison()
    verb.add_argument(
        "--max-distance",
        type=int,
        default=default.max_distance,
        metavar="BITS",
        help=f"of 64, between the hashes of near images (default {default.max_distance})",
    )
    verb.add_argument(
        "--min-similarity",
        type=float,
        default=default.min_similarity,
        metavar="SHARE",
        help=f"of the pieces of near texts (default {default.min_similarity:g})",
    )
    verb.add_argument("--dry-run", action="store_true", help="say what is found, write nothing")
    verb.add_argument("--workers", type=positive, default=num_cpus(), help="processes")
    verb.add_argument("--json", type=Path, help="write all that was found to this file")
    verb.set_defaults(run=_run_dedup)


def _add_exclude(verbs: "Verbs") -> None:
    verb = verbs.add_parser("exclude", help="make a mask of listed samples, for training to skip")
    verb.add_argument("dir", type=Path, metavar="DATASET")
    verb.add_argument(
        "--from",
        dest="listing",
        type=Path,
        required=True,
        help='JSON lines with "key", or "id" and "split"',
    )
    verb.add_argument("--name", default="", help="name of the mask (default: that of the list)")
    verb.add_argument("--reason", default="listed", help="why, for the mask")
    verb.set_defaults(run=_run_exclude)


def _bind(
    run: Callable[[argparse.Namespace, OpenProgress], None], open_progress: OpenProgress
) -> Callable[[argparse.Namespace], None]:
    return lambda arguments: run(arguments, open_progress)


def _run_retry(arguments: argparse.Namespace, open_progress: OpenProgress) -> None:
    with open_progress(None, f"{arguments.dir.name} (retry)") as progress:
        outcome = retry_bad(
            arguments.dir, arguments.src, arguments.media, arguments.workers, progress
        )
    print(f"{arguments.dir}: {outcome.num_good} of {outcome.num_tried} samples are good now")
    if outcome.gone:
        print(f"{len(outcome.gone)} are not in the corpus any more, like {outcome.gone[0]}")
    print(stats.table(outcome.manifest, stats.split_stats(outcome.manifest)))


def _run_dedup(arguments: argparse.Namespace) -> None:
    comparison = Comparison(
        reads_text=not arguments.content_only,
        is_near=arguments.near,
        max_distance=arguments.max_distance,
        min_similarity=arguments.min_similarity,
    )
    manifests = find_manifests(arguments.dirs)
    outcomes = find_duplicates(manifests, comparison, arguments.workers)
    for outcome in outcomes:
        print(
            f"{outcome.manifest.root}: {outcome.num_train} training samples, "
            f"{len(outcome.repeats)} repeat others, {len(outcome.leakage)} are in val or test"
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
    manifest = Manifest.load(arguments.dir)
    name = arguments.name or arguments.listing.stem
    for mask in exclude_listed(manifest, arguments.listing, name, arguments.reason):
        print(f"{mask.path}: {len(mask.ids)} samples of {mask.split}")
