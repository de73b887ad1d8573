"""Answer held-out conversations with launch/generate.py and print the expected answers.

    python scripts/answer_held_out.py --data data/sample --run runs/quickstart --seed 1

Draws conversations of one question at random from the test split of the sft datasets, each of another type
(or, without types, of other media). Media and spoken answers are written to RUN/examples.
"""

import argparse
import json
import random
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from muomni.data.shards.manifest import find_datasets
from muomni.data.shards.reader import SplitReader
from muomni.errors import MuomniError, exit_on_error

ROOT = Path(__file__).resolve().parents[1]
FLAGS = {"image": "--image", "audio": "--audio"}


@dataclass(slots=True)
class Example:
    """One question, its media files, and the expected answer."""

    kind: str  # the type, or part types of the question and the answer
    expected: str
    arguments: list[str] = field(default_factory=list)
    files: dict[Path, bytes] = field(default_factory=dict)


def read_example(sample: dict[str, bytes | str], folder: Path) -> Example | None:
    """Convert a conversation of one question and one answer to an Example; None for others.

    Its media files are paths in `folder`, not written yet.
    """
    content = json.loads(sample["json"])
    turns = content["turns"]
    if [turn["role"] for turn in turns] != ["user", "assistant"]:
        return None
    question, answer = (turn["content"] for turn in turns)
    spoken = [part for part in answer if part["type"] == "audio"]
    expected = " ".join(part["text"] for part in answer if part["type"] == "text")
    kinds = (*(part["type"] for part in question), "->", *(part["type"] for part in answer))
    example = Example(content.get("type") or " ".join(kinds), expected)
    for kind, flag in FLAGS.items():
        names = [part["name"] for part in question if part["type"] == kind]
        files = {folder / f"{sample['__key__']}.{name}": sample[name] for name in names}
        example.files.update(
            {file: data for file, data in files.items() if isinstance(data, bytes)}
        )
        if files:
            example.arguments += [flag, *map(str, files)]
    *first, last = (part["type"] for part in question)
    if last == "text" and "text" not in first:  # generate.py puts files before the text
        example.arguments += ["--text", question[-1]["text"]]
    elif last == "text" or "text" in first:
        words = (part.get("text", f"<{part['type']}>") for part in question)
        example.arguments += ["--text", " ".join(words)]
    if spoken:
        example.arguments += ["--speak", str(folder / f"{sample['__key__']}.spoken.wav")]
    return example


def draw_examples(data: Path, folder: Path, seed: int, count: int) -> list[Example]:
    """`count` test conversations of different kinds; raises DataError if there is no sft dataset."""
    chance = random.Random(seed)
    by_kind: dict[str, list[Example]] = {}
    for manifest in find_datasets(data, "sft"):
        reader = SplitReader(manifest, "test")
        for index in range(len(reader)):
            example = read_example(reader.read(index), folder)
            if example is not None:
                by_kind.setdefault(example.kind, []).append(example)
    kinds = chance.sample(sorted(by_kind), min(count, len(by_kind)))
    return [chance.choice(by_kind[kind]) for kind in kinds]


def ask(run: Path, example: Example) -> None:
    """Run launch/generate.py and print the question, the expected answer, and the answer."""
    command = ["launch/generate.py", "--run", str(run), *example.arguments]
    print(f"\n$ python {shlex.join(command)}", flush=True)
    outcome = subprocess.run(
        [sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False
    )
    if outcome.returncode != 0:
        error = MuomniError("launch/generate.py failed; fix the error above, then rerun")
        error.exit_code = outcome.returncode
        raise error
    result = json.loads(outcome.stdout.splitlines()[-1])
    print(f"expected  {example.expected}\nanswered  {result['text']}")
    if "speech" in result:
        print(f"spoken    {result['speech']} ({result['speech_s']:.1f} s)")


def main() -> None:
    parser = argparse.ArgumentParser(description="Answer held-out questions with a trained model.")
    parser.add_argument("--data", type=Path, required=True, help="data root")
    parser.add_argument("--run", type=Path, required=True, help="run folder with an sft export")
    parser.add_argument("--seed", type=int, default=0, help="of the draw (default: 0)")
    parser.add_argument("--count", type=int, default=5, help="number of questions (default: 5)")
    arguments = parser.parse_args()
    with exit_on_error("answer_held_out"):
        folder = arguments.run / "examples"
        folder.mkdir(parents=True, exist_ok=True)
        for example in draw_examples(arguments.data, folder, arguments.seed, arguments.count):
            for file, content in example.files.items():
                file.write_bytes(content)
            ask(arguments.run, example)


if __name__ == "__main__":
    main()
