"""Training commands in the docs parse, resolve, and can use the GPUs that they name."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from muomni.cli.pipeline import _with_joined_values, add_options
from muomni.command_line import CommandParser
from muomni.config.arguments import arguments_for, parse_train, resolve_train
from muomni.config.registry import STAGES
from muomni.data.sampling.plan import batching_of
from muomni.training import preflight
from muomni.training.engine.ds_config import read_engine_json

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("slurm/*"))]
ANY_NUMBER = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)


def commands(page: Path) -> Iterator[list[str]]:
    """The words of each command in indented or commented lines, without comments at their end."""
    text = re.sub(r"\\\n#? *", "", page.read_text(encoding="utf-8"))
    for line in re.findall(r"^(?: {4}|#   )(\S.*)$", text, re.MULTILINE):
        is_code = line.startswith("[")  # of a script
        if not is_code and re.search(
            r"launch/train\.py|muomni train|train\.sbatch|muomni pipeline", line
        ):
            yield shlex.split(line, comments=True)


def split_command(words: list[str]) -> tuple[str, list[str], list[int]]:
    """The program (train or pipeline), its arguments, and the numbers of GPUs to check."""
    is_pipeline = "pipeline" in words
    program = next(
        n
        for n, word in enumerate(words)
        if word.endswith(("train.py", "train.sbatch")) or word in ("train", "pipeline")
    )
    options = dict(word.split("=", 1) for word in words if re.match(r"--[\w-]+=\d+$", word))
    gpus = options.get("--gpus-per-node")
    named = []
    if gpus is not None:
        named = [int(gpus) * int(options.get("--nodes", 1))]
    for option in ("--num_gpus", "--gpus"):
        if option in words:
            named = [int(words[words.index(option) + 1])]
    return ("pipeline" if is_pipeline else "train"), words[program + 1 :], named


FOUND = [
    pytest.param(words, id=f"{page.name}: {' '.join(words)[:80]}")
    for page in PAGES
    for words in commands(page)
    # Templates, and commands of an experiment that the log describes.
    if "STAGE" not in words and page.name not in ("LOG.md", "pipeline.sh")
]


def test_commands_are_found() -> None:
    assert len(FOUND) >= 14


@pytest.mark.parametrize("words", FOUND)
def test_command_uses_its_gpus(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    program, arguments, named = split_command(words)
    if program == "pipeline":
        end = arguments.index("--") if "--" in arguments else len(arguments)
        parser = CommandParser("muomni pipeline", description="", examples=())
        add_options(parser)
        options = parser.parse_args(_with_joined_values(arguments[:end]))
        runs = [
            [
                "--stage",
                stage,
                "--preset",
                options.preset,
                *arguments_for(stage, arguments[end + 1 :]),
            ]
            for stage in STAGES
        ]
    else:
        runs = [[word for word in arguments if word != "..."]]
    for run in runs:
        parsed = parse_train(run)
        parsed.config = None  # a file of the reader
        config = resolve_train(parsed)
        engine_json = read_engine_json(parsed.deepspeed_config)
        for num_gpus in named or ANY_NUMBER:
            preflight.check(preflight.Candidate(config, engine_json, num_gpus))
            batching = batching_of(config.batch)
            assert not named or (batching.units_per_step or num_gpus) >= num_gpus
