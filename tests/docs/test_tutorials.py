"""Every command of the tutorials runs on tiny corpora, and prints what its page shows."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.data_prep.raw_corpora import audio, image, write_coco, write_librispeech, write_ljspeech
from tests.docs.commands import ROOT, Command, missing_output, read_commands

# Later pages use the exports of earlier ones.
STAGES = ("thinker", "audio_encoder", "vision_encoder", "codec", "talker", "sft")
PAGES = [*(f"tutorials/{stage}.md" for stage in STAGES), "checkpoints.md", "gpus.md"]
NUM_SAMPLES = 100


def write_corpora(root: Path) -> None:
    """The raw data that the pages start with, under the same names."""
    texts = [f"the sentence with the number {n}" for n in range(NUM_SAMPLES)]
    # The pages of the documentation have enough words for a tokenizer.
    pages = [page.read_text(encoding="utf-8") for page in sorted(ROOT.glob("docs/*.md"))]
    (root / "books.txt").write_text("\n".join(pages), encoding="utf-8")
    write_coco(root / "COCO", NUM_SAMPLES)
    write_librispeech(root / "LibriSpeech", chapters=NUM_SAMPLES)
    write_ljspeech(root / "LJSpeech-1.1", texts)
    # Long enough for the labels of CTC, and for the crops of the codec.
    clips = sorted([*root.glob("LibriSpeech/**/*.flac"), *root.glob("LJSpeech-1.1/wavs/*.wav")])
    for n, clip in enumerate(clips):
        clip.write_bytes(audio(n % 50, duration_s=2.0, fmt=clip.suffix[1:].upper()))
    write_conversations(root)
    (root / "cat.png").write_bytes(image(1))
    (root / "question.wav").write_bytes(audio(1))


def write_conversations(root: Path) -> None:
    """Questions about an image, an audio clip, and spoken answers, in the layout of LLaVA."""
    media, chats = root / "MEDIA", []
    media.mkdir()
    for n in range(NUM_SAMPLES):
        (media / f"{n}.png").write_bytes(image(n))
        (media / f"{n}.wav").write_bytes(audio(n % 50, duration_s=2.0))
        image_file, audio_file = {"image": f"{n}.png"}, {"audio": f"{n}.wav"}
        for kind, (question, files, spoken) in enumerate([
            ("<image>\nWhat is this?", image_file, {}),
            ("Repeat: <audio>", audio_file, {}),
            ("Say the number.", {}, audio_file),
        ]):  # fmt: skip
            turns = [
                {"from": "human", "value": question},
                {"from": "gpt", "value": f"number {n}", **spoken},
            ]
            chats.append({"id": f"c{n}-{kind}", "conversations": turns, **files})
    (root / "chats.json").write_text(json.dumps(chats), encoding="utf-8")


def shortened(command: Command) -> list[str]:
    """The words of a command that trains two steps on one rank."""
    words = list(command.words)
    if "--max-steps" in words:
        words[words.index("--max-steps") + 1] = "2"
    if words[1] == "train":
        words += ["--ranks", "1"]
    if "base" in words:  # its global batch needs a large corpus
        words += ["batch.global_tokens=32768"]
    if words[1] == "pipeline":
        words += ["--ranks", "1", "--", "--max-steps", "2"]
    return words


@pytest.mark.slow
def test_commands_of_tutorials_run(tmp_path: Path) -> None:
    write_corpora(tmp_path)
    environ = os.environ | {
        "PYTHONPATH": str(ROOT),
        "DS_ACCELERATOR": "cpu",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    done: set[frozenset[str]] = set()  # pages repeat commands, so that each can be read alone
    for page in PAGES:
        for command in read_commands(ROOT / "docs" / page):
            if frozenset(command.words) in done:
                continue
            done.add(frozenset(command.words))
            words = [sys.executable, "-m", "muomni.cli", *shortened(command)[1:]]
            result = subprocess.run(
                words, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=1_800
            )
            if "--speak" in words and "has no text to speak" in result.stderr:
                continue  # after two steps, a model may answer nothing
            assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
            missing = missing_output(command.output, result.stdout)
            assert missing == [], f"{command}\n{result.stdout}"
    assert len(done) > 25
