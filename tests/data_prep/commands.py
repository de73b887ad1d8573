"""Test helpers for the command line: shard a corpus, and capture the error line of a failing command."""

import json
from pathlib import Path

import pytest

from data_prep.cli.main import main
from muomni.data.shards.manifest import Manifest

Capture = pytest.CaptureFixture[str]


def fails(capsys: Capture, *arguments: str, code: int = 3) -> str:
    """The single error line of a failing command."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    assert stop.value.code == code
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "Traceback" not in error, error
    return error


def shard(task: str, form: str, src: Path, out: Path, *options: str) -> Manifest:
    main(
        [
            *(task, "--format", form, "--src", str(src), "--out", str(out), "--workers", "1"),
            *("--val-fraction", "0", "--test-fraction", "0", "--name", "c", *options),
        ]
    )
    return Manifest.load(out)


def quarantined(out: Path) -> dict[str, str]:
    """Reason codes by key."""
    lines = [line for path in sorted((out / "quarantine").glob("*")) for line in path.open()]
    return {entry["key"]: entry["reason"] for entry in map(json.loads, lines)}
