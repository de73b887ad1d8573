"""The verbs that shard a corpus, one per task: `python -m data_prep TASK --format NAME ...`."""

import argparse
import os
from typing import TYPE_CHECKING, Any

from data_prep.cli.dataset_verbs import default_name, print_tables
from data_prep.cli.parser import add_verb, add_workers, fraction, parse_columns
from data_prep.cli.task_options import (
    add_filters,
    add_preprocessing,
    parse_filters,
    parse_preprocessing,
)
from data_prep.options import DOCUMENTS, OVERLAPS, ReaderOptions
from data_prep.readers import READERS
from muomni.command_line import MAX_SEED, integer, path
from muomni.errors import ConfigError
from muomni.io.count_progress import open_progress

if TYPE_CHECKING:
    from data_prep.cli.parser import Verbs
    from muomni.data.shards.manifest import Task

# Task: summary and examples.
_TASKS: "dict[Task, tuple[str, str]]" = {
    "text": (
        "shard documents",
        "--format txt --src corpus.txt --out data/text\n"
        "--format jsonl --src web.jsonl --columns text=content --out data/web --min-chars 100",
    ),
    "image-caption": (
        "shard images with captions",
        "--format coco --src COCO --out data/coco --workers 8\n"
        "--format parquet --src laion --out data/laion --resize-shorter 256 --image-format jpeg",
    ),
    "speech": (
        "shard audio clips with transcripts (to train speech recognition and the codec)",
        "--format librispeech --src LibriSpeech --out data/asr --split-from source\n"
        "--format lhotse --src manifests --media audio --out data/calls --sample-rate 16000",
    ),
    "tts": (
        "shard audio clips with the texts to speak",
        "--format ljspeech --src LJSpeech-1.1 --out data/tts\n"
        "--format vctk --src VCTK --out data/vctk --group speaker",
    ),
    "sft": (
        "shard conversations with images and audio clips",
        "--format llava --src llava.json --media images --out data/llava\n"
        "--format parquet --src the_cauldron --out data/cauldron",
    ),
}

# Options of tables, and the formats that take them.
_TABLE_OPTIONS = {
    "columns": ("csv", "tsv", "jsonl", "parquet"),
    "delimiter": ("csv", "tsv"),
    "quotes": ("csv", "tsv"),
}


def add_task_verbs(verbs: "Verbs") -> None:
    """Add the verbs to the command line."""
    for task in _TASKS:
        _add_task(verbs, task)


def _add_task(verbs: "Verbs", task: "Task") -> None:
    summary, examples = _TASKS[task]
    verb = add_verb(
        verbs, task, summary, examples, "Rerun a stopped command to continue; shards are kept."
    )
    verb.usage = "%(prog)s --format FORMAT --src SRC --out DIR [options]"
    _add_input(verb, task)
    _add_output(verb)
    _add_splits(verb)
    add_filters(verb, task)
    add_preprocessing(verb, task)
    workers = verb.add_argument_group("workers")
    add_workers(workers)
    workers.add_argument(
        "--array-task",
        metavar="I/N",
        help="write only the shards of task I of N, starting at 0 (default: SLURM_ARRAY_TASK_ID and "
        "SLURM_ARRAY_TASK_COUNT if set)",
    )
    verb.set_defaults(task=task, run=_run_task)


def _add_input(verb: argparse.ArgumentParser, task: "Task") -> None:
    group = verb.add_argument_group("input")
    group.add_argument(
        "--format",
        required=True,
        choices=sorted(READERS[task]),
        metavar="FORMAT",
        help=f"corpus layout: {', '.join(sorted(READERS[task]))}",
    )
    group.add_argument(
        "--src", required=True, type=path, help="folder of the corpus, or its table or file"
    )
    if task == "text":
        group.add_argument(
            "--document", choices=DOCUMENTS, default="line", help="unit of plain text"
        )
    else:
        group.add_argument(
            "--media",
            type=path,
            metavar="DIR",
            help="base of relative media paths in a table, manifest, or conversation (default: its folder)",
        )
    if task == "image-caption":
        group.add_argument(
            "--annotations",
            default="",
            metavar="PATTERN",
            help="annotation files of COCO, such as captions_*.json",
        )
    if task in ("speech", "tts"):
        _add_speech_input(group)
    group.add_argument(
        "--columns",
        default="",
        metavar="NAME=COLUMN,...",
        help="columns of a table that have other names, or fields of objects, such as text=translation.en",
    )
    if task == "sft":
        group.add_argument(
            "--tool-turns",
            choices=("keep", "reject"),
            default="keep",
            help="keep tool calls as text of the assistant and their results as text of the user, or "
            "reject conversations with tools",
        )
    else:
        group.add_argument(
            "--delimiter",
            default="",
            metavar="CHAR",
            help="between the fields of csv (,) and tsv (tab)",
        )
        group.add_argument(
            "--quotes",
            choices=("yes", "no"),
            default="",
            help="whether quotation marks enclose fields (default: yes for csv, no for tsv)",
        )


def _add_speech_input(group: "argparse._ArgumentGroup") -> None:
    group.add_argument(
        "--subsets",
        nargs="+",
        default=(),
        metavar="NAME",
        help="subsets of LibriSpeech, LibriTTS, MLS, AISHELL, GigaSpeech, or Common Voice (default: all)",
    )
    group.add_argument(
        "--group",
        choices=("chapter", "speaker", "transcript"),
        default="",
        help="what must not be divided between splits; for segments, chapter is the audio file "
        "(default: depends on the format)",
    )
    group.add_argument(
        "--keep-case", action="store_true", help="keep the upper case of LibriSpeech and GigaSpeech"
    )
    group.add_argument(
        "--text",
        choices=("normalized", "original"),
        default="",
        help="text of LibriTTS (default: normalized)",
    )
    group.add_argument(
        "--language", default="", metavar="CODE", help="language code for all samples"
    )
    group.add_argument("--speaker", default="", metavar="NAME", help="speaker of all samples")


def _add_output(verb: argparse.ArgumentParser) -> None:
    group = verb.add_argument_group("output")
    group.add_argument("--out", required=True, type=path, metavar="DIR", help="dataset to create")
    group.add_argument("--name", help="dataset name (default: name of --out)")
    group.add_argument(
        "--license", default="", metavar="NAME", help="license of the corpus, for the manifest"
    )
    group.add_argument(
        "--shard-size",
        default="256MB",
        metavar="SIZE",
        help="size such as 256MB, or number of samples",
    )
    group.add_argument(
        "--max-bad-fraction",
        type=fraction,
        default=0.01,
        metavar="F",
        help="maximum fraction of bad samples",
    )
    group.add_argument("--overwrite", action="store_true", help="delete the dataset at --out first")


def _add_splits(verb: argparse.ArgumentParser) -> None:
    group = verb.add_argument_group("splits")
    group.add_argument(
        "--val-fraction",
        type=fraction,
        default=0.01,
        metavar="F",
        help="fraction held out for validation during training",
    )
    group.add_argument(
        "--test-fraction",
        type=fraction,
        default=0.01,
        metavar="F",
        help="fraction held out for evaluation",
    )
    group.add_argument(
        "--split-from",
        choices=("hash", "source"),
        default="hash",
        help="hash: by the hash of the group, consistent across corpora; source: as declared by the "
        "corpus, with missing splits taken from train by hash",
    )
    group.add_argument(
        "--overlap",
        choices=OVERLAPS,
        default="refuse",
        help="what to do if the corpus declares several splits for a group: refuse; drop: keep its samples of "
        "test, else val, and drop the others; move: move all to train, else val; allow: keep all, which "
        "evaluation reports",
    )
    group.add_argument(
        "--seed", type=integer(0, MAX_SEED), default=0, metavar="N", help="seed of the sample order"
    )


def _run_task(arguments: argparse.Namespace) -> None:
    """Shard a corpus; raises as `prepare` does, and `ConfigError` for invalid options."""
    from data_prep.sharding.prepare import prepare, remove_dataset
    from data_prep.sharding.shard_plan import ShardingOptions

    given = vars(arguments)
    _check_table_options(given)
    reader_options = ReaderOptions(
        media_root=given.get("media"),
        document=given.get("document", "line"),
        group_by=given.get("group", ""),
        columns=parse_columns(given.get("columns") or ""),
        delimiter=_delimiter(given.get("delimiter") or ""),
        quotes=given.get("quotes") or "",
        annotations=given.get("annotations", ""),
        subsets=tuple(given.get("subsets", ())),
        keep_case=given.get("keep_case", False),
        text_form=given.get("text", ""),
        language=given.get("language", ""),
        speaker=given.get("speaker", ""),
        keeps_tools=given.get("tool_turns", "keep") == "keep",
    )
    options = ShardingOptions(
        name=arguments.name or default_name(arguments.out),
        task=arguments.task,
        reader=arguments.format,
        reader_options=reader_options.as_text(),
        source=arguments.src,
        media_root=reader_options.media_root,
        seed=arguments.seed,
        val_fraction=arguments.val_fraction,
        test_fraction=arguments.test_fraction,
        split_from=arguments.split_from,
        overlap=arguments.overlap,
        shard_size=arguments.shard_size,
        max_bad_fraction=arguments.max_bad_fraction,
        license=arguments.license,
        filters=parse_filters(arguments),
        preprocessing=parse_preprocessing(arguments),
    )
    array_task = _array_task(arguments.array_task)
    if arguments.overwrite:
        if array_task[1] > 1:
            raise ConfigError(
                "--overwrite cannot be used in a job array, since its tasks would race"
            )
        remove_dataset(arguments.out)
    manifest = prepare(
        options, reader_options, arguments.out, arguments.workers, array_task, open_progress
    )
    if manifest is None:
        print(f"task {array_task[0]} of {array_task[1]} is done; the last one writes the manifest")
    else:
        print_tables([manifest])
    if skipped := reader_options.skipped.report():
        print(skipped)


def _array_task(text: str | None) -> tuple[int, int]:
    """Index and number of array tasks from the flag or from Slurm; (0, 1) by default."""
    if text is None:
        index = os.environ.get("SLURM_ARRAY_TASK_ID")
        count = os.environ.get("SLURM_ARRAY_TASK_COUNT")
        if index is None or count is None:
            return 0, 1
        first = os.environ.get("SLURM_ARRAY_TASK_MIN", "0")
        if first != "0" or os.environ.get("SLURM_ARRAY_TASK_STEP", "1") != "1":
            raise ConfigError(
                "the job array does not have tasks 0 to N-1; submit with --array=0-..., or use "
                "--array-task I/N"
            )
        text = f"{index}/{count}"
    index, slash, count = text.partition("/")
    if not (slash and index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise ConfigError(f"--array-task {text!r} is not I/N with 0 <= I < N")
    return int(index), int(count)


def _check_table_options(given: dict[str, Any]) -> None:
    """Raise `ConfigError` for an option of tables with a format that ignores it."""
    for option, formats in _TABLE_OPTIONS.items():
        formats = sorted(READERS["sft"]) if given["task"] == "sft" else formats
        if given.get(option) and given["format"] not in formats:
            raise ConfigError(
                f"--{option} applies to --format {', '.join(formats)}, not to {given['format']}"
            )


def _delimiter(text: str) -> str:
    delimiter = {"\\t": "\t", "tab": "\t"}.get(text, text)
    if len(delimiter) > 1 or delimiter in ('"', "\n", "\r"):
        raise ConfigError(f"--delimiter {text!r} is not a single character, or tab")
    return delimiter
