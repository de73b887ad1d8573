"""The verb `fetch`, which downloads the files of a table of URLs."""

import argparse
from typing import TYPE_CHECKING

from data_prep.cli.parser import add_verb, fraction, parse_columns, positive
from data_prep.options import ROBOTS, FetchOptions
from muomni.command_line import integer, number, path
from muomni.errors import ConfigError, DataError
from muomni.io.count_progress import open_progress

if TYPE_CHECKING:
    from data_prep.cli.parser import Verbs
    from data_prep.fetching.fetch import Survey
    from data_prep.fetching.journal import Summary

# As in `fetching`, which is imported when the verb runs.
_FORMATS = ("csv", "tsv", "jsonl", "parquet")
_RETRIES = ("temporary", "all", "none")
_TEXT_COLUMNS = {"image": "caption", "audio": "text"}
_TASKS = {"image": "image-caption", "audio": "speech"}
_NUM_SHOWN_HOSTS = 5
_DEFAULT = FetchOptions()
_positive_number = number(above=0)


def add_fetch_verb(verbs: "Verbs") -> None:
    """Add the verb to the command line."""
    verb = add_verb(
        verbs,
        "fetch",
        "download the images or audio clips of a table of URLs",
        "--format parquet --src laion --columns url=URL,caption=TEXT --out fetched --contact me@example.org\n"
        "--format tsv --src clips.tsv --kind audio --out fetched --dry-run",
        "Rerun a stopped command to continue: nothing is downloaded twice, and only temporary failures are "
        "retried. robots.txt and X-Robots-Tag are obeyed, and private addresses refused.",
    )
    verb.usage = "%(prog)s --format FORMAT --src SRC --out DIR [options]"
    _add_input(verb)
    _add_output(verb)
    _add_limits(verb)
    _add_conduct(verb)
    verb.set_defaults(run=_run_fetch)


def _add_input(verb: argparse.ArgumentParser) -> None:
    group = verb.add_argument_group("input")
    group.add_argument("--format", required=True, choices=_FORMATS, help="format of the table")
    group.add_argument("--src", required=True, type=path, help="table, or folder of Parquet files")
    group.add_argument(
        "--columns",
        default="",
        metavar="NAME=COLUMN,...",
        help="columns of the table that have other names than url, caption (images), or text (audio)",
    )
    group.add_argument(
        "--kind", choices=tuple(_TASKS), default=_DEFAULT.kind, help="what the URLs hold"
    )


def _add_output(verb: argparse.ArgumentParser) -> None:
    group = verb.add_argument_group("output")
    group.add_argument("--out", required=True, type=path, metavar="DIR", help="folder to fill")
    group.add_argument(
        "--retry",
        choices=_RETRIES,
        default="temporary",
        help="which failures of earlier runs to retry",
    )
    group.add_argument(
        "--max-bad-fraction",
        type=fraction,
        default=0.5,
        metavar="F",
        help="maximum fraction of rows without a file; above, the exit code is 3",
    )
    group.add_argument(
        "--dry-run", action="store_true", help="read the table and report; download nothing"
    )


def _add_limits(verb: argparse.ArgumentParser) -> None:
    group = verb.add_argument_group("limits")
    group.add_argument(
        "--connections",
        type=integer(1, 1024),
        default=_DEFAULT.num_connections,
        metavar="N",
        help="requests at a time",
    )
    group.add_argument(
        "--per-host",
        type=positive,
        default=_DEFAULT.num_per_host,
        metavar="N",
        help="requests at a time to one host",
    )
    group.add_argument(
        "--rate", type=_positive_number, metavar="N", help="requests per second (default: no limit)"
    )
    group.add_argument(
        "--host-rate",
        type=_positive_number,
        default=_DEFAULT.host_rate,
        metavar="N",
        help="requests per second to one host",
    )
    group.add_argument(
        "--max-mb",
        type=_positive_number,
        metavar="MB",
        help="maximum size of a file in megabytes (default: 50 for images, 500 for audio)",
    )
    group.add_argument(
        "--attempts",
        type=positive,
        default=_DEFAULT.num_attempts,
        metavar="N",
        help="requests per URL if failures are temporary",
    )
    group.add_argument(
        "--max-redirects",
        type=integer(0, 50),
        default=_DEFAULT.max_redirects,
        metavar="N",
        help="redirects per URL",
    )
    for name, text in (
        ("connect", "for a connection"),
        ("read", "without any bytes"),
        ("total", "for a request"),
    ):
        group.add_argument(
            f"--{name}-timeout",
            type=_positive_number,
            default=getattr(_DEFAULT, f"{name}_timeout_s"),
            metavar="S",
            help=f"limit {text}, in seconds",
        )
    group.add_argument(
        "--max-wait",
        type=_positive_number,
        default=_DEFAULT.max_wait_s,
        metavar="S",
        help="longest wait that a server may ask for, in seconds; beyond, its URLs are left for a later run",
    )


def _add_conduct(verb: argparse.ArgumentParser) -> None:
    group = verb.add_argument_group("conduct")
    group.add_argument(
        "--contact",
        default="",
        metavar="TEXT",
        help="mail address or web page for the user agent, so that operators can reach you",
    )
    group.add_argument(
        "--robots",
        choices=ROBOTS,
        default=_DEFAULT.robots,
        help="obey robots.txt and X-Robots-Tag (all), only X-Robots-Tag (tags), or neither",
    )
    group.add_argument(
        "--allow-private",
        action="store_true",
        help="also connect to private, loopback, and link-local addresses",
    )


def _run_fetch(arguments: argparse.Namespace) -> None:
    options = FetchOptions(
        kind=arguments.kind,
        num_connections=arguments.connections,
        num_per_host=arguments.per_host,
        rate=arguments.rate,
        host_rate=arguments.host_rate,
        num_attempts=arguments.attempts,
        max_wait_s=arguments.max_wait,
        connect_timeout_s=arguments.connect_timeout,
        read_timeout_s=arguments.read_timeout,
        total_timeout_s=arguments.total_timeout,
        max_redirects=arguments.max_redirects,
        max_bytes=round((arguments.max_mb or 0) * 10**6),
        contact=arguments.contact,
        robots=arguments.robots,
        allow_private=arguments.allow_private,
    )
    columns = parse_columns(arguments.columns)
    _check_columns(columns, options.kind)
    from data_prep.fetching.fetch import fetch, open_folder, survey
    from data_prep.fetching.journal import JOURNAL
    from data_prep.fetching.url_table import UrlTable

    table = UrlTable(arguments.src, arguments.format, columns, options.kind)
    if arguments.dry_run:
        if (arguments.out / JOURNAL).is_file():
            with open_folder(arguments.out, table) as journal:
                _print_survey(survey(table, journal, arguments.retry), options)
        else:
            _print_survey(survey(table, None, arguments.retry), options)
        return
    summary = fetch(table, arguments.out, options, arguments.retry, open_progress)
    _print_summary(summary, arguments, options.kind)


def _check_columns(columns: dict[str, str], kind: str) -> None:
    if kind in columns:
        raise ConfigError(
            f"--columns {kind}={columns[kind]}: column {kind} is for the paths of the files; "
            f"did you mean url={columns[kind]}?"
        )


def _print_survey(found: "Survey", options: FetchOptions) -> None:
    num_bad = found.bad_rows.total()
    print(f"{found.num_rows:,} rows, {found.num_repeated:,} with the URL of an earlier row")
    if num_bad:
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in found.bad_rows.most_common())
        print(f"{num_bad:,} rows that cannot be fetched: {reasons}")
    print(
        f"{len(found.pending):,} URLs to fetch, {found.num_stored:,} already stored, "
        f"{found.num_failed:,} that failed earlier"
    )
    for host, count in found.hosts.most_common(_NUM_SHOWN_HOSTS):
        hours = count / options.host_rate / 3600
        print(
            f"  {host}: {count:,} URLs, at least {hours:.1f} h at {options.host_rate:g} per second"
        )


def _print_summary(summary: "Summary", arguments: argparse.Namespace, kind: str) -> None:
    """Print what a run has stored; raises `DataError` for too many rows without a file."""
    from muomni.io.table import format_table

    num_bad = summary.num_rows - summary.num_ok
    print(
        f"{arguments.out}: {summary.num_ok:,} of {summary.num_rows:,} rows have a file "
        f"({summary.num_files:,} files, {summary.num_bytes / 1e6:,.1f} MB)"
    )
    if summary.reasons:
        rows = [(reason, f"{count:,}") for reason, count in summary.reasons.most_common()]
        print(format_table(["reason", "rows"], rows))
    if summary.num_temporary:
        print(f"{summary.num_temporary:,} rows failed temporarily; rerun to retry them")
    if num_bad == summary.num_rows or num_bad > arguments.max_bad_fraction * summary.num_rows:
        raise DataError(
            f"{num_bad:,} of {summary.num_rows:,} rows have no file; {arguments.out / 'results.jsonl'} gives "
            "the reasons, and --max-bad-fraction sets the limit"
        )
    text = _TEXT_COLUMNS[kind]
    mapping = "" if text in summary.columns else f" --columns {text}=COLUMN"
    print(
        f"shard them: python -m data_prep {_TASKS[kind]} --format jsonl "
        f"--src {arguments.out / 'table.jsonl'}{mapping} --out DATASET"
    )
