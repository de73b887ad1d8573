"""Command line of data preparation: `python -m data_prep VERB ...`."""

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from data_prep.bundled import make_sample, remove_sample
from data_prep.cli.curation_verbs import add_curation
from data_prep.cli.task_verb import add_task, default_name, num_cpus, positive, run_task
from data_prep.curation.mix_report import datasets_of, mix_rows, mix_table
from data_prep.data_root import data_root_table
from data_prep.datasets import find_manifests
from data_prep.inspection import preview, stats
from data_prep.inspection.verify import verify
from data_prep.sharding import adopt
from data_prep.sharding.finalize import finalize
from data_prep.sharding.sharder import Progress
from data_prep.train_tokenizer import train_tokenizer
from muomni.config.loading import validate
from muomni.config.run import MixSection
from muomni.data.shards.manifest import MANIFEST_NAME, TASKS, Manifest
from muomni.errors import ConfigError, DataError, exit_on_error
from muomni.io.atomic_write import write_atomic

_EPILOG = """\
examples:
  python -m data_prep sample --out data/sample
  python -m data_prep image-caption --format coco --src COCO --out data/coco --workers 8
  python -m data_prep speech --format librispeech --src LibriSpeech --out data/asr --split-from source
  python -m data_prep tokenizer --data data/coco data/asr --vocab-size 8192 --out data/tokenizer.model
  python -m data_prep verify --full data/coco
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and run its verb; errors of the user leave with one line."""
    arguments = _parser().parse_args(argv)
    try:
        with exit_on_error(f"data_prep {arguments.verb}"):
            try:
                arguments.run(arguments)
            except OSError as error:
                place = f"{error.filename}: " if error.filename else ""
                raise DataError(f"{place}{error.strerror or error}") from error
    except KeyboardInterrupt:
        print("stopped; the same command continues where it stopped", file=sys.stderr)
        raise SystemExit(130) from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data_prep",
        description="Raw corpora to WebDataset shards that muomni trains on.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for task in TASKS:
        add_task(verbs, task).set_defaults(run=_run_task)
    _add_sample(verbs)
    _add_tokenizer(verbs)
    verb = verbs.add_parser("finalize", help="write the manifest when all array tasks are done")
    verb.add_argument("dir", type=Path, metavar="DIR")
    verb.set_defaults(run=_run_finalize)
    _add_reports(verbs)
    _add_mix(verbs)
    _add_index(verbs)
    add_curation(verbs, _open_progress)
    return parser


def _add_sample(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    verb = verbs.add_parser("sample", help="shard the bundled corpora and train their tokenizer")
    verb.add_argument("--out", required=True, type=Path, help="data root to make")
    verb.add_argument("--vocab-size", type=positive, default=512, help="pieces (default 512)")
    # The corpora are small: starting processes costs more than they save.
    verb.add_argument("--workers", type=positive, default=1, help="processes (default 1)")
    verb.add_argument("--overwrite", action="store_true", help="delete its datasets first")
    verb.set_defaults(run=_run_sample)


def _add_tokenizer(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    verb = verbs.add_parser("tokenizer", help="train a tokenizer on the text of datasets")
    verb.add_argument("--data", required=True, nargs="+", type=Path, help="datasets or data roots")
    verb.add_argument("--vocab-size", required=True, type=positive, help="number of pieces")
    verb.add_argument("--out", required=True, type=Path, help="model file to write")
    verb.set_defaults(run=_run_tokenizer)


def _add_reports(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    verb = verbs.add_parser("verify", help="check datasets on disk")
    verb.add_argument("dirs", nargs="+", type=Path, metavar="DIR", help="datasets or data roots")
    level = verb.add_mutually_exclusive_group()
    level.add_argument("--quick", action="store_true", help="sizes and counts only (default)")
    level.add_argument("--full", action="store_true", help="also digests, headers, keys")
    verb.add_argument(
        "--decode", type=float, default=0.0, metavar="P", help="decode P %% of samples"
    )
    verb.add_argument("--workers", type=positive, default=num_cpus(), help="processes")
    verb.add_argument("--json", type=Path, help="write the report to this file")
    verb.set_defaults(run=_run_verify)
    verb = verbs.add_parser("stats", help="metrics of datasets")
    verb.add_argument("dirs", nargs="+", type=Path, metavar="DIR", help="datasets or data roots")
    verb.add_argument("--json", action="store_true", help="print JSON")
    verb.set_defaults(run=_run_stats)
    verb = verbs.add_parser("inspect", help="show samples of a dataset, or what a data root holds")
    verb.add_argument("dir", type=Path, metavar="DIR", help="dataset, or folder of datasets")
    verb.add_argument("--split", default="train")
    verb.add_argument("--count", type=positive, default=16, help="samples to show")
    verb.add_argument("--png", type=Path, help="write images, waveforms and spectrograms")
    verb.set_defaults(run=_run_inspect)


def _add_mix(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    verb = verbs.add_parser("mix", help="show what a mix of corpora comes to (config data.mix)")
    verb.add_argument("--data", required=True, type=Path, metavar="DIR", help="data root")
    verb.add_argument("--task", choices=TASKS, help="whose datasets (default: the only one)")
    verb.add_argument(
        "--weights", nargs="+", metavar="NAME=WEIGHT", help="as data.mix.weights, relative"
    )
    verb.add_argument("--alpha", type=float, help="as data.mix.alpha (default 1, as they are)")
    verb.add_argument(
        "--unit", default="samples", help="samples or length: what shares count (default samples)"
    )
    verb.add_argument("--steps", type=positive, help="steps of the run (default: one epoch)")
    verb.add_argument("--samples-per-step", type=positive, help="over all ranks, with --steps")
    verb.add_argument("--json", action="store_true", help="print JSON")
    verb.set_defaults(run=_run_mix)


def _add_index(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    verb = verbs.add_parser(
        "index", help="adopt WebDataset tars made elsewhere, without copying them"
    )
    verb.add_argument("dir", type=Path, metavar="DIR", help="folder of tars (train/, val/, test/)")
    verb.add_argument("--task", required=True, choices=TASKS)
    verb.add_argument("--name", help="dataset name (default: the name of DIR)")
    verb.add_argument("--license", default="")
    verb.add_argument("--max-bad-fraction", type=float, default=0.01)
    verb.set_defaults(run=_run_index)


def _run_task(arguments: argparse.Namespace) -> None:
    manifest = run_task(arguments, _open_progress)
    if manifest is not None:
        _print_stats([manifest])


def _run_sample(arguments: argparse.Namespace) -> None:
    if arguments.overwrite:
        remove_sample(arguments.out)
    manifests, tokenizer = make_sample(
        arguments.out, arguments.vocab_size, arguments.workers, _open_progress
    )
    _print_stats(manifests)
    print(f"tokenizer: {tokenizer.vocab_size} pieces, {arguments.out / 'tokenizer.model'}")


def _run_tokenizer(arguments: argparse.Namespace) -> None:
    tokenizer = train_tokenizer(arguments.data, arguments.vocab_size, arguments.out)
    print(f"tokenizer: {tokenizer.vocab_size} pieces, {arguments.out}, sha256 {tokenizer.digest}")


def _run_finalize(arguments: argparse.Namespace) -> None:
    _print_stats([finalize(arguments.dir)])


def _run_verify(arguments: argparse.Namespace) -> None:
    problems: list[str] = []
    reports = {}
    for manifest in find_manifests(arguments.dirs):
        report = verify(manifest, arguments.full, arguments.decode, arguments.workers)
        problems += report.problems
        reports[str(manifest.root)] = asdict(report)
        state = f"{len(report.problems)} problems" if report.problems else "sound"
        decoded = f", {report.num_decoded} decoded" if arguments.decode else ""
        print(
            f"{manifest.root}: {report.num_samples} samples in {report.num_shards} shards"
            f"{decoded}: {state}"
        )
        for problem in report.problems:
            print(f"  {problem}")
    if arguments.json:
        write_atomic(arguments.json, (json.dumps(reports, indent=1) + "\n").encode())
    if problems:
        raise DataError(f"{len(problems)} problems found, the first: {problems[0]}")


def _run_stats(arguments: argparse.Namespace) -> None:
    manifests = find_manifests(arguments.dirs)
    if arguments.json:
        metrics = {str(manifest.root): stats.split_stats(manifest) for manifest in manifests}
        print(json.dumps(metrics, indent=1))
    else:
        _print_stats(manifests)


def _run_inspect(arguments: argparse.Namespace) -> None:
    if arguments.png and arguments.png.suffix.lower() != ".png":
        raise ConfigError(f"--png {arguments.png} must end in .png")
    manifests = find_manifests([arguments.dir])
    if not (arguments.dir / MANIFEST_NAME).is_file():
        if arguments.png:
            raise ConfigError(f"--png shows samples of one dataset, {arguments.dir} holds several")
        print(data_root_table(manifests, arguments.dir))
        return
    (manifest,) = manifests
    print(preview.describe(manifest, arguments.split, arguments.count))
    if arguments.png:
        if not preview.save_sheet(manifest, arguments.split, arguments.count, arguments.png):
            raise DataError(f"the samples of {arguments.dir} have neither images nor audio clips")
        print(f"images and audio clips: {arguments.png}")


def _run_mix(arguments: argparse.Namespace) -> None:
    if (arguments.steps is None) != (arguments.samples_per_step is None):
        raise ConfigError("--steps and --samples-per-step go together; give both or none")
    content: dict[str, object] = {"unit": arguments.unit}
    if arguments.weights:
        content["weights"] = dict(map(_name_and_weight, arguments.weights))
    if arguments.alpha is not None or not arguments.weights:
        content["alpha"] = 1.0 if arguments.alpha is None else arguments.alpha
    mix = validate(MixSection, content, "the command line")
    num_draws = arguments.steps * arguments.samples_per_step if arguments.steps else None
    rows = mix_rows(datasets_of(arguments.data, arguments.task), mix, num_draws)
    print(
        json.dumps([asdict(row) for row in rows], indent=1) if arguments.json else mix_table(rows)
    )


def _name_and_weight(text: str) -> tuple[str, float]:
    name, _, weight = text.rpartition("=")
    try:
        return name, float(weight)
    except ValueError:
        raise ConfigError(f"--weights takes NAME=WEIGHT, not '{text}'") from None


def _run_index(arguments: argparse.Namespace) -> None:
    if not arguments.dir.is_dir():
        raise DataError(f"folder {arguments.dir} does not exist; name a folder of *.tar shards")
    name = arguments.name or default_name(arguments.dir)
    with _open_progress(None, name) as progress:
        manifest = adopt.adopt(
            arguments.dir,
            arguments.task,
            name,
            arguments.license,
            arguments.max_bad_fraction,
            progress,
        )
    _print_stats([manifest])


def _print_stats(manifests: list[Manifest]) -> None:
    print("\n\n".join(stats.table(manifest, stats.split_stats(manifest)) for manifest in manifests))


@contextlib.contextmanager
def _open_progress(total: int | None, name: str) -> Iterator[Progress]:
    """A progress bar with rate on standard error; silent when that is no terminal."""
    with tqdm(
        total=total,
        desc=name,
        unit=" samples",
        file=sys.stderr,
        disable=not sys.stderr.isatty(),
        dynamic_ncols=True,
    ) as bar:
        yield bar
