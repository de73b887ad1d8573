"""The verbs that change which samples of a finished dataset count: `retry-bad`, `exclude`."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from data_prep import stats
from data_prep.exclude import exclude_listed
from data_prep.prepare import OpenProgress
from data_prep.retry import retry_bad
from data_prep.task_verb import num_cpus, positive
from muomni.data.manifest import Manifest

if TYPE_CHECKING:
    Verbs: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def add_curation(verbs: "Verbs", open_progress: OpenProgress) -> None:
    """Add the verbs to the command line."""
    _add_retry(verbs, open_progress)
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


def _run_exclude(arguments: argparse.Namespace) -> None:
    manifest = Manifest.load(arguments.dir)
    name = arguments.name or arguments.listing.stem
    for mask in exclude_listed(manifest, arguments.listing, name, arguments.reason):
        print(f"{mask.path}: {len(mask.ids)} samples of {mask.split}")
