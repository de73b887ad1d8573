"""Entry point of `python -m data_prep VERB ...`."""

import sys
from collections.abc import Sequence

from data_prep.cli.cache_verbs import add_cache_verbs
from data_prep.cli.curation_verbs import add_curation_verbs
from data_prep.cli.dataset_verbs import add_dataset_verbs
from data_prep.cli.fetch_verb import add_fetch_verb
from data_prep.cli.report_verbs import add_report_verbs
from data_prep.cli.task_verbs import add_task_verbs
from muomni.command_line import CommandParser
from muomni.data.text.graphemes import cut_middle
from muomni.errors import DataError, MuomniError, exit_on_error

# Values of a corpus in a message can be of any length.
_MAX_MESSAGE_CHARS = 1000

_EPILOG = """\
examples:
  %(prog)s sample --out data/sample
  %(prog)s image-caption --format coco --src COCO --out data/coco --workers 8
  %(prog)s speech --format librispeech --src LibriSpeech --out data/asr --split-from source
  %(prog)s tokenizer --data data/coco data/asr --vocab-size 8192 --out data/tokenizer.model
  %(prog)s verify --full data/coco
"""


def main(argv: Sequence[str] | None = None, prog: str = "python -m data_prep") -> None:
    """Parse the command line and run its verb; user errors exit with one line.

    Args:
        argv: the arguments; those of the process by default.
        prog: name of the command in help and errors.
    """
    with exit_on_error(prog):
        arguments = build_parser(prog).parse_args(argv)
    try:
        with exit_on_error(f"{prog} {arguments.verb}"):
            try:
                arguments.run(arguments)
            except OSError as error:
                path = f"{error.filename}: " if error.filename else ""
                raise DataError(_shortened(f"{path}{error.strerror or error}")) from error
            except MuomniError as error:
                if len(str(error)) > _MAX_MESSAGE_CHARS:
                    raise type(error)(_shortened(str(error))) from error
                raise
    except KeyboardInterrupt:
        print("interrupted; rerun the same command to continue", file=sys.stderr)
        raise SystemExit(130) from None


def _shortened(message: str) -> str:
    return cut_middle(message, _MAX_MESSAGE_CHARS)


def build_parser(prog: str = "python -m data_prep") -> CommandParser:
    """The parser with all verbs."""
    parser = CommandParser(
        prog=prog,
        description="Convert raw corpora to the WebDataset shards that muomni trains on.",
        epilog=_EPILOG,
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB", title="verbs")
    add_task_verbs(verbs)
    add_fetch_verb(verbs)
    add_dataset_verbs(verbs)
    add_cache_verbs(verbs)
    add_report_verbs(verbs)
    add_curation_verbs(verbs)
    return parser
