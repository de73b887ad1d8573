"""Arguments of all commands are typed: junk is refused in one sentence before anything starts."""

import argparse
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.cli.main import build_parser
from muomni.cli.main import VERBS, main, verb_module
from muomni.command_line import CommandParser, integer, number, path, path_or_url, temperature

JUNK = (
    "",
    "nan",
    "inf",
    "-inf",
    "1e400",
    "0x10",
    "010",
    "1_0",
    "1e",
    "yes",
    "²",
    "--",
    " ",
    "1 2",
    "9" * 40,
)


def parsers() -> Iterator[argparse.ArgumentParser]:
    for verb in VERBS:
        module = verb_module(verb)
        if hasattr(module, "add_options"):
            parser = CommandParser(verb)
            module.add_options(parser)
            yield parser
    for action in build_parser()._actions:
        if isinstance(action, argparse._SubParsersAction):
            yield from action.choices.values()


ACTIONS = [
    pytest.param(action, id=f"{parser.prog.split()[-1]} {action.dest}")
    for parser in parsers()
    for action in parser._actions
    if action.type is not None
]


@pytest.mark.parametrize("action", ACTIONS)
def test_numbers_and_paths_are_typed(action: argparse.Action) -> None:
    """Plain `int` reads 010 as 10 and 1_0 as 10, `float` reads nan, and `Path` accepts nothing."""
    assert action.type not in (int, float, Path)
    assert callable(action.type)
    for text in JUNK:
        try:
            value = action.type(text)
        except argparse.ArgumentTypeError as error:
            assert "\n" not in str(error)
        else:
            if isinstance(value, (int, float)):
                assert math.isfinite(value) and text.strip() == text
            if isinstance(value, (str, Path)) and action.type in (path, path_or_url):
                assert text.strip()


@settings(deadline=None)
@given(st.text(max_size=8) | st.integers().map(str) | st.floats().map(str))
def test_types_refuse_or_stay_within_limits(text: str) -> None:
    for kind, low, high in (
        (integer(1, 9), 1, 9), (number(0, 1), 0, 1), (number(at_most=5, above=0), 0, 5), (temperature, 0, 100)
    ):  # fmt: skip
        try:
            value = kind(text)
        except argparse.ArgumentTypeError:
            continue
        assert low <= value <= high and math.isfinite(value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["train", "--stage", "thinker", "--data", ""],
            "argument --data: '': a path must not be empty",
        ),
        (
            ["train", "--stage", "thinker", "--run", ""],
            "argument --run: '': a path must not be empty",
        ),
        (
            ["train", "--stage", "thinker", "--max-steps", "1e3"],
            "--max-steps: '1e3' is not an integer",
        ),
        (["train", "--stage", "thinker", "--ranks", "0"], "--ranks: '0' is not an integer from 1"),
        (["train", "--stage", "thinker", "seed=yes"], "bad value 'yes' for 'seed'"),
        (["evaluate", "--stage", "thinker", "--run", "r", "--limit", "0"], "--limit: '0' is not"),
        (["pipeline", "--run", ""], "argument --run: '': a path must not be empty"),
        (
            ["data", "verify", "x", "--decode", "nan"],
            "--decode: 'nan' is not a number of at least 0",
        ),
        (["data", "mix", "--data", "x", "--alpha", "inf"], "--alpha: 'inf' is not a number"),
    ],
)
def test_junk_ends_with_one_sentence(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and len(error.splitlines()) == 1


def test_home_is_expanded_and_other_characters_survive() -> None:
    assert path("~/a #b") == Path.home() / "a #b"
    assert path_or_url("~/a b") == str(Path.home() / "a b")
    assert path_or_url("s3://bucket/x") == "s3://bucket/x"
