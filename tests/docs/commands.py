"""The commands in the documentation: found in its code blocks, and parsed by the parsers of the programs."""

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from data_prep.cli.main import build_parser
from muomni.cli.main import verb_module, verb_parser
from muomni.cli.pipeline import _with_joined_values, add_options
from muomni.command_line import CommandParser
from muomni.config.arguments import arguments_for, parse_train
from muomni.config.registry import STAGES
from muomni.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted(ROOT.glob("docs/**/*.md")),
    *sorted(ROOT.glob("slurm/*")),
]
PROGRAMS = ("muomni", "python", "deepspeed", "torchrun", "srun", "mpirun", "sbatch", "make")
# A code block is indented, in a script a comment.
LINE = re.compile(r"^(?: {4}|#   )(\S.*)$", re.MULTILINE)
# The output of the last command of a block: the next block, after a sentence that starts with "prints".
OUTPUT = re.compile(r"\n    (\S[^\n]*)\n\nprints\b[^\n]*(?:\n\S[^\n]*)*\n\n((?:    [^\n]*\n)+)")


@dataclass(frozen=True, slots=True)
class Command:
    """The words of a command, and the lines that it prints according to its page."""

    page: Path
    words: tuple[str, ...]
    output: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        return shlex.join(self.words)

    def __str__(self) -> str:
        return f"{self.page.name}: {' '.join(self.words)[:80]}"


def read_commands(page: Path) -> Iterator[Command]:
    """The commands in the code blocks of a page, without prompts and comments."""
    # Continued lines are joined.
    text = re.sub(r"\\\n#? *", "", page.read_text(encoding="utf-8"))
    outputs = {command: lines for command, lines in OUTPUT.findall(text)}
    for line in LINE.findall(text):
        is_command = re.match(rf"(?:\$ )?(?:time )?(?:{'|'.join(PROGRAMS)}) ", line)
        if is_command and not re.search(r"\(.*default|:$", line):
            output = [x[4:] for x in outputs.get(line, "").splitlines()]
            yield Command(page, tuple(words_of(line)), tuple(output))


def words_of(line: str) -> list[str]:
    """The words of a command line, optional parts of a synopsis included."""
    if re.search(r" \[(--|key=)", line):
        line = line.replace("[", "").replace("]", "")
    words = [word for word in shlex.split(line, comments=True) if word not in ("$", "time")]
    return ["1" if word == "N" else word for word in words]


def shape(line: str) -> str:
    """What must agree between documented and real output: the first column, without its numbers."""
    first = re.split(r"\s{2,}", line.strip())[0]
    return re.sub(r"\d[\d,.]*", "0", first)


def missing_output(documented: Sequence[str], printed: str) -> list[str]:
    """The documented lines that a real output does not have, in this order; it may have others between them."""
    lines = iter(printed.splitlines())
    return [line for line in documented if shape(line) not in map(shape, lines)]


def check_options(words: Sequence[str]) -> None:
    """Parse a command as its program does; raises ConfigError for an unknown option or a wrong value.

    A command with `...` may lack required options.
    """
    try:
        _check([word for word in words if word != "..."])
    except ConfigError as error:
        if "..." not in words or "are required" not in str(error):
            raise


def _check(words: Sequence[str]) -> None:
    program, *rest = words
    script = next((n for n, word in enumerate(words) if word.endswith((".py", ".sbatch"))), None)
    if program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        unknown = {word for word in rest if "=" not in word} - set(targets)
        if unknown:
            raise ConfigError(f"Makefile has no target {', '.join(unknown)}")
    elif program == "muomni":
        _check_verb(rest[0], rest[1:])
    elif rest[:2] == ["-m", "data_prep"]:
        _data_parser().parse_args(rest[2:])
    elif script is not None:
        _check_script(words[script], list(words[script + 1 :]))


def _check_script(script: str, arguments: list[str]) -> None:
    if not (ROOT / script).is_file():
        raise ConfigError(f"there is no {script}")
    if script == "slurm/shard_array.sbatch":
        _data_parser().parse_args(arguments)
    elif script == "slurm/train.sbatch" and arguments[0].endswith(".py"):
        _check_script(arguments[0], arguments[1:])
    elif script in ("slurm/train.sbatch", "launch/train.py"):
        parse_train(arguments)
    elif script.startswith("launch/"):
        _check_verb(Path(script).stem, arguments)


def _check_verb(verb: str, arguments: list[str]) -> None:
    if verb == "VERB" or "--help" in arguments:
        return
    if verb == "data":
        _data_parser().parse_args(arguments)
    elif verb == "pipeline":
        options, extra = split_pipeline(arguments)
        for shards in options.shards:
            _data_parser().parse_args(shlex.split(shards))
        for stage in STAGES:
            parse_train(["--stage", stage, *arguments_for(stage, extra)])
    else:
        verb_parser(verb, verb_module(verb)).parse_intermixed_args(arguments)


def split_pipeline(arguments: list[str]) -> tuple:
    """The parsed options of `muomni pipeline` before "--", and the arguments after it."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    parser = CommandParser("muomni pipeline", description="", examples=())
    add_options(parser)
    return parser.parse_args(_with_joined_values(arguments[:end])), arguments[end + 1 :]


@cache
def _data_parser() -> CommandParser:
    return build_parser()
