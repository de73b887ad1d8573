"""Commands in the docs parse; training commands resolve, and can use the GPUs that they name."""

import re

import pytest

from muomni.cli.main import main
from muomni.config.arguments import arguments_for, parse_train, resolve_train
from muomni.config.registry import STAGES
from muomni.data.sampling.plan import batching_of
from muomni.errors import ConfigError
from muomni.training import preflight
from muomni.training.engine.ds_config import read_engine_json
from tests.docs.commands import (
    PAGES,
    ROOT,
    Command,
    check_options,
    missing_output,
    read_commands,
    split_pipeline,
    words_of,
)

ANY_NUMBER = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
FOUND = [command for page in PAGES for command in read_commands(page)]


def test_commands_are_found() -> None:
    assert len(FOUND) >= 120
    assert {command.words[0] for command in FOUND} >= {"muomni", "python", "deepspeed", "sbatch"}


def test_options_exist() -> None:
    # One test, since hundreds of them would take longer to collect than to run.
    wrong = []
    for command in FOUND:
        try:
            check_options(command.words)
        except ConfigError as error:
            wrong.append(f"{command}: {error}")
    assert wrong == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("muomni train --stage thinker --presett nano", "unknown option --presett"),
        ("muomni data text --format txt --out x", "--src"),
        ("python -m data_prep verify --deep x", "--deep"),
        ("deepspeed --num_gpus 2 launch/train.py --stage sft --gpu 2", "unknown option --gpu"),
        ("python launch/generate.py --txt hello", "unknown option --txt"),
        ("sbatch --nodes=2 slurm/train.sbatch --stage sft --date x", "unknown option --date"),
        ("sbatch slurm/shard_array.sbatch speech --format librispeech --out x", "--src"),
        ("muomni pipeline --run x --shards 'text --source x'", "--source"),
        ("muomni pipeline --run x -- --max-step 2", "unknown option --max-step"),
        ("make quickstrt", "no target quickstrt"),
        ("python benchmarks/none.py", "no benchmarks/none.py"),
    ],
)
def test_wrong_options_are_found(line: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        check_options(words_of(line))


@pytest.mark.parametrize(
    "command",
    [pytest.param(c, id=str(c)) for c in FOUND if c.output and c.words[:2] == ("muomni", "count")],
)
def test_output_is_current(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    main(list(command.words[1:]))
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line for line in command.output if line.split() not in printed] == []


def test_missing_output_is_found() -> None:
    printed = "metric  value\nloss    2.5\nnote: 3 of 4\n"
    assert missing_output(["metric  value", "loss    9.75", "note: 12 of 4"], printed) == []
    assert missing_output(["loss  1", "metric  value"], printed) == ["metric  value"]
    assert missing_output(["accuracy  1"], printed) == ["accuracy  1"]


def training(command: Command) -> tuple[str, int] | None:
    """Whether a command trains: `train` or `pipeline`, and the position of its arguments."""
    for n, word in enumerate(command.words):
        if word.endswith(("train.py", "train.sbatch")) or word == "train":
            return "train", n + 1
        if word == "pipeline":
            return "pipeline", n + 1
    return None


TRAINING = [
    pytest.param(command, id=str(command))
    for command in FOUND
    # Templates, and commands of an experiment that the log describes.
    if training(command) and "STAGE" not in command.words and command.page.name != "LOG.md"
]


def named_gpus(words: tuple[str, ...]) -> list[int]:
    """The number of GPUs that a command names, if any."""
    options = dict(word.split("=", 1) for word in words if re.match(r"--[\w-]+=\d+$", word))
    gpus = options.get("--gpus-per-node")
    named = [] if gpus is None else [int(gpus) * int(options.get("--nodes", 1))]
    for option in ("--num_gpus", "--gpus"):
        if option in words:
            named = [int(words[words.index(option) + 1])]
    return named


@pytest.mark.parametrize("command", TRAINING)
def test_command_uses_its_gpus(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    found = training(command)
    assert found is not None
    program, start = found
    runs = [[word for word in command.words[start:] if word != "..."]]
    if program == "pipeline":
        options, extra = split_pipeline(runs[0])
        runs = [
            ["--stage", stage, "--preset", options.preset, *arguments_for(stage, extra)]
            for stage in STAGES
        ]
    named = named_gpus(command.words)
    for run in runs:
        parsed = parse_train(run)
        parsed.config = None  # a file of the reader
        config = resolve_train(parsed)
        engine_json = read_engine_json(parsed.deepspeed_config)
        for num_gpus in named or ANY_NUMBER:
            preflight.check(preflight.Candidate(config, engine_json, num_gpus))
            batching = batching_of(config.batch)
            assert not named or (batching.units_per_step or num_gpus) >= num_gpus
