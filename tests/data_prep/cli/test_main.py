"""The command line: fast help with examples, and one-line errors for unknown and renamed flags."""

import subprocess
import sys
from pathlib import Path

import pytest

from data_prep.cli.main import build_parser, main
from data_prep.readers import READERS, find_reader
from muomni.command_line import RENAMED_OPTIONS
from muomni.data.shards.manifest import TASKS
from tests.data_prep.commands import Capture, fails

VERBS = [
    *TASKS,
    "fetch",
    *("sample", "tokenizer", "finalize", "index"),
    *("tokenize", "measure"),
    *("verify", "stats", "inspect", "mix", "retry-bad", "dedup", "exclude"),
]


def _help(capsys: Capture, *arguments: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--help"])
    assert stop.value.code == 0
    return capsys.readouterr().out


def test_help_lists_all_verbs(capsys: Capture) -> None:
    lines = _help(capsys).splitlines()
    assert [
        line.split()[0] for line in lines if line[:4].isspace() and line[4:5].isalpha()
    ] == VERBS


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_verb(capsys: Capture, verb: str) -> None:
    text = _help(capsys, verb)
    examples = text.partition("\nexamples:\n")[2].splitlines()
    assert len(examples) == 2
    assert "None" not in text and "SUPPRESS" not in text
    # Examples are valid command lines.
    for line in examples:
        arguments = line.split(">")[0].split()[3:]
        assert build_parser().parse_args(arguments).verb == verb


def test_help_imports_no_heavy_package() -> None:
    code = (
        "import sys; from data_prep.cli.main import build_parser; build_parser().format_help(); "
        "print(*{'torch', 'numpy', 'pydantic', 'PIL', 'soundfile', 'tqdm', 'aiohttp'} & set(sys.modules))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == ""


def test_program_name(capsys: Capture) -> None:
    with pytest.raises(SystemExit):
        main(["verify", "--help"], prog="muomni data")
    out = capsys.readouterr().out
    assert "muomni data verify --full" in out and "python -m" not in out


def test_unknown_flags(capsys: Capture) -> None:
    assert "unknown option --formt (did you mean '--format'?)" in fails(
        capsys, "speech", "--formt", "x", code=2
    )
    assert "did you mean '--full'?" in fails(capsys, "verify", "--ful", "x", code=2)
    assert "unknown option --xyz; see" in fails(capsys, "stats", "x", "--xyz=1", code=2)
    assert "'--'" not in fails(capsys, "stats", "--", "--not-a-flag", code=3)


@pytest.mark.parametrize("flag", ["--licence", "--normalise"])  # codespell:ignore licence,normalise
def test_renamed_flags(capsys: Capture, flag: str) -> None:
    error = fails(capsys, "text", flag, "x", code=2)
    assert f"{flag} was renamed to {RENAMED_OPTIONS[flag]}" in error
    assert RENAMED_OPTIONS[flag] in _help(capsys, "text")


def test_usage_errors_are_one_line(capsys: Capture) -> None:
    assert "required: --format, --src, --out" in fails(capsys, "text", code=2)
    assert "invalid choice: 'vrify'" in fails(capsys, "vrify", code=2)
    error = fails(capsys, "stats", "x", "--json", "--workers", "0", code=2)
    assert "unknown option --workers" in error
    assert "'0' is not an integer of at least 1" in fails(
        capsys, "verify", "x", "--workers", "0", code=2
    )


def test_negative_numbers_are_values(capsys: Capture, tmp_path: Path) -> None:
    arguments = ("text", "--format", "txt", "--src", "x", "--out", str(tmp_path / "out"))
    error = fails(capsys, *arguments, "--min-chars", "-3", code=2)
    assert "--min-chars must be at least 0, got -3" in error


def test_every_reader_exists() -> None:
    assert tuple(READERS) == TASKS
    for task, formats in READERS.items():
        for name in formats:
            assert callable(find_reader(task, name))
