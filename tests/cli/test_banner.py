"""The banner comes before torch is imported, within two seconds, and never ends a run."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from muomni.observe import announce
from muomni.observe.announce import BANNER_PRINTED, IN_PIPELINE, Startup, outcome

ROOT = Path(__file__).resolve().parents[2]
TORCH_EXIT = 42


@pytest.fixture
def without_torch(tmp_path: Path) -> dict[str, str]:
    """An environment in which the import of torch ends the process with `TORCH_EXIT`."""
    (tmp_path / "stubs").mkdir()
    (tmp_path / "stubs" / "torch.py").write_text(
        f"print('import', flush=True)\nraise SystemExit({TORCH_EXIT})\n"
    )
    names = (BANNER_PRINTED, "RANK", "WORLD_SIZE", "HOME", "PYTHONPATH")
    clean = {name: value for name, value in os.environ.items() if name not in names}
    path = f"{tmp_path / 'stubs'}:{ROOT}"
    return {**clean, "PYTHONPATH": path, "DS_ACCELERATOR": "cpu", "NO_COLOR": "1"}


def _command(run: Path, *options: str) -> list[str]:
    command = [sys.executable, "-m", "muomni.cli", "train", "--stage", "codec", "--preset", "nano"]
    return [*command, "--data", "/data", "--run", str(run), "--ranks", "1", *options]


def test_the_banner_precedes_torch(tmp_path: Path, without_torch: dict[str, str]) -> None:
    """There is no HOME, either."""
    run, start_s = tmp_path / "run", time.monotonic()
    done = subprocess.run(
        _command(run), env=without_torch, cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert time.monotonic() - start_s < 20  # 0.7 s on an idle machine
    assert (done.returncode, done.stderr) == (TORCH_EXIT, "")
    title, *rows, last = done.stdout.splitlines()
    assert title.startswith("muomni 0.") and title.endswith(": train codec, preset nano")
    assert rows == ["  data       /data", f"  run        {run / 'codec'}"]
    assert last == "import"
    assert not run.exists()


def test_a_quiet_run_and_the_rank_of_a_launcher_have_no_banner(
    tmp_path: Path, without_torch: dict[str, str]
) -> None:
    for options, environ in ((["--quiet"], {}), ([], {BANNER_PRINTED: "1"})):
        done = subprocess.run(
            _command(tmp_path, *options), env=without_torch | environ, cwd=ROOT,
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert (done.returncode, done.stdout) == (TORCH_EXIT, "import\n")


def test_a_closed_output_does_not_end_the_start(
    tmp_path: Path, without_torch: dict[str, str]
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        _command(tmp_path), env=without_torch, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (TORCH_EXIT, b"")


def test_quiet_and_verbose_contradict_each_other(
    tmp_path: Path, without_torch: dict[str, str]
) -> None:
    done = subprocess.run(
        _command(tmp_path, "-q", "-v"), env=without_torch, cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "muomni train: --quiet and --verbose contradict each other; remove one of them\n"
    )


def test_each_part_of_the_start_has_its_seconds(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(announce, "EVERY_S", 0.05)
    monkeypatch.setenv(announce.LAUNCH_TIME, str(time.time() - 7))
    with Startup(is_shown=True) as startup:
        startup.begin("import")
        printed = ""
        while "so far" not in printed:
            time.sleep(0.01)
            printed += capsys.readouterr().out
        startup.begin("engine")
        startup.finish()
        startup.finish()  # each step calls it
    assert startup.age_s > 7
    printed += capsys.readouterr().out
    lines = [line.removeprefix("  start      ") for line in printed.splitlines()]
    assert lines[0].startswith("launcher ") and lines[1].startswith("import ... 0 s so far")
    assert [line.split()[0] for line in lines[-3:]] == ["import", "engine", "total"]
    assert float(lines[-1].split()[1]) >= 7
    with Startup() as silent:
        silent.begin("import")
        silent.finish()
    assert capsys.readouterr().out == ""


def test_the_end_says_what_comes_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(IN_PIPELINE, raising=False)
    text = outcome("sft", ("val/answer_loss", 1.25), "runs/a/sft/export", 75.0, Path("runs/a b"))
    assert text.splitlines() == [
        "sft is finished after 1:15",
        "  best       val/answer_loss 1.2500",
        "  export     runs/a/sft/export",
        "  next       muomni evaluate --stage sft --run 'runs/a b'",
        "  next       muomni generate --run 'runs/a b' --text ...",
    ]
    monkeypatch.setenv(IN_PIPELINE, "1")
    assert "next" not in outcome("sft", None, "export", 1.0, tmp_path)
