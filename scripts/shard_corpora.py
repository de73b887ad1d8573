"""Shard, verify, and inspect a folder of public corpora with the documented commands.

    python scripts/shard_corpora.py --corpora CORPORA --out data/corpora

CORPORA (or the variable MUOMNI_CORPORA) contains the folders of `PLANS` in their public layouts; missing ones
are reported and skipped. Prints the samples per split, dropped samples, and duration of each dataset.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, slots=True)
class Plan:
    """One dataset: its name, data_prep task and format, source in CORPORA, and further options."""

    name: str
    task: str
    format: str
    source: str
    options: tuple[str, ...] = ()
    media: str = ""


PLANS = (
    Plan("wordnet", "text", "txt", "text/wordnet_examples.txt"),
    Plan("kjv", "text", "txt", "text/kjv_selected_books.txt", ("--document", "paragraph")),
    Plan("emoji", "image-caption", "coco", "coco_emoji", ("--split-from", "source")),
    Plan("tuxpaint", "image-caption", "coco", "coco_tuxpaint", ("--split-from", "source")),
    Plan("sky", "speech", "librispeech", "librispeech_sky", ("--split-from", "source")),
    Plan("allison_asr", "speech", "ljspeech", "ljspeech_allison", ("--language", "en")),
    Plan("allison_tts", "tts", "ljspeech", "ljspeech_allison", ("--language", "en")),
    Plan(
        "trimodal_asr",
        "speech",
        "jsonl",
        "trimodal/manifest.jsonl",
        ("--columns", "text=transcript,language=lang", "--group", "transcript"),
    ),
    Plan(
        "trimodal_images",
        "image-caption",
        "jsonl",
        "trimodal/manifest.jsonl",
    ),
    Plan(
        "questions",
        "speech",
        "jsonl",
        "trimodal/questions.jsonl",
        ("--columns", "text=transcript", "--language", "en"),
    ),
    Plan("llava", "sft", "llava", "llava/llava_instruct.json", media="."),
)


def main() -> None:
    """Run all plans; exits with code 1 if a command fails."""
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    default = os.environ.get("MUOMNI_CORPORA")
    flags.add_argument("--corpora", required=not default, default=default, type=Path)
    flags.add_argument("--out", required=True, type=Path)
    flags.add_argument("--workers", default="1")
    flags.add_argument("--json", type=Path, help="also write the results to this file")
    arguments = flags.parse_args()
    rows = {}
    for plan in PLANS:
        if not (arguments.corpora / plan.source).exists():
            print(f"{plan.name}: {plan.source} is missing, skipped")
            continue
        rows[plan.name] = row = run_plan(plan, arguments.corpora, arguments.out, arguments.workers)
        print(f"{plan.name}: {row}", flush=True)
    print(data_prep("inspect", str(arguments.out)))
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def run_plan(plan: Plan, corpora: Path, out: Path, workers: str) -> dict[str, object]:
    """Shard, verify, and inspect one dataset; return samples by split, drops by reason, and seconds."""
    folder = out / plan.name
    command = [plan.task, "--format", plan.format, "--src", str(corpora / plan.source)]
    command += ["--out", str(folder), "--workers", workers, *plan.options]
    if plan.media:
        command += ["--media", str(corpora / plan.media)]
    start = time.perf_counter()
    data_prep(*command)
    sharded = time.perf_counter()
    data_prep("verify", "--full", "--decode", "100", "--workers", workers, str(folder))
    verified = time.perf_counter()
    image = [] if plan.task == "text" else ["--png", str(out / f"{plan.name}.png")]
    data_prep("inspect", str(folder), "--count", "12", *image)
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    samples = {
        split: sum(shard["num_samples"] for shard in content["shards"])
        for split, content in manifest["splits"].items()
    }
    return {
        "samples": samples,
        "dropped": manifest["dropped"],
        "shard_s": round(sharded - start, 1),
        "verify_s": round(verified - sharded, 1),
    }


def data_prep(*arguments: str) -> str:
    """Run `python -m data_prep` and return its output; on failure, print its error and exit."""
    command = [sys.executable, "-m", "data_prep", *arguments]
    outcome = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if outcome.returncode:
        print(outcome.stderr.strip(), file=sys.stderr)
        raise SystemExit(1)
    return outcome.stdout.strip()


if __name__ == "__main__":
    main()
