"""The commands launch/evaluate.py and launch/summary.py."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from muomni.cli.evaluate import main_of_rank
from tests.evaluation.runs import evaluate

ROOT = Path(__file__).resolve().parents[2]


def run_main(*flags: object) -> None:
    main_of_rank([*map(str, flags)])


def test_last_line_and_report_file_hold_the_same_json(
    thinker_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_main("--stage", "thinker", "--run", thinker_run, "--json", tmp_path / "r.json")
    lines = capsys.readouterr().out.splitlines()
    result = json.loads(lines[-1])
    assert result == evaluate(stage="thinker", run=thinker_run)
    assert json.loads((tmp_path / "r.json").read_text()) == result
    assert "perplexity" in lines[2] and "(unigram model)" in lines[2]


def test_only_full_test_split_writes_default_report(thinker_run: Path) -> None:
    path = thinker_run / "thinker" / "evaluation.json"
    run_main("--stage", "thinker", "--run", thinker_run, "--limit", 3)
    run_main("--stage", "thinker", "--run", thinker_run, "--split", "val")
    assert not path.exists()
    run_main("--stage", "thinker", "--run", thinker_run)
    assert json.loads(path.read_text())["num_samples"] == 31
    path.unlink()


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--stage", "tinker"], 2, "unknown stage 'tinker' (did you mean 'thinker'?)"),
        (["--stage", "thinker", "--limit", "0"], 2, "--limit: '0' is not an integer of at least 1"),
        (["--stage", "codec"], 4, "no export of stage codec at"),
        (["--stage", "thinker", "--split", "dev"], 3, "has a split 'dev'; set --split to one of"),
        (["--stage", "thinker", "--data", "/nowhere"], 3, "/nowhere does not exist"),
    ],
)
def test_user_errors_are_one_line_with_exit_code(
    flags: list[str],
    code: int,
    message: str,
    thinker_run: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as stop:
        run_main(*flags, "--run", thinker_run)
    output = capsys.readouterr()
    assert stop.value.code == code
    assert output.err.startswith("evaluate: ") and message in output.err
    assert (len(output.err.splitlines()), output.out) == (1, "")


def test_commands_run_from_any_folder(thinker_run: Path, tmp_path: Path) -> None:
    outcome = subprocess.run(
        [sys.executable, ROOT / "launch" / "summary.py", "--run", tmp_path],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert outcome.returncode == 3
    assert outcome.stderr.startswith("muomni summary: ") and "launch/evaluate.py" in outcome.stderr


@pytest.mark.parametrize(
    "module",
    ["muomni.evaluation.request", "muomni.evaluation.report", "muomni.inference.generate"],
)
def test_requests_and_reports_do_not_import_torch(module: str) -> None:
    probe = f"import sys, {module}; print('torch' in sys.modules)"
    outcome = subprocess.run(
        [sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True
    )
    assert outcome.stdout.strip() == "False", outcome.stderr
