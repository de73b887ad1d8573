"""The verbs `verify`, `stats`, `inspect`, and `mix`, which report on datasets."""

import argparse
import json
from dataclasses import asdict
from typing import TYPE_CHECKING

from data_prep.cli.dataset_verbs import print_tables
from data_prep.cli.parser import add_verb, add_workers, positive
from data_prep.readers import READERS
from muomni.command_line import number, path
from muomni.errors import ConfigError, DataError

if TYPE_CHECKING:
    from data_prep.cli.parser import Verbs
    from muomni.data.shards.manifest import Manifest


def add_report_verbs(verbs: "Verbs") -> None:
    """Add the verbs to the command line."""
    _add_verify(verbs)
    _add_stats(verbs)
    _add_inspect(verbs)
    _add_mix(verbs)


def _add_verify(verbs: "Verbs") -> None:
    verb = add_verb(
        verbs,
        "verify",
        "check datasets on disk",
        "data/coco\n--full --decode 100 --quarantine data/asr",
    )
    verb.add_argument("dirs", nargs="+", type=path, metavar="DIR", help="datasets or data roots")
    checks = verb.add_argument_group("checks")
    level = checks.add_mutually_exclusive_group()
    level.add_argument(
        "--quick", action="store_true", help="check only sizes and counts; this is the default"
    )
    level.add_argument(
        "--full", action="store_true", help="also check SHA-256, tar headers, and keys"
    )
    checks.add_argument(
        "--decode",
        type=number(0, 100),
        default=0.0,
        metavar="P",
        help="percentage of samples to decode",
    )
    output = verb.add_argument_group("output")
    output.add_argument(
        "--quarantine",
        action="store_true",
        help="write a mask of the bad samples, which training skips and verify no longer counts as problems",
    )
    output.add_argument(
        "--json", type=path, metavar="FILE", help="also write the report to this file"
    )
    add_workers(verb.add_argument_group("workers"))
    verb.set_defaults(run=_run_verify)


def _add_stats(verbs: "Verbs") -> None:
    verb = add_verb(
        verbs,
        "stats",
        "show statistics of datasets",
        "data/coco --content 1000\n--json data > stats.json",
    )
    verb.add_argument("dirs", nargs="+", type=path, metavar="DIR", help="datasets or data roots")
    verb.add_argument(
        "--content",
        type=positive,
        metavar="N",
        help="also read N samples of each split, for scripts of letters, languages, sample rates, clipping, "
        "silence, and image sizes",
    )
    verb.add_argument("--json", action="store_true", help="print JSON")
    verb.set_defaults(run=_run_stats)


def _add_inspect(verbs: "Verbs") -> None:
    verb = add_verb(
        verbs,
        "inspect",
        "show samples of a dataset, or the content of a data root",
        "data/coco --split val --count 32 --png sheet.png\ndata/asr --html samples",
    )
    verb.add_argument("dir", type=path, metavar="DIR", help="dataset or data root")
    verb.add_argument("--split", default="train", help="split of the samples")
    verb.add_argument("--count", type=positive, default=16, metavar="N", help="number of samples")
    verb.add_argument(
        "--png", type=path, metavar="FILE", help="also draw images, waveforms, and spectrograms"
    )
    verb.add_argument(
        "--html",
        type=path,
        metavar="FOLDER",
        help="also write a page with images, players, and texts, and the audio clips as WAV files",
    )
    verb.set_defaults(run=_run_inspect)


def _add_mix(verbs: "Verbs") -> None:
    verb = add_verb(
        verbs,
        "mix",
        "preview a mix of corpora (config section data.mix)",
        "--data data --task speech --alpha 0.5\n"
        "--data data --weights coco=2 cc3m=1 --steps 10000 --samples-per-step 256",
    )
    corpora = verb.add_argument_group("input")
    corpora.add_argument("--data", required=True, type=path, metavar="DIR", help="data root")
    corpora.add_argument(
        "--task", choices=tuple(READERS), help="task of the datasets (default: the only one)"
    )
    mix = verb.add_argument_group("mix")
    mix.add_argument(
        "--weights", nargs="+", metavar="NAME=WEIGHT", help="relative weights, data.mix.weights"
    )
    mix.add_argument(
        "--alpha", type=number(0, 10), help="exponent of corpus sizes, data.mix.alpha (default: 1)"
    )
    mix.add_argument(
        "--unit", default="samples", metavar="UNIT", help="unit of the shares: samples or length"
    )
    run = verb.add_argument_group("run")
    run.add_argument(
        "--steps", type=positive, metavar="N", help="steps of the run (default: one epoch)"
    )
    run.add_argument(
        "--samples-per-step", type=positive, metavar="N", help="over all ranks; needs --steps"
    )
    verb.add_argument_group("output").add_argument("--json", action="store_true", help="print JSON")
    verb.set_defaults(run=_run_mix)


def _run_verify(arguments: argparse.Namespace) -> None:
    from data_prep.datasets import find_manifests
    from data_prep.inspection.verify import verify
    from muomni.io.atomic_write import write_atomic

    problems: list[str] = []
    reports = {}
    for manifest in find_manifests(arguments.dirs):
        report = verify(
            manifest, arguments.full, arguments.decode, arguments.workers, arguments.quarantine
        )
        problems += report.problems
        reports[str(manifest.root)] = asdict(report)
        state = f"{len(report.problems)} problems" if report.problems else "ok"
        decoded = f", {report.num_decoded} decoded" if arguments.decode else ""
        num_excluded = len(report.excluded)
        excluded = f", {num_excluded} problems of samples under a mask" if num_excluded else ""
        print(
            f"{manifest.root}: {report.num_samples} samples in {report.num_shards} shards"
            f"{decoded}: {state}{excluded}"
        )
        for line in (*report.problems, *report.masks):
            print(f"  {line}")
    if arguments.json:
        write_atomic(arguments.json, (json.dumps(reports, indent=1) + "\n").encode())
    if problems:
        raise DataError(f"{len(problems)} problems found, the first: {problems[0]}")


def _run_stats(arguments: argparse.Namespace) -> None:
    from data_prep.datasets import find_manifests
    from data_prep.inspection.content import content_lines, content_stats
    from data_prep.inspection.stats import split_stats

    manifests = find_manifests(arguments.dirs)
    if not arguments.json:
        print_tables(manifests)
    stats = {}
    for manifest in manifests:
        splits = stats[str(manifest.root)] = split_stats(manifest) if arguments.json else {}
        for split in manifest.splits if arguments.content else ():
            content = content_stats(manifest, split, arguments.content)
            if arguments.json:
                splits[split].update(content)
            else:
                print("\n".join([f"{manifest.root}", *content_lines(split, content)]))
    if arguments.json:
        print(json.dumps(stats, indent=1, ensure_ascii=False))


def _run_inspect(arguments: argparse.Namespace) -> None:
    from data_prep.datasets import find_manifests
    from data_prep.inspection.preview import describe
    from data_prep.inspection.stats import data_root_table
    from muomni.data.shards.manifest import MANIFEST_NAME

    if arguments.png and arguments.png.suffix.lower() != ".png":
        raise ConfigError(f"--png {arguments.png} must end in .png")
    if arguments.html and arguments.html.exists() and not arguments.html.is_dir():
        raise ConfigError(f"--html {arguments.html} is not a folder; choose another name")
    manifests = find_manifests([arguments.dir])
    if not (arguments.dir / MANIFEST_NAME).is_file():
        if flag := "--png" if arguments.png else "--html" if arguments.html else "":
            raise ConfigError(f"{flag} requires a single dataset, but {arguments.dir} has several")
        print(data_root_table(manifests, arguments.dir))
        return
    (manifest,) = manifests
    print(describe(manifest, arguments.split, arguments.count))
    if arguments.png:
        _draw_sheet(manifest, arguments)
    if arguments.html:
        from data_prep.inspection.page import save_page

        page = save_page(manifest, arguments.split, arguments.count, arguments.html)
        print(f"page of samples: {page}")


def _draw_sheet(manifest: "Manifest", arguments: argparse.Namespace) -> None:
    from data_prep.inspection.fonts import Fonts
    from data_prep.inspection.preview import sheet

    fonts = Fonts()
    image = sheet(manifest, arguments.split, arguments.count, fonts)
    if image is None:
        raise DataError(f"the samples of {arguments.dir} have neither images nor audio clips")
    arguments.png.parent.mkdir(parents=True, exist_ok=True)
    image.save(arguments.png)
    print(f"images and audio clips: {arguments.png}")
    if fonts.missing:
        print(
            f"no installed font has {len(fonts.missing)} of the characters, such as "
            f"{min(fonts.missing)!r}; install fonts (Debian: fonts-noto-core, fonts-noto-cjk) or use --html"
        )


def _run_mix(arguments: argparse.Namespace) -> None:
    from data_prep.curation.mix_report import mix_rows, mix_table, select_datasets
    from muomni.config.loading import validate
    from muomni.config.run import MixSection

    if (arguments.steps is None) != (arguments.samples_per_step is None):
        raise ConfigError("--steps and --samples-per-step must be used together")
    content: dict[str, object] = {"unit": arguments.unit}
    if arguments.weights:
        content["weights"] = dict(map(_name_and_weight, arguments.weights))
    if arguments.alpha is not None or not arguments.weights:
        content["alpha"] = 1.0 if arguments.alpha is None else arguments.alpha
    mix = validate(MixSection, content, "the command line")
    num_draws = arguments.steps * arguments.samples_per_step if arguments.steps else None
    rows = mix_rows(select_datasets(arguments.data, arguments.task), mix, num_draws)
    print(
        json.dumps([asdict(row) for row in rows], indent=1) if arguments.json else mix_table(rows)
    )


def _name_and_weight(text: str) -> tuple[str, float]:
    name, _, weight = text.rpartition("=")
    try:
        return name, float(weight)
    except ValueError:
        raise ConfigError(f"--weights takes NAME=WEIGHT, got {text!r}") from None
