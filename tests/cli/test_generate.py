"""launch/generate.py prints text, speech, and one JSON line, or one sentence on a user error."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile

from tests.conversations import COLORS, png
from tests.inference.exports import write_sft_export

ROOT = Path(__file__).resolve().parents[2]


def generate(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "launch/generate.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    write_sft_export(folder, num_steps=85)
    (folder / "red.png").write_bytes(png(COLORS["red"]))
    (folder / "broken.png").write_bytes(b"no image")
    return folder


def test_answer_is_text_and_speech_and_ends_with_json(run: Path, tmp_path: Path) -> None:
    done = generate(
        "--run", run, "--text", "the door", "--image", run / "red.png", "--temperature", 0.3,
        "--speak", tmp_path / "out.wav", "--max-seconds", 0.4, "--json", tmp_path / "out.json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    text, line = done.stdout.splitlines()[-2:]
    result = json.loads(line)
    assert text == result["text"] == "red" and result["stopped"]
    assert json.loads((tmp_path / "out.json").read_text()) == result
    assert soundfile.info(tmp_path / "out.wav").duration == pytest.approx(result["speech_s"])


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--text", "a", "--image", "RUN/broken.png"], 3, "broken.png: broken image"),
        (["--text", "a", "--image", "RUN/none.png"], 3, "none.png: No such file"),
        ([], 2, "question is empty"),
        (["--text", "a", "--max-new-tokens", "0"], 2, "--max-new-tokens: '0' is not an integer"),
        (["--text", "a", "--temperature", "nan"], 2, "--temperature: 'nan' is not a number"),
        (["--text", "a", "--temperature", "1e-300"], 2, "is neither 0 (greedy) nor"),
        (["--text", "a", "--max-seconds", "1e9"], 2, "is not a number above 0 and at most 600"),
        (["--text", "a", "--seed", "010"], 2, "--seed: '010' is not an integer"),
        (["--text", "a", "--speak", "RUN/no/out.wav"], 2, "is not a writable folder"),
    ],
)
def test_user_error_is_one_sentence(
    run: Path, arguments: list[str], code: int, message: str
) -> None:
    done = generate("--run", run, *(a.replace("RUN", str(run)) for a in arguments))
    assert done.returncode == code and done.stdout == ""
    assert message in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_missing_export_is_reported_with_its_command(tmp_path: Path) -> None:
    done = generate("--run", tmp_path, "--text", "a")
    assert done.returncode == 4
    assert "no export of stage sft" in done.stderr and "--stage sft" in done.stderr
