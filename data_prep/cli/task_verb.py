"""The verb of a task, `python -m data_prep TASK --format NAME`: its options, and what it runs."""

import argparse
import os
import re
from pathlib import Path

from data_prep.cli.filter_options import add_filters, given_filters
from data_prep.cli.treatment_options import add_treatment, given_treatment
from data_prep.corpus import ReaderOptions
from data_prep.readers import READERS
from data_prep.readers.plain_text import DOCUMENTS
from data_prep.sharding.prepare import OpenProgress, prepare, remove_dataset
from data_prep.sharding.shard_plan import ShardingOptions
from muomni.data.shards.manifest import Manifest, Task
from muomni.errors import ConfigError

_TASK_HELP: dict[Task, str] = {
    "image-caption": "images with captions",
    "speech": "audio clips with transcripts (to recognize speech, to train the codec)",
    "tts": "audio clips with the text to speak",
    "text": "documents",
    "sft": "conversations with images and audio clips",
}


def add_task(
    verbs: "argparse._SubParsersAction[argparse.ArgumentParser]", task: Task
) -> argparse.ArgumentParser:
    """Add the verb of a task, with the options of its readers."""
    verb = verbs.add_parser(
        task,
        help=f"shard {_TASK_HELP[task]}",
        description=f"Shard {_TASK_HELP[task]}. Running again continues; finished shards are kept.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    verb.add_argument(
        "--format", required=True, choices=sorted(READERS[task]), help="corpus layout"
    )
    verb.add_argument("--src", required=True, type=Path, help="corpus folder, or its table or file")
    verb.add_argument("--out", required=True, type=Path, help="dataset folder to make")
    verb.add_argument("--name", help="dataset name (default: the name of --out)")
    verb.add_argument("--workers", type=positive, default=num_cpus(), help="processes")
    verb.add_argument(
        "--array-task",
        metavar="I/N",
        help="write only the shards of task I of N, counted from 0 (default: SLURM_ARRAY_TASK_ID of "
        "SLURM_ARRAY_TASK_COUNT, where set)",
    )
    verb.add_argument(
        "--val-fraction", type=float, default=0.01, help="share for the loop's checks"
    )
    verb.add_argument("--test-fraction", type=float, default=0.01, help="share for evaluation")
    verb.add_argument(
        "--split-from",
        choices=("hash", "source"),
        default="hash",
        help="hash: by the group's hash, equal in all corpora; source: as the corpus declares, a "
        "split that it lacks taken from train by hash",
    )
    verb.add_argument("--seed", type=int, default=0, help="order of the samples")
    verb.add_argument("--max-bad-fraction", type=float, default=0.01, help="bad samples to accept")
    verb.add_argument("--shard-size", default="256MB", help="a number of samples, or like 256MB")
    verb.add_argument("--license", default="", help="license of the corpus, for the manifest")
    verb.add_argument("--overwrite", action="store_true", help="delete the dataset at --out first")
    _add_reader_options(verb, task)
    add_filters(verb, task)
    add_treatment(verb, task)
    verb.set_defaults(task=task)
    return verb


def _add_reader_options(verb: argparse.ArgumentParser, task: Task) -> None:
    options = verb.add_argument_group("reader")
    if task == "text":
        options.add_argument(
            "--document", choices=DOCUMENTS, default="line", help="what is one text"
        )
    else:
        options.add_argument(
            "--media",
            type=Path,
            help="folder that the media paths of a table, manifest or conversation are relative to",
        )
    if task == "image-caption":
        options.add_argument("--annotations", default="", help="file pattern, like captions_*.json")
    if task in ("speech", "tts"):
        options.add_argument(
            "--subsets",
            nargs="+",
            default=(),
            help="only these subsets of LibriSpeech, LibriTTS, GigaSpeech or Common Voice",
        )
        options.add_argument(
            "--group",
            choices=("chapter", "speaker", "transcript"),
            default="",
            help="what may not stand in two splits; chapter is also the audio clip of segments "
            "(default: by the reader)",
        )
        options.add_argument(
            "--keep-case",
            action="store_true",
            help="keep the upper case of LibriSpeech, GigaSpeech",
        )
        options.add_argument(
            "--text",
            choices=("normalized", "original"),
            default="",
            help="which text of LibriTTS; normalized unless given",
        )
        options.add_argument("--language", default="", help="language code for all samples")
        options.add_argument("--speaker", default="", help="speaker name for all samples")
    if task != "sft":
        options.add_argument(
            "--columns", default="", metavar="NAME=COLUMN,...", help="other column names of a table"
        )


def run_task(arguments: argparse.Namespace, open_progress: OpenProgress) -> Manifest | None:
    """Shard the corpus that the arguments name; None when other array tasks have to finish first.

    Raises what `prepare` raises, and `ConfigError` for options that do not fit.
    """
    given = vars(arguments)
    reader_options = ReaderOptions(
        media_root=given.get("media"),
        document=given.get("document", "line"),
        group_by=given.get("group", ""),
        columns=_columns(given.get("columns", "")),
        annotations=given.get("annotations", ""),
        subsets=tuple(given.get("subsets", ())),
        keep_case=given.get("keep_case", False),
        text_form=given.get("text", ""),
        language=given.get("language", ""),
        speaker=given.get("speaker", ""),
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
        shard_size=arguments.shard_size,
        max_bad_fraction=arguments.max_bad_fraction,
        license=arguments.license,
        filters=given_filters(arguments),
        treatment=given_treatment(arguments),
    )
    task = _array_task(arguments.array_task)
    if arguments.overwrite:
        if task[1] > 1:
            raise ConfigError("--overwrite cannot be used in a job array: tasks would race")
        remove_dataset(arguments.out)
    manifest = prepare(
        options, reader_options, arguments.out, arguments.workers, task, open_progress
    )
    if manifest is None:
        print(f"task {task[0]} of {task[1]} is done; the last task writes the manifest")
    return manifest


def _array_task(text: str | None) -> tuple[int, int]:
    """Index and number of array tasks from the option or from Slurm; (0, 1) without either."""
    if text is None:
        index = os.environ.get("SLURM_ARRAY_TASK_ID")
        count = os.environ.get("SLURM_ARRAY_TASK_COUNT")
        if index is None or count is None:
            return 0, 1
        first = os.environ.get("SLURM_ARRAY_TASK_MIN", "0")
        if first != "0" or os.environ.get("SLURM_ARRAY_TASK_STEP", "1") != "1":
            raise ConfigError(
                "this is no job array of tasks 0 to N-1; submit with --array=0-..., or name the task "
                "with --array-task I/N"
            )
        text = f"{index}/{count}"
    index, slash, count = text.partition("/")
    if not (slash and index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise ConfigError(f"--array-task {text!r} is not I/N with 0 <= I < N")
    return int(index), int(count)


def _columns(text: str) -> dict[str, str]:
    columns = {}
    for pair in filter(None, text.split(",")):
        name, equals, column = pair.partition("=")
        if not (name and equals and column):
            raise ConfigError(f"--columns {text!r} is not NAME=COLUMN,...")
        columns[name.strip()] = column.strip()
    return columns


def default_name(folder: Path) -> str:
    """The folder's name, in the characters that a dataset name may have."""
    return re.sub(r"[^A-Za-z0-9_-]", "-", folder.resolve().name)[:64] or "dataset"


def num_cpus() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1


def positive(text: str) -> int:
    """A number above zero, for argparse."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)
